"""Encoders, encoder-decoders and mixtures of experts in transformers: what they say there, and how they search."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megnorm.hf import custom
from megnorm.hf.compare import LogitMismatch, random_inputs
from megnorm.hf.convert import from_hf, to_hf
from megnorm.hf.native import native_forward
from megnorm.hf.tokenizer import SpecialIds
from megnorm.infer.beam import Beam, beam_search
from megnorm.layers.env import Env
from megnorm.models.config import ModelConfig, MoEConfig
from megnorm.models.encdec import EncoderDecoder
from megnorm.norms.resolve import Resolved
from megnorm.parallel.layout import named_matrices
from tests.hf.tiny import made, reload
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
