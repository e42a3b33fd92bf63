"""Gemma2: norms on input and output of both sub-layers, gains stored minus one, embeddings times sqrt(width)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from megnorm.hf.families.base import Pattern, wanted
from megnorm.hf.families.llama import PROJECTIONS, Llama
from megnorm.hf.fold import State, embedding_scale
from megnorm.models.config import ModelConfig
from megnorm.norms.resolve import Resolved


class Gemma2(Llama):
    architecture = "Gemma2ForCausalLM"
    pattern = Pattern("rmsnorm", frozenset({"input", "output"}), frozenset({"input", "output"}))
    names = PROJECTIONS | {
        "blocks.{i}.attention.input_norm": "model.layers.{i}.input_layernorm",
        "blocks.{i}.attention.output_norm": "model.layers.{i}.post_attention_layernorm",
        "blocks.{i}.ffn.input_norm": "model.layers.{i}.pre_feedforward_layernorm",
        "blocks.{i}.ffn.output_norm": "model.layers.{i}.post_feedforward_layernorm",
    }
    biases = False
    cast: Literal["before_gain", "after_gain"] = "after_gain"
    patch: Mapping[str, Any] = {"layer": {"attention": {"output": {}}, "ffn": {"output": {}}}}
    activation_field = "hidden_activation"

    def refuse_sizes(self, model: ModelConfig) -> str | None:
        if model.tied_head and embedding_scale(model) != model.width**0.5:
            return "embedding_scale: the class has sqrt(width), and a tied head keeps another out of the embedding"
        if model.width % model.heads:
            return "heads: the class asks that they divide the width"
        return super().refuse_sizes(replace(model, embedding_scale=1.0))

    def config(self, model: ModelConfig, resolved: Resolved) -> dict[str, Any]:
        return super().config(model, resolved) | {
            "query_pre_attn_scalar": model.hd,
            "layer_types": ["full_attention"] * model.layers,
            "sliding_window": model.max_positions,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
        }

    def transform(self, state: State, model: ModelConfig) -> State:
        state = {name: tensor - 1 if _is_gain(name) else tensor for name, tensor in state.items()}
        if not model.tied_head:
            state["embed.token.weight"] = state["embed.token.weight"] * (embedding_scale(model) / model.width**0.5)
        return state

    def read_config(self, config: Mapping[str, Any]) -> ModelConfig:
        full = ["full_attention"] * config["num_hidden_layers"]
        wanted(config, layer_types=full, attn_logit_softcapping=None, final_logit_softcapping=None)
        wanted(config, query_pre_attn_scalar=config["head_dim"])
        model = super().read_config({**config, "sliding_window": None})
        norm = replace(model.norm, gain="one_plus")
        tied = bool(config.get("tie_word_embeddings", True))
        return replace(model, embedding_scale="sqrt_width", tied_head=tied, norm=norm)


def _is_gain(name: str) -> bool:
    return name.endswith("norm.weight")
