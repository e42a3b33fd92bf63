"""GPT-NeoX and Pythia: LayerNorm before both branches, side by side or in turn, rotary positions on part of a head."""

from collections.abc import Mapping
from typing import Any

from megnorm.hf.families.base import ACTIVATIONS, Pattern, activation, one_eps
from megnorm.hf.families.gpt2 import FusedByHead, refuse_shape
from megnorm.hf.families.rope import longest, read_fraction, read_rope, rope_parameters
from megnorm.hf.fold import State
from megnorm.models.config import ModelConfig
from megnorm.norms.config import NormConfig
from megnorm.norms.resolve import Resolved


class GPTNeoX(FusedByHead):
    """Of a head's features it turns the first ones, in halves of their own."""

    name = "gpt_neox"
    architecture = "GPTNeoXForCausalLM"
    pattern = Pattern("layernorm", frozenset({"input"}), frozenset({"input"}))
    partial_rotary = True
    side_by_side = True
    names: Mapping[str, str] = {
        "embed.token": "gpt_neox.embed_in",
        "blocks.{i}.attention.input_norm": "gpt_neox.layers.{i}.input_layernorm",
        "blocks.{i}.attention.qkv": "gpt_neox.layers.{i}.attention.query_key_value",
        "blocks.{i}.attention.o": "gpt_neox.layers.{i}.attention.dense",
        "blocks.{i}.ffn.input_norm": "gpt_neox.layers.{i}.post_attention_layernorm",
        "blocks.{i}.ffn.up": "gpt_neox.layers.{i}.mlp.dense_h_to_4h",
        "blocks.{i}.ffn.down": "gpt_neox.layers.{i}.mlp.dense_4h_to_h",
        "final_norm": "gpt_neox.final_layer_norm",
        "head": "lm_head",
    }

    def refuse(self, model: ModelConfig, resolved: Resolved) -> str | None:
        if model.positions != "rotary":
            return f"positions: the class has rotary ones, the model {model.positions}"
        return refuse_shape(model) or one_eps(resolved)

    def config(self, model: ModelConfig, resolved: Resolved) -> dict[str, Any]:
        return {
            "model_type": self.name,
            "vocab_size": model.vocab_size,
            "hidden_size": model.width,
            "num_hidden_layers": model.layers,
            "num_attention_heads": model.heads,
            "intermediate_size": model.ffn,
            "max_position_embeddings": longest(model),
            "hidden_act": ACTIVATIONS[model.activation],
            "layer_norm_eps": resolved.final.eps if resolved.final else None,
            "rope_parameters": rope_parameters(model)
            | {"partial_rotary_factor": model.rope_fraction},  # the class's own is 0.25
            "use_parallel_residual": model.parallel_block,
            "hidden_dropout": model.dropout,
            "attention_dropout": model.attention_dropout,
            "tie_word_embeddings": model.tied_head,
        }

    def transform(self, state: State, model: ModelConfig) -> State:
        return super().transform(in_order(state, model, theirs=True), model)

    def restore(self, state: State, model: ModelConfig) -> State:
        return in_order(super().restore(state, model), model, theirs=False)

    def read_config(self, config: Mapping[str, Any]) -> ModelConfig:
        known = {"rope_theta": config.get("rotary_emb_base", 10000.0), **config}
        theta, scaling, _ = read_rope(known, whole=False)
        return ModelConfig(
            layers=config["num_hidden_layers"],
            width=config["hidden_size"],
            heads=config["num_attention_heads"],
            ffn=config["intermediate_size"],
            vocab_size=config["vocab_size"],
            max_positions=config["max_position_embeddings"],
            activation=activation(config["hidden_act"], gated=False),  # type: ignore[arg-type]
            rope_theta=theta,
            rope_scaling=scaling,
            rope_fraction=read_fraction(config, config.get("rotary_pct", 0.25)),
            parallel_block=bool(config.get("use_parallel_residual", True)),
            tied_head=bool(config.get("tie_word_embeddings", False)),
            bias=True,
            qkv_bias=bool(config.get("attention_bias", True)),
            o_bias=bool(config.get("attention_bias", True)),
            dropout=float(config.get("hidden_dropout", 0.0)),
            attention_dropout=float(config.get("attention_dropout", 0.0)),
            norm=NormConfig(kind="layernorm", eps=config["layer_norm_eps"]),
        )


def in_order(state: State, model: ModelConfig, *, theirs: bool, neighbours: bool = False) -> State:
    """Rows of q and k by head in their order or in megnorm's, which turns feature j with j + hd/2.

    The class turns j with j + r/2 of the first r features, or ``neighbours`` 2j and 2j + 1; scores do not depend on the order.
    """
    import torch

    half, turned = model.hd // 2, model.rotary_dim // 2
    rest = list(range(2 * turned, model.hd))
    first, second = range(turned), range(turned, 2 * turned)
    if neighbours:
        first, second = range(0, 2 * turned, 2), range(1, 2 * turned, 2)
    ours = [*first, *rest[: half - turned], *second, *rest[half - turned :]]
    order = torch.tensor(ours)  # place in megnorm's head -> place in theirs
    order = order.argsort() if theirs else order
    made = dict(state)
    for name, tensor in state.items():
        if name.rpartition(".")[0].endswith((".attention.q", ".attention.k")):
            made[name] = tensor.unflatten(0, (-1, model.hd))[:, order].flatten(0, 1)
    return made
