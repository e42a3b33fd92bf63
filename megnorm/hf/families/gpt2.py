"""GPT-2: Pre-LN, learned positions, biases everywhere; matrices stored [in, out], q, k and v in one. And GPTBigCode."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from megnorm.hf.families.base import ACTIVATIONS, Family, Pattern, activation, one_eps, wanted
from megnorm.hf.fold import State
from megnorm.models.config import GATED, ModelConfig
from megnorm.norms.config import NormConfig
from megnorm.norms.resolve import Resolved


class GPT2(Family):
    name = "gpt2"
    architecture = "GPT2LMHeadModel"
    pattern = Pattern("layernorm", frozenset({"input"}), frozenset({"input"}))
    names: Mapping[str, str] = {
        "embed.token": "transformer.wte",
        "embed.position": "transformer.wpe",
        "blocks.{i}.attention.input_norm": "transformer.h.{i}.ln_1",
        "blocks.{i}.attention.qkv": "transformer.h.{i}.attn.c_attn",
        "blocks.{i}.attention.o": "transformer.h.{i}.attn.c_proj",
        "blocks.{i}.ffn.input_norm": "transformer.h.{i}.ln_2",
        "blocks.{i}.ffn.up": "transformer.h.{i}.mlp.c_fc",
        "blocks.{i}.ffn.down": "transformer.h.{i}.mlp.c_proj",
        "final_norm": "transformer.ln_f",
        "head": "lm_head",
    }

    def refuse(self, model: ModelConfig, resolved: Resolved) -> str | None:
        return refuse_plain(model) or one_eps(resolved)

    def config(self, model: ModelConfig, resolved: Resolved) -> dict[str, Any]:
        return {
            "model_type": self.name,
            "vocab_size": model.vocab_size,
            "n_embd": model.width,
            "n_inner": model.ffn,
            "n_layer": model.layers,
            "n_head": model.heads,
            "n_positions": model.max_positions,
            "activation_function": ACTIVATIONS[model.activation],
            "layer_norm_epsilon": resolved.final.eps if resolved.final else None,
            "embd_pdrop": model.dropout,
            "resid_pdrop": model.dropout,
            "attn_pdrop": model.attention_dropout,
            "tie_word_embeddings": model.tied_head,
        }

    def transform(self, state: State, model: ModelConfig) -> State:
        return _turned(fused_qkv(with_norm_biases(state), joined))

    def restore(self, state: State, model: ModelConfig) -> State:
        return split_qkv(_turned(state), lambda tensor: tensor.chunk(3))

    def read_config(self, config: Mapping[str, Any]) -> ModelConfig:
        wanted(
            config, add_cross_attention=False, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False
        )  # fmt: skip
        return ModelConfig(
            layers=config["n_layer"],
            width=config["n_embd"],
            heads=config["n_head"],
            ffn=config.get("n_inner") or 4 * config["n_embd"],
            vocab_size=config["vocab_size"],
            max_positions=config["n_positions"],
            activation=activation(config["activation_function"], gated=False),  # type: ignore[arg-type]
            positions="learned",
            tied_head=bool(config.get("tie_word_embeddings", True)),
            bias=True,
            dropout=float(config.get("resid_pdrop", 0.0)),
            attention_dropout=float(config.get("attn_pdrop", 0.0)),
            norm=NormConfig(kind="layernorm", eps=config["layer_norm_epsilon"]),
        )


class GPTBigCode(GPT2):
    """GPT-2 with one key/value head, matrices stored [out, in]."""

    name = "gpt_bigcode"
    architecture = "GPTBigCodeForCausalLM"

    def refuse(self, model: ModelConfig, resolved: Resolved) -> str | None:
        return refuse_plain(model, kv=1) or one_eps(resolved)

    def config(self, model: ModelConfig, resolved: Resolved) -> dict[str, Any]:
        return super().config(model, resolved) | {"multi_query": True}

    def transform(self, state: State, model: ModelConfig) -> State:
        return fused_qkv(with_norm_biases(state), joined)

    def restore(self, state: State, model: ModelConfig) -> State:
        rows = [model.width, model.hd, model.hd]
        return split_qkv(state, lambda tensor: tensor.split(rows))

    def read_config(self, config: Mapping[str, Any]) -> ModelConfig:
        return replace(super().read_config(config), kv_heads=1 if config.get("multi_query", True) else None)


def refuse_plain(model: ModelConfig, kv: int | None = None) -> str | None:
    """What GPT-2 and OPT ask for alike. kv: key/value heads; None: heads."""
    if model.positions != "learned":
        return f"positions: the class has learned ones, the model {model.positions}"
    return refuse_shape(model, kv)


def refuse_shape(model: ModelConfig, kv: int | None = None) -> str | None:
    """Biases everywhere, no gate, and heads that make up the width."""
    if model.activation in GATED:
        return f"activation: the class has no gate, the model is '{model.activation}'"
    if not (model.bias and model.biased_qkv and model.biased_o):
        return "bias: the class has one on every linear layer"
    if model.kv != (kv or model.heads):
        return f"kv_heads: the class has {kv or 'as many as heads'}"
    return None if model.hd * model.heads == model.width else "heads: the class has heads of width / heads"


def fused_qkv(state: State, join: Callable[[list[Any]], Any]) -> State:
    """q, k and v of each kind (weight, bias) joined as ``qkv``."""
    made: State = {}
    for name, tensor in state.items():
        path, _, kind = name.rpartition(".")
        block, _, matrix = path.rpartition(".")
        if matrix == "q":
            made[f"{block}.qkv.{kind}"] = join([state[f"{block}.{part}.{kind}"] for part in "qkv"])
        elif matrix not in ("k", "v"):
            made[name] = tensor
    return made


def split_qkv(state: State, cut: Callable[[Any], Any]) -> State:
    """The inverse of ``fused_qkv``."""
    made: State = {}
    for name, tensor in state.items():
        path, _, kind = name.rpartition(".")
        if path.endswith(".qkv"):
            parts = zip("qkv", cut(tensor), strict=True)
            made |= {f"{path.removesuffix('qkv')}{part}.{kind}": piece.contiguous() for part, piece in parts}
        else:
            made[name] = tensor
    return made


def with_norm_biases(state: State) -> State:
    """LayerNorms without a bias get one of zeros, as the class has it."""
    made = dict(state)
    for name, tensor in state.items():
        if name.endswith("norm.weight"):
            made.setdefault(f"{name.removesuffix('weight')}bias", tensor.new_zeros(tensor.shape))
    return made


def joined(parts: list[Any]) -> Any:
    import torch

    return torch.cat(parts)


def _turned(state: State) -> State:
    """Matrices of linear layers the other way round, [in, out]."""
    inside = ("qkv.weight", ".o.weight", ".up.weight", ".down.weight")
    return {name: tensor.t().contiguous() if name.endswith(inside) else tensor for name, tensor in state.items()}


class FusedByHead(Family):
    """Classes with one matrix for q, k and v whose rows lie by head: its q, its k, its v."""

    def transform(self, state: State, model: ModelConfig) -> State:
        def by_head(parts: list[Any]) -> Any:
            heads = [part.unflatten(0, (model.heads, 1, model.hd)) for part in parts]
            return joined([part.transpose(0, 1) for part in heads]).transpose(0, 1).flatten(0, 2).contiguous()

        return fused_qkv(with_norm_biases(state), by_head)

    def restore(self, state: State, model: ModelConfig) -> State:
        def by_part(tensor: Any) -> Any:
            return [part.flatten(0, 1) for part in tensor.unflatten(0, (model.heads, 3, model.hd)).unbind(1)]

        return split_qkv(state, by_part)
