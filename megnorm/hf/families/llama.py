"""Llama: Pre-RMSNorm, rotary positions, gated feed-forward. And its relatives with q and k norms: Qwen3."""

from collections.abc import Mapping
from typing import Any, Literal

from megnorm.hf.families.base import ACTIVATIONS, Family, Pattern, activation, one_eps, rope_theta, wanted
from megnorm.models.config import GATED, ModelConfig
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
    biases = True
    cast: Literal["before_gain", "after_gain"] = "before_gain"
    patch: Mapping[str, Any] = {}
    activation_field = "hidden_act"

    def refuse(self, model: ModelConfig, resolved: Resolved) -> str | None:
        if model.positions != "rotary":
            return f"positions: the class has rotary ones, the model {model.positions}"
        if model.activation not in GATED:
            return f"activation: the class has a gated feed-forward, the model '{model.activation}'"
        if model.bias and not self.biases:
            return "bias: the class has none on linear layers"
        return one_eps(resolved)

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
            "max_position_embeddings": model.max_positions,
            "rms_norm_eps": resolved.final.eps if resolved.final else None,
            "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
            "attention_bias": model.bias,
            "attention_dropout": model.attention_dropout,
            "tie_word_embeddings": model.tied_head,
            **({"mlp_bias": model.bias} if self.biases else {}),
        }

    def read_config(self, config: Mapping[str, Any]) -> ModelConfig:
        bias = bool(config.get("attention_bias", False))
        if self.biases:
            wanted(config, mlp_bias=bias)
        else:
            wanted(config, attention_bias=False)
        wanted(config, sliding_window=None, use_sliding_window=False)
        return ModelConfig(
            layers=config["num_hidden_layers"],
            width=config["hidden_size"],
            heads=config["num_attention_heads"],
            kv_heads=config.get("num_key_value_heads"),
            head_dim=config.get("head_dim"),
            ffn=config["intermediate_size"],
            vocab_size=config["vocab_size"],
            max_positions=config["max_position_embeddings"],
            activation=activation(config[self.activation_field], gated=True),  # type: ignore[arg-type]
            positions="rotary",
            rope_theta=rope_theta(config),
            tied_head=bool(config.get("tie_word_embeddings", False)),
            bias=bias,
            attention_dropout=config.get("attention_dropout") or 0.0,
            norm=NormConfig(patch=self.patch, kind="rmsnorm", eps=config["rms_norm_eps"], cast=self.cast),
        )


class Qwen3(Llama):
    architecture = "Qwen3ForCausalLM"
    pattern = Pattern("rmsnorm", frozenset({"input", "q", "k"}), frozenset({"input"}), over={"q": "head", "k": "head"})
    names = PROJECTIONS | PRE | QK
    biases = False
    patch: Mapping[str, Any] = {"layer": {"attention": {"q": {"over": "head"}, "k": {"over": "head"}}}}

    def config(self, model: ModelConfig, resolved: Resolved) -> dict[str, Any]:
        return super().config(model, resolved) | {
            "use_sliding_window": False,
            "sliding_window": None,
            "layer_types": ["full_attention"] * model.layers,
        }
