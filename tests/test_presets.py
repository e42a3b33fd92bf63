"""The published models of examples/papers: sizes as published, layouts that plan, twins that train; files on top of files."""

from dataclasses import replace
from pathlib import Path

import pytest

from megnorm.cli import main
from megnorm.config import ConfigError, RunConfig, load
from megnorm.models.count import count_parameters
from megnorm.plan import make_plan
from tests.train.tiny import losses, write_data

PAPERS = Path(__file__).resolve().parent.parent / "examples" / "papers"
# Millions of parameters: HybridNorm's by its tables (stored rows of the vocabulary counted), NormFormer's by their names.
PUBLISHED = {
    "hybridnorm_151m": (151.4, 0.05),
    "hybridnorm_285m": (285.2, 0.05),
    "hybridnorm_550m": (550.5, 0.05),
    "hybridnorm_543m": (543.7, 0.05),
    "hybridnorm_1.2b": (1276.9, 0.05),
    "hybridnorm_7b": (7300.0, 5.0),  # OLMo 2 7B's shape
    "normformer_125m": (125.0, 2.0),
    "normformer_355m": (355.0, 2.0),
    "normformer_1.3b": (1300.0, 15.0),
    "normformer_2.7b": (2700.0, 55.0),
}
TOKENS = {"151m": 200e9, "285m": 200e9, "550m": 400e9, "543m": 400e9, "1.2b": 1e12, "7b": 150e9}


def preset(name: str) -> RunConfig:
    return load(PAPERS / f"{name}.yaml")


def test_every_file_is_known() -> None:
    shared = {"normformer", "hybridnorm", "tiny"}
    assert {path.stem for path in PAPERS.glob("*.yaml")} == shared | set(PUBLISHED) | {f"{n}-tiny" for n in PUBLISHED}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_has_the_published_size_and_length(name: str) -> None:
    """On 8 ranks and on 64."""
    config = preset(name)
    plan = make_plan(config, 8)
    stored = replace(config.model, vocab_size=plan.padded_vocab if name.startswith("hybridnorm") else 50257)
    size, tolerance = PUBLISHED[name]
    assert abs(sum(count_parameters(stored, plan.resolved).values()) / 1e6 - size) < tolerance
    assert plan.tokens_per_step * config.train.steps == pytest.approx(TOKENS.get(name.split("_")[1], 300e9), rel=1e-4)
    assert make_plan(config, 64).dp == 64 // config.parallel.tp
    assert plan.warnings == ()


@pytest.mark.parametrize("name", PUBLISHED)
def test_initial_weights_have_the_papers_deviation(name: str) -> None:
    """Laws of q and W_down of the first layer, of the embedding, and of an untied head."""
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
        assert {law[0] for law in laws.values() if law} == {"truncated_normal"}
    else:
        wanted = {"q": (2 * d) ** -0.5, "up": (3 * d) ** -0.5, "down": (3 * f) ** -0.5, "embed": d**-0.5}
        assert laws["q"] is not None and laws["q"][0] == "xavier_uniform"
    for role, std in wanted.items():
        law = laws[role]
        assert law is not None and law[1] == pytest.approx(std, rel=1e-5), role


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_twin_has_the_options_of_its_preset(name: str) -> None:
    small, large = preset(f"{name}-tiny"), preset(name)
    assert make_plan(small, 1).parameters < 3e6
    assert small.model.norm == large.model.norm and small.model.activation == large.model.activation
    assert small.model.heads // small.model.kv == large.model.heads // large.model.kv
    assert small.optim == replace(large.optim, warmup_steps=20)
    assert small.train.out == f"{large.train.out}-tiny"


@pytest.mark.full
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_twin_trains(name: str, tmp_path: Path) -> None:
    """On made-up data, since the text of its own would have to be tokenized."""
    data = write_data(tmp_path / "text", documents=200, vocab=200)
    overrides = {
        "data.path": data, "data.valid": "[]", "data.split": "[0.9, 0.1, 0.0]", "data.tokenizer": "null",
        "train.out": tmp_path / "run", "train.steps": 15, "train.global_batch": 4, "train.micro_batch": 4,
        "train.eval_batches": 1, "train.threads": 1, "train.log_every": 1, "optim.warmup_steps": 2,
        "metrics.tensorboard": "false",
    }  # fmt: skip
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
