"""The published models of examples/papers: sizes as published, layouts that plan, twins that train; files on top of files."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megnorm.cli import main
from megnorm.config import ConfigError, RunConfig, load
from megnorm.models.count import active_parameters, count_parameters
from megnorm.plan import make_plan
from tests.train.test_families import write_pairs
from tests.train.test_finetune import write_tokenizer
from tests.train.tiny import losses, write_data

PAPERS = Path(__file__).resolve().parent.parent / "examples" / "papers"
# Millions of parameters: HybridNorm's by its tables (stored rows of the vocabulary counted), NormFormer's and RoBERTa's by
# their names, DeepNet's as published for OPUS-100 and 102 languages, and for WMT-17 (no numbers) by 7.35 for a pair of layers.
PUBLISHED = {
    "hybridnorm_151m": (151.4, 0.05),
    "hybridnorm_285m": (285.2, 0.05),
    "hybridnorm_550m": (550.5, 0.05),
    "hybridnorm_543m": (543.7, 0.05),
    "hybridnorm_1.2b": (1276.9, 0.05),
    "hybridnorm_7b": (7300.0, 5.0),  # OLMo 2 7B's shape
    "hybridnorm_moe_1b_7b": (6920.0, 5.0),
    "normformer_125m": (125.0, 2.0),
    "normformer_355m": (355.0, 2.0),
    "normformer_1.3b": (1300.0, 15.0),
    "normformer_2.7b": (2700.0, 55.0),
    "roberta_base": (125.0, 0.5),
    "deepnet_6_6": (6 * 7.35 + 16.8, 0.2),
    "deepnet_18_18": (18 * 7.35 + 16.8, 0.3),
    "deepnet_50_50": (50 * 7.35 + 16.8, 1.0),
    "deepnet_100_100": (100 * 7.35 + 16.8, 2.0),
    "deepnet_opus_100_100": (863.0, 2.0),
    "deepnet_opus_500_500": (3800.0, 15.0),
    "deepnet_3.2b": (3200.0, 10.0),
}
TOKENS = {
    "hybridnorm_151m": 200e9, "hybridnorm_285m": 200e9, "hybridnorm_550m": 400e9, "hybridnorm_543m": 400e9,
    "hybridnorm_1.2b": 1e12, "hybridnorm_7b": 150e9, "hybridnorm_moe_1b_7b": 500e9,
    "roberta_base": 8192 * 512 * 500_000, "deepnet_3.2b": 256 * 4096 * 260_000,
} | {name: 128 * 4096 * 100_000 for name in PUBLISHED if name.startswith("deepnet") and "3.2b" not in name}  # fmt: skip
NORMFORMER = 300e9


def preset(name: str, *overrides: str) -> RunConfig:
    return load(PAPERS / f"{name}.yaml", overrides)


def test_every_file_is_known() -> None:
    shared = {"normformer", "hybridnorm", "deepnet", "tiny", "tiny_pairs"}
    assert {path.stem for path in PAPERS.glob("*.yaml")} == shared | set(PUBLISHED) | {f"{n}-tiny" for n in PUBLISHED}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_has_the_published_size_and_length(name: str) -> None:
    """On 8 ranks and on 64."""
    config = preset(name)
    plan = make_plan(config, 8)
    stored = plan.padded_vocab if name.startswith("hybridnorm") else config.model.vocab_size
    model = replace(config.model, vocab_size=stored)
    size, tolerance = PUBLISHED[name]
    assert abs(sum(count_parameters(model, plan.resolved).values()) / 1e6 - size) < tolerance
    assert plan.tokens_per_step * config.train.steps == pytest.approx(TOKENS.get(name, NORMFORMER), rel=1e-4)
    assert make_plan(config, 64).dp == 64 // config.parallel.tp
    assert plan.warnings == ()
    if name == "hybridnorm_moe_1b_7b":
        assert active_parameters(model, plan.resolved) / 1e9 == pytest.approx(1.28, abs=0.005)


def test_roberta_itself_has_its_published_size() -> None:
    """Of transformers' RobertaForMaskedLM, but for two position rows that it does not use and its one token type."""
    config = preset("roberta_base", "model.norm.scheme=postln", "model.norm.options={embedding_norm: true}")
    assert make_plan(config, 1).parameters == 124_697_433 - 3 * 768


def test_deepnets_skip_and_gain_at_depth() -> None:
    """The paper's table for 100-100: encoder 3.4157 and 0.2063, decoder 4.1618 and 0.1699."""
    resolved = make_plan(preset("deepnet_100_100"), 8).resolved
    assert resolved.encoder is not None
    for stack, skip, gain in ((resolved.encoder, 3.4157, 0.2063), (resolved, 4.1618, 0.1699)):
        assert len(stack.layers) == 100
        assert stack.layers[-1].ffn.residual.skip.value == pytest.approx(skip, abs=5e-5)
        assert stack.gains[-1]["down"] == pytest.approx(gain, abs=5e-5)


@pytest.mark.parametrize("name", PUBLISHED)
def test_initial_weights_have_the_papers_deviation(name: str) -> None:
    """Laws of q and W_down of the first layer (of the decoder), of the embedding, and of an untied head."""
    from megnorm.layers.init import law_of

    plan = make_plan(preset(name), 8)
    m = plan.config.model
    d, f, v, layers = m.width, m.ffn, m.vocab_size, m.layers
    laws = {
        role: law_of(f"blocks.0.{role}.weight", role, shape, m, plan.resolved)
        for role, shape in {"q": (d, d), "down": (d, f), "up": (f, d), "embed": (v, d), "head": (v, d)}.items()
    }
    if name.startswith("hybridnorm"):
        std = (2.5 * d) ** -0.5
        wanted = {"q": std, "up": std, "down": std / (2 * layers) ** 0.5, "embed": std}
        wanted |= {} if m.tied_head else {"head": d**-0.5}
        distribution = "truncated_normal"
        assert {law[0] for law in laws.values() if law} == {distribution}
    elif name.startswith("deepnet"):  # xavier normal, W_up and W_down times (12 M)^(-1/4)
        inner = (2 / (d + f)) ** 0.5 * (12 * layers) ** -0.25
        wanted, distribution = {"q": d**-0.5, "up": inner, "down": inner, "embed": d**-0.5}, "xavier_normal"
    elif name == "roberta_base":
        wanted, distribution = dict.fromkeys(("q", "up", "down", "embed"), 0.02), "normal"
    else:
        wanted = {"q": (2 * d) ** -0.5, "up": (3 * d) ** -0.5, "down": (3 * f) ** -0.5, "embed": d**-0.5}
        distribution = "xavier_uniform"
    for role, std in wanted.items():
        law = laws[role]
        assert law is not None and law[1] == pytest.approx(std, rel=1e-5), role
    assert laws["q"] is not None and laws["q"][0] == distribution


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_twin_has_the_options_of_its_preset(name: str) -> None:
    small, large = preset(f"{name}-tiny"), preset(name)
    assert make_plan(small, 1).parameters < 3e6
    assert small.model.norm == large.model.norm and small.model.activation == large.model.activation
    assert small.model.family == large.model.family and small.data.task == large.data.task
    assert (small.model.moe.experts > 0) == (large.model.moe.experts > 0)
    assert small.model.heads // small.model.kv == large.model.heads // large.model.kv
    assert small.optim == replace(large.optim, warmup_steps=20)
    assert small.train.out == f"{large.train.out}-tiny"


SAME = ("deepnet_opus_100_100", "deepnet_3.2b")  # twins like that of deepnet_100_100


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name in PUBLISHED if name not in SAME])
def test_a_twin_trains(name: str, tmp_path: Path) -> None:
    """On made-up data, since the text of its own would have to be tokenized."""
    overrides: dict[str, Any] = {
        "data.split": "[0.9, 0.1, 0.0]", "data.valid": "[]", "data.tokenizer": "null",
        "train.out": tmp_path / "run", "train.steps": 15, "train.global_batch": 4, "train.micro_batch": 4,
        "train.eval_batches": 1, "train.threads": 1, "train.log_every": 1, "optim.warmup_steps": 2,
        "metrics.tensorboard": "false",
    }  # fmt: skip
    if name.startswith("deepnet"):
        pairs = write_pairs(tmp_path / "pairs", vocab=200)
        overrides |= {"data.path": pairs, "data.valid": pairs, "train.global_batch": 2, "train.micro_batch": 1}
        overrides |= {"data.pad": 0, "data.start": 1, "data.pairs.longest": 16, "data.pairs.tokens_per_batch": 256}
        overrides |= {"optim.lr": 5e-3, "train.eval_every": 0}
    else:
        overrides["data.path"] = write_data(
            tmp_path / "text", documents=200, vocab=60 if name == "roberta_base" else 200
        )
    if name == "roberta_base":
        tokenizer = write_tokenizer(tmp_path / "tokenizer.json")
        overrides |= {"data.tokenizer": tokenizer, "data.mask.token": "'[MASK]'", "optim.lr": 3e-3}
    words = [f"{key}={value}" for key, value in overrides.items()]
    assert main(["train", "--config", str(PAPERS / f"{name}-tiny.yaml"), *words]) == 0
    curve = losses(tmp_path / "run")
    assert curve[15] < curve[1] - 0.5


def test_files_on_top_of_files(tmp_path: Path) -> None:
    def write(name: str, text: str) -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    write("a.yaml", "model: {layers: 3, norm: {scheme: deepnorm, options: {scale_gate: false}}}\ntrain: {steps: 7}")
    (tmp_path / "deeper").mkdir()
    write("deeper/b.yaml", "base: ../a.yaml\nmodel: {width: 96, norm: {options: {embedding_norm: true}}}")
    write("c.yaml", "model: {width: 64, heads: 4}")
    top = write("d.yaml", "base: [deeper/b.yaml, c.yaml]\nmodel: {layers: 5}")
    config = load(top, ["model.heads=8"])
    assert (config.model.layers, config.model.width, config.model.heads, config.train.steps) == (5, 64, 8, 7)
    assert config.model.norm.options == {"scale_gate": False, "embedding_norm": True}
    with pytest.raises(ConfigError, match=r"gone.yaml: there is no such config file"):
        load(write("e.yaml", "base: gone.yaml"))
    with pytest.raises(ConfigError, match="does it lead back"):
        load(write("f.yaml", "base: f.yaml"))
    with pytest.raises(ConfigError, match="base names a file, or a list"):
        load(write("g.yaml", "base: {a: 1}"))
    with pytest.raises(ConfigError, match="unknown key 'base'"):
        load(None, ["base=a.yaml"])
