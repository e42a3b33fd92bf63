"""BERT, RoBERTa, mBART and T5 as configs: logits and gradients of the reference implementations, in float64."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megnorm.layers.env import Env
from megnorm.models.build import Input, build_model
from megnorm.models.config import ModelConfig
from megnorm.models.encdec import Pairs
from megnorm.models.masked import MaskedTokens
from megnorm.norms.config import NormConfig
from megnorm.parallel.layout import named_matrices

LAYERNORM: Any = {"kind": "layernorm"}
ENCODER: dict[str, Any] = {
    "family": "masked", "layers": 2, "width": 32, "heads": 4, "ffn": 56, "vocab_size": 97, "activation": "gelu",
    "positions": "learned", "bias": True, "tied_head": True, "head_bias": True, "head_transform": True,
    "norm": NormConfig("postln", {"embedding_norm": True}, eps=1e-12, **LAYERNORM),
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "bert_mlm": {**ENCODER, "segments": 2, "max_positions": 40, "padding_id": 0},
    "roberta_mlm": {**ENCODER, "segments": 1, "max_positions": 38, "padding_id": 1},
    "mbart": {
        "family": "encdec", "layers": 1, "encoder_layers": 2, "width": 36, "heads": 4, "ffn": 40, "vocab_size": 97,
        "max_positions": 40, "activation": "gelu", "positions": "learned", "bias": True, "shared_embedding": True,
        "tied_head": True, "embedding_scale": "sqrt_width",
        "norm": NormConfig("preln", patch={"embedding": {}}, **LAYERNORM),
    },
    "t5": {
        "family": "encdec", "layers": 1, "encoder_layers": 2, "width": 32, "heads": 4, "ffn": 56, "vocab_size": 97,
        "activation": "geglu_tanh", "positions": "none", "shared_embedding": True, "tied_head": True,
        "relative_buckets": 8, "relative_distance": 16, "norm": NormConfig("preln", eps=1e-6),
    },
}  # fmt: skip
BERT = {
    r"(?:bert|roberta)\.encoder\.layer\.(\d)\.": r"blocks.\1.",
    r"attention\.self\.query": "attention.q", r"attention\.self\.key": "attention.k",
    r"attention\.self\.value": "attention.v", r"attention\.output\.dense": "attention.o",
    r"attention\.output\.LayerNorm": "attention.post_norm", r"intermediate\.dense": "ffn.up",
    r"(blocks\.\d)\.output\.dense": r"\1.ffn.down", r"(blocks\.\d)\.output\.LayerNorm": r"\1.ffn.post_norm",
    r"(?:bert|roberta)\.embeddings\.": "embed.", r"embed\.LayerNorm": "embed.norm",
    "position_embeddings": "position", "token_type_embeddings": "segment", "word_embeddings": "token",
    r"cls\.predictions\.transform\.dense|lm_head\.dense": "transform.dense",
    r"cls\.predictions\.transform\.LayerNorm|lm_head\.layer_norm": "transform.norm",
    r"cls\.predictions\.bias|lm_head\.bias": "head.bias",
}  # fmt: skip
BART = {
    r"^model\.": "", r"\.layers\.": ".blocks.", "encoder_attn_layer_norm": "cross_attention.input_norm",
    "self_attn_layer_norm": "attention.input_norm", r"(blocks\.\d)\.final_layer_norm": r"\1.ffn.input_norm",
    r"(coder)\.layer_norm": r"\1.final_norm", "layernorm_embedding": "embed.norm", "embed_positions": "embed.position",
    "encoder_attn": "cross_attention", "self_attn": "attention", "([qkv])_proj": r"\1", "out_proj": "o",
    "fc1": "ffn.up", "fc2": "ffn.down", r"^shared": "embed.token",
}  # fmt: skip
T5 = {
    r"\.block\.0\.layer\.0\.SelfAttention\.relative_attention_bias": ".relative",
    r"encoder\.block\.(\d)\.layer\.1\.": r"encoder.blocks.\1.ffn.", r"\.block\.(\d)\.layer\.0\.": r".blocks.\1.attention.",
    r"\.block\.(\d)\.layer\.1\.": r".blocks.\1.cross_attention.", r"\.block\.(\d)\.layer\.2\.": r".blocks.\1.ffn.",
    r"SelfAttention\.|EncDecAttention\.|DenseReluDense\.": "", "final_layer_norm": "final_norm",
    r"\.layer_norm": ".input_norm", "wi_0": "gate", "wi_1": "up", "wo": "down", r"^shared": "embed.token",
}  # fmt: skip
NAMES = {"bert_mlm": BERT, "roberta_mlm": BERT, "mbart": BART, "t5": T5}


def canonical(name: str, model: str) -> str:
    for pattern, new in NAMES[model].items():
        name = re.sub(pattern, new, name)
    return name


def stored(name: str, value: Tensor, model: str) -> Tensor:
    """A reference's tensor as megnorm's: no rows for positions that no token has."""
    offset = {"roberta_mlm": 2, "mbart": 2}.get(model, 0)
    return value[offset:] if name.endswith("position.weight") else value


def batch_of(found: dict[str, Tensor], model: str) -> tuple[Input, Tensor, Tensor]:
    """The micro-batch, and where rows are real (of logits)."""
    ids, labels = found["input/ids"].t(), found["input/targets"].t()
    plain = ids, labels, (labels != -100).double()
    if model in ("bert_mlm", "roberta_mlm"):
        real = found["input/attention_mask"].t() > 0
        segments = found["input/token_type_ids"].t() if model == "bert_mlm" else None
        return MaskedTokens(*plain, real=real, segments=segments), real, labels
    real = found["input/source_attention_mask"].t() > 0
    return Pairs(found["input/source_ids"].t(), real, *plain), torch.ones_like(ids, dtype=torch.bool), labels


@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_published_model(shared: Path, name: str) -> None:
    folder = shared / "golden" / "hf" / name
    found = load_file(folder / "golden.safetensors")
    weights = {canonical(old, name): value for old, value in load_file(folder / "model.safetensors").items()}
    model: Any = build_model(ModelConfig(**MODELS[name]), Env(dtype=torch.float64))
    # T5 does not divide scores by sqrt(head_dim): a larger q says the same.
    factor = {"q": 8**0.5} if name == "t5" else {}
    for n in named_matrices(model):
        n.view().copy_(stored(n.name, weights[n.name], name).double() * factor.get(n.matrix.role, 1.0))
    batch, real, labels = batch_of(found, name)
    logits = model.logits(batch)
    wanted = found["output/logits"].transpose(0, 1)
    assert (logits - wanted)[real].abs().max() <= 1e-10 * max(1.0, float(wanted.abs().max()))
    loss = model(batch) / (labels != -100).sum()
    assert abs(float(loss.detach()) - float(found["output/loss"])) <= 1e-10 * float(loss.detach())
    loss.backward()
    grads = {canonical(old.removeprefix("grad/"), name): g for old, g in found.items() if old.startswith("grad/")}
    everything = float(torch.stack([g.double().norm() for g in grads.values()]).norm())
    for n in named_matrices(model):
        wish = stored(n.name, grads[n.name], name).double() / factor.get(n.matrix.role, 1.0)
        error = float((n.view(n.param.grad) - wish).norm()) / max(float(wish.norm()), 1e-3 * everything)
        assert error <= 1e-6, (n.name, error)
