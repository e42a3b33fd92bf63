"""Encoders, encoder-decoders and mixtures of experts in transformers: what they say there, and how they search."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megnorm.hf import custom
from megnorm.hf.compare import LogitMismatch, random_inputs
from megnorm.hf.convert import from_hf, to_hf
from megnorm.hf.families.registry import choose
from megnorm.hf.native import native_forward
from megnorm.hf.tokenizer import SpecialIds
from megnorm.infer.beam import Beam, beam_search
from megnorm.infer.generate import load
from megnorm.layers.env import Env
from megnorm.models.config import ModelConfig, MoEConfig
from megnorm.models.encdec import EncoderDecoder
from megnorm.models.family import resolve_model
from megnorm.parallel.layout import named_matrices
from tests.hf.tiny import made, reload, tiny
from tests.marks import thinned

SCHEMES = ("preln", "postln", "deepnorm", "normformer", "hybridnorm_star")
BERT = {"positions": "learned", "bias": True, "activation": "gelu", "segments": 2, "tied_head": True, "head_bias": True}
EXPERTS = MoEConfig(experts=4, top_k=2, ffn=12)
PAIRS = {"family": "encdec", "encoder_layers": 2, "activation": "gelu"}
MODELS: dict[str, dict[str, Any]] = {
    "masked": {"family": "masked", **BERT, "head_transform": True},
    "masked, padding by id": {"family": "masked", "padding_id": 1, "positions": "sinusoidal", "logit_scale": 0.5},
    "masked, relative": {"family": "masked", "positions": "none", "relative_buckets": 8, "parallel_block": False},
    "classifier": {"family": "classifier", "classes": 3, "segments": 2, "positions": "learned", "padding_id": 1},
    "regression": {"family": "classifier", "classes": 1, "pooler": False},
    "encdec, one table": {**PAIRS, "shared_embedding": True, "tied_head": True, "positions": "sinusoidal"},
    "encdec, two tables": {**PAIRS, "tied_head": True, "positions": "learned", "max_source_positions": 60},
    "encdec, three tables": {**PAIRS, "bias": True, "logit_softcap": 3.0},
    "encdec, relative": {**PAIRS, "shared_embedding": True, "positions": "none", "relative_buckets": 8},
    "experts": {"moe": replace(EXPERTS, first=1, shared_ffn=8, normalize=True)},
    "experts, sigmoid": {"moe": replace(EXPERTS, score="sigmoid", scale=2.5, bias_rate=0.1), "bias": True},
    "experts, padding": {"moe": EXPERTS, "padding_id": 1, "activation": "relu_squared"},
}
CASES = [(name, scheme) for name in MODELS for scheme in SCHEMES]
CASES += [
    ("masked", "mhc"),
    ("encdec, two tables", "hyper_connections"),
    ("encdec, relative", "mhc"),
    ("experts", "mhc"),
]
FAST = {(name, SCHEMES[i % len(SCHEMES)]) for i, name in enumerate(MODELS)}


def inputs_of(model: ModelConfig, loaded: Any) -> dict[str, Tensor]:
    inputs = random_inputs(loaded.config, custom.CLASSES[model.family][0], length=13)
    if model.family == "causal" and model.padding_id is not None:
        inputs["input_ids"][1, 7:] = model.padding_id
    return inputs


def said(forward: Any, inputs: dict[str, Tensor]) -> Tensor:
    rest = {name: tensor for name, tensor in inputs.items() if name != "input_ids"}
    with torch.no_grad():
        out = forward(inputs["input_ids"], **rest)
    return getattr(out, "logits", out)


@pytest.mark.parametrize(("name", "scheme"), thinned(CASES, lambda case: case in FAST))
def test_the_custom_class_computes_what_megnorm_does(name: str, scheme: str) -> None:
    kind = "layernorm" if MODELS[name].get("bias") else "rmsnorm"
    model, resolved, state = made(scheme, kind, **{"tied_head": False, **MODELS[name]})
    loaded = custom.build(state, model, resolved, dtype=torch.float64)
    inputs = inputs_of(model, loaded)
    ours, theirs = said(native_forward(state, model, resolved, dtype=torch.float64), inputs), said(loaded, inputs)
    assert ours.dtype == theirs.dtype == torch.float64
    assert (ours - theirs).abs().max() <= 1e-10 * ours.abs().max()


@pytest.mark.parametrize("name", thinned(MODELS, 4))
def test_a_folder_goes_out_and_comes_back(name: str, tmp_path: Path) -> None:
    model, resolved, state = made("normformer", **{"tied_head": False, **MODELS[name]})
    reference = native_forward(state, model, resolved)
    export = to_hf(
        state, model, resolved, out=tmp_path / "a", native=False, reference=reference, ids=SpecialIds(start=3, pad=1)
    )
    assert export.difference is not None and export.architecture == custom.architecture(model.family)
    fields = json.loads((tmp_path / "a" / "config.json").read_text())
    assert fields.get("decoder_start_token_id") == (3 if model.family == "encdec" else None)
    assert {path.name for path in (tmp_path / "a").glob("*.py")} == set(custom.FILES[model.family])
    read = from_hf(tmp_path / "a")
    assert replace(
        read.model, encoder_layers=model.encoder_layers, max_source_positions=model.max_source_positions
    ) == replace(model, head_dim=model.hd)
    assert read.resolved == resolved and set(read.state) == set(state)
    assert all(torch.equal(read.state[key], state[key]) for key in state)
    loaded = reload(tmp_path / "a")
    loaded.save_pretrained(tmp_path / "b")
    inputs = inputs_of(model, loaded)
    assert torch.equal(said(loaded, inputs), said(reload(tmp_path / "b"), inputs))
    key = next(key for key in state if key.endswith(("ffn.down.weight", "experts.1.down.weight")))
    with pytest.raises(LogitMismatch, match="differs from the model"):
        to_hf({**state, key: state[key] * 1.5}, model, resolved, out=tmp_path / "c", native=False, reference=reference)


START, END, PAD = 0, 2, 1
SEARCHES = [
    (name, scheme, size, penalty)
    for i, name in enumerate(name for name in MODELS if "encdec" in name)
    for j, scheme in enumerate(SCHEMES)
    for size, penalty in ((1, 1.0), (4, (0.0, 0.6, 1.0, 2.0)[(i + j) % 4]))
]


@pytest.mark.parametrize(("name", "scheme", "size", "penalty"), thinned(SEARCHES, 13))
def test_beam_search_is_that_of_transformers(name: str, scheme: str, size: int, penalty: float) -> None:
    """Token for token, with caches and without, here and there; sources of several lengths in one batch."""
    model, resolved, state = made(scheme, **{"tied_head": False, "vocab_size": 9, **MODELS[name]})
    ours = EncoderDecoder(model, resolved, model.vocab_size, Env(dtype=torch.float64)).eval()
    for named in named_matrices(ours):
        named.view().copy_(state[named.name])
    theirs = custom.build(state, model, resolved, dtype=torch.float64)
    source = torch.randint(3, 9, (5, 9), generator=torch.Generator().manual_seed(4))
    real = torch.arange(9) < torch.tensor([9, 7, 4, 9, 2])[:, None]
    wide = {"num_beams": size, "length_penalty": penalty, "early_stopping": "never"} if size > 1 else {}
    tokens = {"decoder_start_token_id": START, "eos_token_id": END, "pad_token_id": PAD}
    found = []
    for cached in (True, False):
        beam = Beam(START, END, size, penalty, longest=12, cached=cached)
        found.append(beam_search(ours, source.t(), real.t(), beam))
        rows = theirs.generate(
            source, attention_mask=real.long(), max_new_tokens=12, do_sample=False, use_cache=cached, **wide, **tokens
        )
        found.append([row[: row.index(END)] if END in row else row[:12] for row in rows[:, 1:].tolist()])
    assert found[0] == found[1] == found[2] == found[3]


def test_padding_to_the_left_and_greedy_caches_of_experts() -> None:
    """A batch whose shorter prompt is padded says what each says alone, with a cache and without."""
    model, resolved, state = made("hybridnorm_star", **MODELS["experts, padding"])
    decoder = custom.build(state, model, resolved)
    ids = torch.randint(2, 61, (2, 11), generator=torch.Generator().manual_seed(1))
    ids[0, :4] = 1
    mask, options = (
        (ids != 1).long(),
        {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 1, "suppress_tokens": [1]},
    )
    cached = decoder.generate(ids, attention_mask=mask, **options)
    assert torch.equal(cached, decoder.generate(ids, attention_mask=mask, use_cache=False, **options))
    assert torch.equal(cached[:1, 4:], decoder.generate(ids[:1, 4:], attention_mask=mask[:1, 4:], **options))


def test_what_cannot_leave_is_told() -> None:
    model, resolved, state = made("preln", moe=replace(EXPERTS, capacity=1.5))
    with pytest.raises(ValueError, match="model.moe.capacity=1.5"):
        custom.check_state(state, model, resolved)
    pairs = custom.make(*made("preln", **PAIRS)[:2])
    with pytest.raises(ValueError, match="set decoder_start_token_id and pad_token_id"):
        pairs.prepare_decoder_input_ids_from_labels(torch.zeros(1, 3, dtype=torch.long))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transform_norm": {"kind": "l2"}}, "transform_norm is not what norm_config says"),
        ({"family": "t5"}, "family 't5' is unknown"),
        ({"vocab_size": None}, "the field 'vocab_size' is missing"),
    ],
)
def test_a_config_that_contradicts_itself_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    model, resolved, _ = made("preln", **MODELS["masked"])
    fields = {"model_type": "megnorm", **custom.config(model, resolved), **changes}
    fields = {name: value for name, value in fields.items() if value is not None or name not in changes}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    save_file({"lm_head.bias": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        from_hf(tmp_path)


POST = {"norm": {"options": {"embedding_norm": True}}, "kv_heads": None, "segments": 2}
SPREAD = {"layer": {"attention": {"q": {}, "k": {}}}}
NATIVE: list[tuple[str, str, str, dict[str, Any]]] = [
    ("BertForMaskedLM", "postln", "layernorm", {"family": "masked", **BERT, **POST, "head_transform": True}),
    ("BertForSequenceClassification", "postln", "layernorm",
     {"family": "classifier", **POST, "classes": 3, "segments": 0, "tied_head": False}),
    ("RobertaForMaskedLM", "postln", "layernorm",
     {"family": "masked", **BERT, **POST, "head_transform": True, "padding_id": 1, "segments": 1}),
    ("RobertaForSequenceClassification", "postln", "layernorm",
     {"family": "classifier", **POST, "classes": 1, "tied_head": False, "padding_id": 2, "activation": "relu"}),
    ("MixtralForCausalLM", "preln", "rmsnorm", {"moe": replace(EXPERTS, normalize=True), "tied_head": True}),
    ("OlmoeForCausalLM", "preln", "rmsnorm", {"moe": replace(EXPERTS, scale=2.5), "norm": {"patch": SPREAD}}),
    ("Qwen3MoeForCausalLM", "qknorm", "rmsnorm", {"moe": replace(EXPERTS, first=1, every=2)}),
    ("Qwen2MoeForCausalLM", "preln", "rmsnorm", {"moe": replace(EXPERTS, first=1, shared_ffn=8), "qkv_bias": True}),
]  # fmt: skip


@pytest.mark.parametrize(("architecture", "scheme", "kind", "options"), thinned(NATIVE, 4))
def test_a_native_class_says_the_same(
    architecture: str, scheme: str, kind: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model, resolved, state = made(scheme, kind, **options)
    reference = native_forward(state, model, resolved)
    export = to_hf(state, model, resolved, out=tmp_path / "a", reference=reference)
    assert export.architecture == architecture and not list((tmp_path / "a").glob("*.py"))
    if model.family != "causal":
        with pytest.raises(ValueError, match=f"a {architecture} does not continue texts"):
            load(tmp_path / "a")
    if architecture.startswith("Qwen2Moe"):
        with pytest.raises(ValueError, match="does not read Qwen2-MoE"):
            from_hf(tmp_path / "a")
        return
    read = from_hf(tmp_path / "a")
    assert read.architecture == architecture and read.resolved.layers == resolved.layers
    inputs = inputs_of(model, reload(tmp_path / "a"))
    back = said(native_forward(read.state, read.model, read.resolved), inputs)
    assert (said(reference, inputs) - back).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("what", "options"),
    [
        ("residual.skip", {"scheme": "deepnorm"}),
        ("blocks.0.attention.input", {"scheme": "preln"}),
        ("head_transform", {"head_transform": False}),
        ("relative_buckets", {"relative_buckets": 8}),
        ("moe.score", {"family": "causal", "moe": replace(EXPERTS, bias_rate=0.1)}),
        ("moe.normalize", {"family": "causal", "moe": EXPERTS}),
        ("moe.shared_ffn", {"family": "causal", "moe": replace(EXPERTS, normalize=True, shared_ffn=8)}),
        ("moe.first", {"family": "causal", "moe": replace(EXPERTS, normalize=True, first=1)}),
    ],
)
def test_no_other_class_is_taken(what: str, options: dict[str, Any]) -> None:
    options = dict(options)
    scheme = options.pop("scheme", "postln")
    if options.get("family") == "causal":
        model = tiny("preln", **options)
    else:
        norm = {"options": {"embedding_norm": True}} if scheme != "preln" else {}
        model = tiny(
            scheme, "layernorm", **{"family": "masked", **BERT, **POST, "head_transform": True, "norm": norm, **options}
        )
    family, reasons = choose(model, resolve_model(model))
    assert family is None or what.startswith("moe")
    assert any(reason.startswith(what) for reason in reasons.values()), reasons


@pytest.mark.parametrize("name", ["bert_mlm", "roberta_mlm"])
def test_an_encoder_comes_in_and_goes_out_unchanged(name: str, shared: Path, tmp_path: Path) -> None:
    source = shared / "golden" / "hf" / name
    read, golden = from_hf(source), load_file(source / "golden.safetensors")
    given = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "token_type_ids"}
    inputs = {ours: golden[f"input/{theirs}"] for ours, theirs in given.items() if f"input/{theirs}" in golden}
    ours = said(native_forward(read.state, read.model, read.resolved, dtype=torch.float64), inputs)
    real = inputs["attention_mask"].bool()
    assert (ours - golden["output/logits"])[real].abs().max() < 1e-10
    reference = native_forward(read.state, read.model, read.resolved)
    export = to_hf(read.state, read.model, read.resolved, out=tmp_path / "out", reference=reference)
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert export.architecture == read.architecture and set(before) == set(after)
    assert all(torch.equal(before[key], after[key]) for key in before)
