"""Classes with linear biases instead of positions: BLOOM (biases, a norm on the embedding) and MPT (no bias anywhere)."""

from collections.abc import Mapping
from typing import Any

from megnorm.hf.families.base import Family, Pattern, norms, one_eps, wanted
from megnorm.hf.families.gpt2 import FusedByHead, fused_qkv, joined, refuse_shape, split_qkv
from megnorm.hf.fold import State
from megnorm.models.config import AttentionConfig, ModelConfig
from megnorm.norms.config import NormConfig
from megnorm.norms.resolve import Resolved


def _refuse_sizes(model: ModelConfig, activation: str) -> str | None:
    if model.positions != "alibi":
        return f"positions: the class has alibi, the model {model.positions}"
    if model.activation != activation:
        return f"activation: the class has {activation}, the model '{model.activation}'"
    return None if model.ffn == 4 * model.width else "ffn: the class has four times the width"


class Bloom(FusedByHead):
    architecture = "BloomForCausalLM"
    pattern = Pattern("layernorm", frozenset({"input"}), frozenset({"input"}), embedding=True)
    names: Mapping[str, str] = {
        "embed.token": "transformer.word_embeddings",
        "embed.norm": "transformer.word_embeddings_layernorm",
        "blocks.{i}.attention.input_norm": "transformer.h.{i}.input_layernorm",
        "blocks.{i}.attention.qkv": "transformer.h.{i}.self_attention.query_key_value",
        "blocks.{i}.attention.o": "transformer.h.{i}.self_attention.dense",
        "blocks.{i}.ffn.input_norm": "transformer.h.{i}.post_attention_layernorm",
        "blocks.{i}.ffn.up": "transformer.h.{i}.mlp.dense_h_to_4h",
        "blocks.{i}.ffn.down": "transformer.h.{i}.mlp.dense_4h_to_h",
        "final_norm": "transformer.ln_f",
        "head": "lm_head",
    }

    def refuse(self, model: ModelConfig, resolved: Resolved) -> str | None:
        return _refuse_sizes(model, "gelu_tanh") or refuse_shape(model) or one_eps(resolved)

    def config(self, model: ModelConfig, resolved: Resolved) -> dict[str, Any]:
        return {
            "model_type": self.name,
            "vocab_size": model.vocab_size,
            "hidden_size": model.width,
            "n_layer": model.layers,
            "n_head": model.heads,
            "seq_length": model.max_positions,
            "layer_norm_epsilon": resolved.final.eps if resolved.final else None,
            "hidden_dropout": model.dropout,
            "attention_dropout": model.attention_dropout,
            "tie_word_embeddings": model.tied_head,
        }

    def read_config(self, config: Mapping[str, Any]) -> ModelConfig:
        wanted(config, apply_residual_connection_post_layernorm=False)
        width = config.get("hidden_size", config.get("n_embed"))
        return ModelConfig(
            layers=config["n_layer"],
            width=width,
            heads=config["n_head"],
            ffn=4 * width,
            vocab_size=config["vocab_size"],
            max_positions=config.get("seq_length", 2048),
            activation="gelu_tanh",
            positions="alibi",
            tied_head=bool(config.get("tie_word_embeddings", True)),
            bias=True,
            dropout=float(config.get("hidden_dropout", 0.0)),
            attention_dropout=float(config.get("attention_dropout", 0.0)),
            norm=NormConfig(options={"embedding_norm": True}, kind="layernorm", eps=config["layer_norm_epsilon"]),
        )


class Mpt(Family):
    architecture = "MptForCausalLM"
    pattern = Pattern("layernorm", frozenset({"input"}), frozenset({"input"}))
    names: Mapping[str, str] = {
        "embed.token": "transformer.wte",
        "blocks.{i}.attention.input_norm": "transformer.blocks.{i}.norm_1",
        "blocks.{i}.attention.qkv": "transformer.blocks.{i}.attn.Wqkv",
        "blocks.{i}.attention.o": "transformer.blocks.{i}.attn.out_proj",
        "blocks.{i}.ffn.input_norm": "transformer.blocks.{i}.norm_2",
        "blocks.{i}.ffn.up": "transformer.blocks.{i}.ffn.up_proj",
        "blocks.{i}.ffn.down": "transformer.blocks.{i}.ffn.down_proj",
        "final_norm": "transformer.norm_f",
        "head": "lm_head",
    }

    def refuse(self, model: ModelConfig, resolved: Resolved) -> str | None:
        if model.bias or model.biased_qkv or model.biased_o or any(norm.bias for _, norm in norms(resolved)):
            return "bias: the class has none on linear layers and norms"
        if model.kv != model.heads or model.hd * model.heads != model.width:
            return "heads: the class has as many key/value heads, of width / heads"
        if model.dropout or model.attention_dropout:
            return "dropout: the class asks for whole numbers; set it to 0"
        return _refuse_sizes(model, "gelu") or one_eps(resolved)

    def config(self, model: ModelConfig, resolved: Resolved) -> dict[str, Any]:
        return {
            "model_type": self.name,
            "vocab_size": model.vocab_size,
            "d_model": model.width,
            "n_layers": model.layers,
            "n_heads": model.heads,
            "expansion_ratio": 4,
            "max_seq_len": model.max_positions,
            "layer_norm_epsilon": resolved.final.eps if resolved.final else None,
            "attn_config": {"alibi": True, "alibi_bias_max": 8, "softmax_scale": model.attention.scale},
            "no_bias": True,
            "tie_word_embeddings": model.tied_head,
        }

    def takes_scale(self, model: ModelConfig) -> bool:
        return True

    def transform(self, state: State, model: ModelConfig) -> State:
        return fused_qkv(state, joined)

    def restore(self, state: State, model: ModelConfig) -> State:
        return split_qkv(state, lambda tensor: tensor.chunk(3))

    def read_config(self, config: Mapping[str, Any]) -> ModelConfig:
        scores = config.get("attn_config") or {}
        wanted(config, no_bias=True, logit_scale=None, expansion_ratio=4)
        wanted(scores, alibi=True, alibi_bias_max=8, qk_ln=False, clip_qkv=None, prefix_lm=False, attn_pdrop=0)
        scale = scores.get("softmax_scale")
        return ModelConfig(
            layers=config["n_layers"],
            width=config["d_model"],
            heads=config["n_heads"],
            ffn=4 * config["d_model"],
            vocab_size=config["vocab_size"],
            max_positions=config["max_seq_len"],
            activation="gelu",
            positions="alibi",
            attention=AttentionConfig(scale=scale),
            tied_head=bool(config.get("tie_word_embeddings", True)),
            norm=NormConfig(kind="layernorm", bias=False, eps=config.get("layer_norm_epsilon", 1e-5)),
        )
