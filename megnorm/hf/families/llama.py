"""Llama: Pre-RMSNorm, rotary positions, gated feed-forward. And its relatives, with windows, other biases, q and k norms."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from megnorm.hf.families.base import ACTIVATIONS, Family, Pattern, Windows, activation, one_eps, wanted
from megnorm.hf.families.rope import layer_types, longest, read_rope, read_window, rope_parameters
from megnorm.models.config import GATED, AttentionConfig, ModelConfig
from megnorm.norms.config import NormConfig
from megnorm.norms.resolve import Resolved

PROJECTIONS = {
    "embed.token": "model.embed_tokens",
    "blocks.{i}.attention.q": "model.layers.{i}.self_attn.q_proj",
    "blocks.{i}.attention.k": "model.layers.{i}.self_attn.k_proj",
    "blocks.{i}.attention.v": "model.layers.{i}.self_attn.v_proj",
    "blocks.{i}.attention.o": "model.layers.{i}.self_attn.o_proj",
    "blocks.{i}.ffn.up": "model.layers.{i}.mlp.up_proj",
    "blocks.{i}.ffn.gate": "model.layers.{i}.mlp.gate_proj",
    "blocks.{i}.ffn.down": "model.layers.{i}.mlp.down_proj",
    "final_norm": "model.norm",
    "head": "lm_head",
}
PRE = {
    "blocks.{i}.attention.input_norm": "model.layers.{i}.input_layernorm",
    "blocks.{i}.ffn.input_norm": "model.layers.{i}.post_attention_layernorm",
}
QK = {
    "blocks.{i}.attention.q_norm": "model.layers.{i}.self_attn.q_norm",
    "blocks.{i}.attention.k_norm": "model.layers.{i}.self_attn.k_norm",
}


class Llama(Family):
    architecture = "LlamaForCausalLM"
    pattern = Pattern("rmsnorm", frozenset({"input"}), frozenset({"input"}))
    names: Mapping[str, str] = PROJECTIONS | PRE
    biases = True  # on all of attention and, apart, on the feed-forward
    cast: Literal["before_gain", "after_gain"] = "before_gain"
    patch: Mapping[str, Any] = {}
    activation_field = "hidden_act"

    def refuse(self, model: ModelConfig, resolved: Resolved) -> str | None:
        if model.positions != "rotary":
            return f"positions: the class has rotary ones, the model {model.positions}"
        if model.activation not in GATED:
            return f"activation: the class has a gated feed-forward, the model '{model.activation}'"
        return self.refuse_biases(model) or one_eps(resolved)

    def refuse_biases(self, model: ModelConfig) -> str | None:
        if not self.biases and (model.bias or model.biased_qkv or model.biased_o):
            return "bias: the class has none on linear layers"
        return (
            None
            if model.biased_qkv == model.biased_o
            else "o_bias: the class has biases on all of attention or on none"
        )

    def config(self, model: ModelConfig, resolved: Resolved) -> dict[str, Any]:
        return {
            "model_type": self.name,
            "vocab_size": model.vocab_size,
            "hidden_size": model.width,
            "intermediate_size": model.ffn,
            "num_hidden_layers": model.layers,
            "num_attention_heads": model.heads,
            "num_key_value_heads": model.kv,
            "head_dim": model.hd,
            self.activation_field: ACTIVATIONS[GATED[model.activation]],
            "max_position_embeddings": longest(model),
            "rms_norm_eps": resolved.final.eps if resolved.final else None,
            "rope_parameters": rope_parameters(model),
            "attention_bias": model.biased_o,
            "attention_dropout": model.attention_dropout,
            "tie_word_embeddings": model.tied_head,
            **({"mlp_bias": model.bias} if self.biases else {}),
            **self.window(model),
        }

    def window(self, model: ModelConfig) -> dict[str, Any]:
        """Fields of the window, for classes that have one."""
        if self.windows == "none":
            return {}
        own = {"layer_types": layer_types(model)} if self.windows == "each" else {}
        return {"sliding_window": model.attention.window, **own}

    def read_config(self, config: Mapping[str, Any]) -> ModelConfig:
        attention, bias = bool(config.get("attention_bias", False)), bool(config.get("mlp_bias", False))
        if not self.biases:
            wanted(config, attention_bias=False)
        theta, scaling, local = read_rope(config)
        window = read_window(config, local)
        if window and self.windows == "none":
            raise ValueError("config.json: sliding_window is set, and the class has no window; remove it")
        usual = config["hidden_size"] // config["num_attention_heads"]
        return ModelConfig(
            layers=config["num_hidden_layers"],
            width=config["hidden_size"],
            heads=config["num_attention_heads"],
            kv_heads=config.get("num_key_value_heads"),
            head_dim=None if config.get("head_dim") == usual else config.get("head_dim"),
            ffn=config["intermediate_size"],
            vocab_size=config["vocab_size"],
            max_positions=config["max_position_embeddings"],
            activation=activation(config[self.activation_field], gated=True),  # type: ignore[arg-type]
            positions="rotary",
            rope_theta=theta,
            rope_scaling=scaling,
            attention=AttentionConfig(**window),
            tied_head=bool(config.get("tie_word_embeddings", False)),
            bias=bias,
            qkv_bias=None if attention == bias else attention,
            o_bias=None if attention == bias else attention,
            attention_dropout=config.get("attention_dropout") or 0.0,
            norm=NormConfig(patch=self.patch, kind="rmsnorm", eps=config["rms_norm_eps"], cast=self.cast),
        )


class Mistral(Llama):
    architecture = "MistralForCausalLM"
    biases = False
    windows: Windows = "all"


class Ministral(Mistral):
    architecture = "MinistralForCausalLM"
    windows = "each"


class Qwen2(Llama):
    architecture = "Qwen2ForCausalLM"
    biases = False
    windows = "each"

    def refuse_biases(self, model: ModelConfig) -> str | None:
        fitting = model.biased_qkv and not model.biased_o and not model.bias
        return None if fitting else "bias: the class has them on q, k, v and nowhere else"

    def window(self, model: ModelConfig) -> dict[str, Any]:
        return super().window(model) | {"use_sliding_window": model.attention.window is not None}

    def config(self, model: ModelConfig, resolved: Resolved) -> dict[str, Any]:
        fields = super().config(model, resolved)
        del fields["attention_bias"]
        return fields

    def read_config(self, config: Mapping[str, Any]) -> ModelConfig:
        return replace(super().read_config(config), qkv_bias=True)


class Qwen3(Llama):
    architecture = "Qwen3ForCausalLM"
    pattern = Pattern("rmsnorm", frozenset({"input", "q", "k"}), frozenset({"input"}), over={"q": "head", "k": "head"})
    names = PROJECTIONS | PRE | QK
    biases = False
    windows = "each"
    patch: Mapping[str, Any] = {"layer": {"attention": {"q": {"over": "head"}, "k": {"over": "head"}}}}

    def window(self, model: ModelConfig) -> dict[str, Any]:
        return super().window(model) | {"use_sliding_window": model.attention.window is not None}
