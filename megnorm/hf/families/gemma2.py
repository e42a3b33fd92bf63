"""Gemma2 and Gemma3: norms on input and output of both sub-layers, gains stored minus one, embeddings times sqrt(width)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from megnorm.hf.families.base import Pattern, wanted
from megnorm.hf.families.llama import PROJECTIONS, QK, Llama
from megnorm.hf.families.rope import FULL, WINDOW
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
    windows = "each"
    softcaps = True
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
            "query_pre_attn_scalar": _scalar(model),
            "sliding_window": model.attention.window or model.max_positions,
            "attn_logit_softcapping": model.attention.softcap,
            "final_logit_softcapping": model.logit_softcap,
        }

    def takes_scale(self, model: ModelConfig) -> bool:
        """The class has 1 / sqrt(n) for a whole number n."""
        return model.attention.scale is None or abs(_scalar(model) ** -0.5 / model.attention.scale - 1.0) < 1e-12

    def transform(self, state: State, model: ModelConfig) -> State:
        state = {name: tensor - 1 if _is_gain(name) else tensor for name, tensor in state.items()}
        if not model.tied_head:
            state["embed.token.weight"] = state["embed.token.weight"] * (embedding_scale(model) / model.width**0.5)
        return state

    def read_config(self, config: Mapping[str, Any]) -> ModelConfig:
        model = super().read_config(config)
        n, cap = config["query_pre_attn_scalar"], config.get("attn_logit_softcapping")
        attention = replace(model.attention, scale=None if n == model.hd else n**-0.5, softcap=cap)
        return replace(
            model,
            attention=attention,
            logit_softcap=config.get("final_logit_softcapping"),
            embedding_scale="sqrt_width",
            tied_head=bool(config.get("tie_word_embeddings", True)),
            norm=replace(model.norm, gain="one_plus"),
        )


class Gemma3(Gemma2):
    name = "gemma3_text"
    architecture = "Gemma3ForCausalLM"
    pattern = Pattern(
        "rmsnorm",
        frozenset({"input", "output", "q", "k"}),
        frozenset({"input", "output"}),
        over={"q": "head", "k": "head"},
    )
    names = Gemma2.names | QK
    two_thetas = True
    patch: Mapping[str, Any] = {
        "layer": {"attention": {"output": {}, "q": {"over": "head"}, "k": {"over": "head"}}, "ffn": {"output": {}}}
    }

    def config(self, model: ModelConfig, resolved: Resolved) -> dict[str, Any]:
        fields = super().config(model, resolved)
        rope = fields["rope_parameters"]
        return fields | {"rope_parameters": rope if FULL in rope else {FULL: rope, WINDOW: rope}}

    def read_config(self, config: Mapping[str, Any]) -> ModelConfig:
        wanted(config, use_bidirectional_attention=False)
        return super().read_config(config)


def _scalar(model: ModelConfig) -> int:
    return model.hd if model.attention.scale is None else round(model.attention.scale**-2)


def _is_gain(name: str) -> bool:
    return name.endswith("norm.weight")
