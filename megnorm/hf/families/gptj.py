"""GPT-J: attention and feed-forward side by side behind one LayerNorm, rotary positions that turn neighbouring features."""

from collections.abc import Mapping
from typing import Any

from megnorm.hf.families.base import Pattern, activation, one_eps
from megnorm.hf.families.gpt2 import GPT2, with_norm_biases
from megnorm.hf.families.neox import in_order
from megnorm.hf.fold import State
from megnorm.models.config import GATED, ModelConfig
from megnorm.norms.config import NormConfig
from megnorm.norms.resolve import Resolved

THETA = 10000.0
"""Of its rotary positions; the config has no field for it."""


class GPTJ(GPT2):
    """Of a head's features it turns the first ones, 2j with 2j + 1. Biases on the feed-forward and the head alone."""

    name = "gptj"
    architecture = "GPTJForCausalLM"
    pattern = Pattern("layernorm", frozenset({"input"}))
    partial_rotary = True
    side_by_side = True
    one_norm = True
    biased_head = True
    names: Mapping[str, str] = {
        "embed.token": "transformer.wte",
        "blocks.{i}.attention.input_norm": "transformer.h.{i}.ln_1",
        "blocks.{i}.attention.q": "transformer.h.{i}.attn.q_proj",
        "blocks.{i}.attention.k": "transformer.h.{i}.attn.k_proj",
        "blocks.{i}.attention.v": "transformer.h.{i}.attn.v_proj",
        "blocks.{i}.attention.o": "transformer.h.{i}.attn.out_proj",
        "blocks.{i}.ffn.up": "transformer.h.{i}.mlp.fc_in",
        "blocks.{i}.ffn.down": "transformer.h.{i}.mlp.fc_out",
        "final_norm": "transformer.ln_f",
        "head": "lm_head",
    }

    def refuse(self, model: ModelConfig, resolved: Resolved) -> str | None:
        if model.positions != "rotary" or model.rope_theta != THETA or model.rope_scaling.kind != "none":
            return f"positions: the class has rotary ones with theta {THETA:.0f}, not scaled"
        if not model.bias or model.biased_qkv or model.biased_o:
            return "bias: the class has them in the feed-forward, not in attention"
        if model.activation in GATED:
            return f"activation: the class has no gate, the model is '{model.activation}'"
        if model.kv != model.heads or model.hd * model.heads != model.width:
            return "heads: the class has as many key/value heads, of width / heads"
        return one_eps(resolved)

    def config(self, model: ModelConfig, resolved: Resolved) -> dict[str, Any]:
        return super().config(model, resolved) | {"rotary_dim": model.rotary_dim}

    def transform(self, state: State, model: ModelConfig) -> State:
        made = in_order(with_norm_biases(state), model, theirs=True, neighbours=True)
        return {"head.bias": made["embed.token.weight"].new_zeros(model.vocab_size)} | made

    def restore(self, state: State, model: ModelConfig) -> State:
        return in_order(state, model, theirs=False, neighbours=True)

    def read_config(self, config: Mapping[str, Any]) -> ModelConfig:
        hd = config["n_embd"] // config["n_head"]
        return ModelConfig(
            layers=config["n_layer"],
            width=config["n_embd"],
            heads=config["n_head"],
            ffn=config.get("n_inner") or 4 * config["n_embd"],
            vocab_size=config["vocab_size"],
            max_positions=config["n_positions"],
            activation=activation(config["activation_function"], gated=False),  # type: ignore[arg-type]
            rope_theta=THETA,
            rope_fraction=config["rotary_dim"] / hd,
            parallel_block=True,
            parallel_norm="one",
            tied_head=bool(config.get("tie_word_embeddings", False)),
            bias=True,
            qkv_bias=False,
            o_bias=False,
            head_bias=True,
            dropout=float(config.get("resid_pdrop", 0.0)),
            attention_dropout=float(config.get("attn_pdrop", 0.0)),
            norm=NormConfig(kind="layernorm", eps=config["layer_norm_epsilon"]),
        )
