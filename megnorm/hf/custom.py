"""The custom class: config and tensor names of the modeling file that is shipped with an export."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from megnorm.hf.families.rope import layer_types, longest, read_rope, read_window, rope_parameters
from megnorm.hf.fold import State, embedding_scale
from megnorm.models.config import AttentionConfig, ModelConfig
from megnorm.norms.config import NormConfig
from megnorm.norms.resolve import Resolved, from_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from megnorm.hf.modeling_megnorm import MegnormForCausalLM

ARCHITECTURE = "MegnormForCausalLM"
FILES = ("configuration_megnorm.py", "norms_megnorm.py", "attention_megnorm.py", "modeling_megnorm.py")
AUTO_MAP = {
    "AutoConfig": "configuration_megnorm.MegnormConfig",
    "AutoModel": "modeling_megnorm.MegnormModel",
    "AutoModelForCausalLM": "modeling_megnorm.MegnormForCausalLM",
}
HEAD = {"head.weight": "lm_head.weight", "head.bias": "lm_head.bias"}


def config(model: ModelConfig, resolved: Resolved) -> dict[str, Any]:
    """Fields of config.json."""
    return {
        "model_type": "megnorm",
        "vocab_size": model.vocab_size,
        "hidden_size": model.width,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv,
        "head_dim": model.hd,
        "intermediate_size": model.ffn,
        "max_position_embeddings": longest(model),
        "activation": model.activation,
        "positions": model.positions,
        "rope_parameters": rope_parameters(model),
        "position_padding_id": model.padding_id,
        "pad_token_id": model.padding_id,
        "embedding_scale": embedding_scale(model),
        "layer_types": layer_types(model),
        "sliding_window": model.attention.window,
        "attention_scale": model.attention.scale,
        "attn_logit_softcapping": model.attention.softcap,
        "logit_scale": model.logit_scale,
        "final_logit_softcapping": model.logit_softcap,
        "linear_bias": model.bias,
        "qkv_bias": model.biased_qkv,
        "o_bias": model.biased_o,
        "head_bias": model.head_bias,
        "dropout": model.dropout,
        "attention_dropout": model.attention_dropout,
        "parallel_block": model.parallel_block,
        "tie_word_embeddings": model.tied_head,
        "norm": resolved.to_json(),
        "norm_config": asdict(model.norm),
    }


def read_config(fields: Mapping[str, Any]) -> tuple[ModelConfig, Resolved]:
    """The inverse of ``config``."""
    norm = dict(fields.get("norm_config") or {"scheme": fields["norm"]["scheme"]})
    theta, scaling, local = read_rope(fields)
    norm["plugins"] = ()  # a folder from a stranger names no code to run; the numbers are in "norm"
    model = ModelConfig(
        layers=fields["num_hidden_layers"],
        width=fields["hidden_size"],
        heads=fields["num_attention_heads"],
        kv_heads=fields["num_key_value_heads"],
        head_dim=fields["head_dim"],
        ffn=fields["intermediate_size"],
        vocab_size=fields["vocab_size"],
        max_positions=fields["max_position_embeddings"],
        activation=fields["activation"],
        positions=fields["positions"],
        rope_theta=theta,
        rope_scaling=scaling,
        attention=AttentionConfig(
            scale=fields.get("attention_scale"),
            softcap=fields.get("attn_logit_softcapping"),
            **read_window(fields, local),
        ),
        padding_id=fields["position_padding_id"],
        embedding_scale=fields["embedding_scale"],
        tied_head=fields["tie_word_embeddings"],
        logit_scale=fields.get("logit_scale", 1.0),
        logit_softcap=fields.get("final_logit_softcapping"),
        bias=fields["linear_bias"],
        qkv_bias=_unless(fields.get("qkv_bias"), fields["linear_bias"]),
        o_bias=_unless(fields.get("o_bias"), fields["linear_bias"]),
        head_bias=fields["head_bias"],
        dropout=fields["dropout"],
        attention_dropout=fields["attention_dropout"],
        parallel_block=fields["parallel_block"],
        norm=NormConfig(**norm),
    )
    return model, from_json(fields["norm"])


def _unless(value: bool | None, usual: bool) -> bool | None:
    return None if value == usual else value


def rename(state: Mapping[str, "Tensor"]) -> State:
    return {HEAD.get(name, f"model.{name}"): tensor for name, tensor in state.items()}


def unrename(state: Mapping[str, "Tensor"]) -> State:
    back = {theirs: ours for ours, theirs in HEAD.items()}
    return {back.get(name, name.removeprefix("model.")): tensor for name, tensor in state.items()}


def shapes(model: ModelConfig, resolved: Resolved) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of every tensor that such a model has."""
    import torch

    with torch.device("meta"):
        empty = _make(model, resolved)
    found = {name: tuple(tensor.shape) for name, tensor in unrename(empty.state_dict()).items()}
    if model.tied_head:
        del found["head.weight"]
    return found


def check_state(state: Mapping[str, "Tensor"], model: ModelConfig, resolved: Resolved) -> None:
    """Raise ValueError naming the first tensor that is missing, unknown or of another shape."""
    if model.moe.experts:
        raise ValueError(
            "model.moe: no class for transformers holds experts; such models stay in their own checkpoints"
        )
    expected = shapes(model, resolved)
    for name, shape in expected.items():
        if name not in state:
            raise ValueError(f"the weights have no tensor '{name}', which the model config asks for")
        if tuple(state[name].shape) != shape:
            raise ValueError(f"tensor '{name}' is {tuple(state[name].shape)}; the model config asks for {shape}")
    unknown = sorted(set(state) - set(expected))
    if unknown:
        raise ValueError(f"the weights have a tensor '{unknown[0]}' that the model config does not know")


def build(
    state: Mapping[str, "Tensor"],
    model: ModelConfig,
    resolved: Resolved,
    *,
    dtype: "torch.dtype | None" = None,
    device: "str | torch.device" = "cpu",
) -> "MegnormForCausalLM":
    """The custom class in memory, in evaluation mode, from full logical tensors. Raises ValueError for misfits."""
    check_state(state, model, resolved)
    made: Any = _make(model, resolved)
    renamed = rename(state)
    if model.tied_head:
        renamed["lm_head.weight"] = renamed["model.embed.token.weight"]
    if dtype is not None:
        made = made.to(dtype)
    made.load_state_dict(renamed)
    made.to(device).eval()
    return cast("MegnormForCausalLM", made)


def _make(model: ModelConfig, resolved: Resolved) -> "MegnormForCausalLM":
    from megnorm.hf.configuration_megnorm import MegnormConfig
    from megnorm.hf.modeling_megnorm import MegnormForCausalLM

    fields = {name: value for name, value in config(model, resolved).items() if name != "model_type"}
    return MegnormForCausalLM(MegnormConfig(**fields))


def sources() -> list[Path]:
    """The Python files to put beside the weights."""
    return [Path(__file__).parent / name for name in FILES]
