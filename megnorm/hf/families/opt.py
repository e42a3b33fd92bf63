"""OPT: Post-LN or Pre-LN with learned positions; a constant skip under a post norm is folded into W_o and W_down."""

from collections.abc import Mapping
from typing import Any

from megnorm.hf.families.base import ACTIVATIONS, Family, Pattern, activation, norms, wanted
from megnorm.hf.families.gpt2 import refuse_plain, with_norm_biases
from megnorm.hf.fold import State, fold_skip
from megnorm.models.config import ModelConfig
from megnorm.norms.config import NormConfig
from megnorm.norms.resolve import Resolved

EPS = 1e-5
"""OPT's LayerNorms have PyTorch's eps; the config has no field for it."""
OFFSET = 2
"""Rows before the first token's in OPT's position table."""


POST: Mapping[str, Any] = {
    "layer": {"attention": {"input": None, "post": {}}, "ffn": {"input": None, "post": {}}},
    "final": None,
}
"""From norms before each sub-layer to norms after the add."""


class OPTPostLN(Family):
    architecture = "OPTForCausalLM"
    site = "post"
    pattern = Pattern("layernorm", frozenset({"post"}), frozenset({"post"}), final=False)

    @property
    def names(self) -> Mapping[str, str]:  # type: ignore[override]
        return {
            "embed.token": "model.decoder.embed_tokens",
            "embed.position": "model.decoder.embed_positions",
            "blocks.{i}.attention.q": "model.decoder.layers.{i}.self_attn.q_proj",
            "blocks.{i}.attention.k": "model.decoder.layers.{i}.self_attn.k_proj",
            "blocks.{i}.attention.v": "model.decoder.layers.{i}.self_attn.v_proj",
            "blocks.{i}.attention.o": "model.decoder.layers.{i}.self_attn.out_proj",
            f"blocks.{{i}}.attention.{self.site}_norm": "model.decoder.layers.{i}.self_attn_layer_norm",
            "blocks.{i}.ffn.up": "model.decoder.layers.{i}.fc1",
            "blocks.{i}.ffn.down": "model.decoder.layers.{i}.fc2",
            f"blocks.{{i}}.ffn.{self.site}_norm": "model.decoder.layers.{i}.final_layer_norm",
            "final_norm": "model.decoder.final_layer_norm",
            "head": "lm_head",
        }

    def prepare(self, resolved: Resolved, state: State) -> tuple[Resolved, State]:
        return fold_skip(resolved, state)

    def refuse(self, model: ModelConfig, resolved: Resolved) -> str | None:
        for name, norm in norms(resolved):
            if norm.eps is None or abs(norm.eps - EPS) > 1e-9 * EPS:
                return f"{name}: the class has eps {EPS}, the model {norm.eps:.3g} (after folding a constant skip)"
        return refuse_plain(model)

    def config(self, model: ModelConfig, resolved: Resolved) -> dict[str, Any]:
        return {
            "model_type": self.name,
            "vocab_size": model.vocab_size,
            "hidden_size": model.width,
            "word_embed_proj_dim": model.width,
            "ffn_dim": model.ffn,
            "num_hidden_layers": model.layers,
            "num_attention_heads": model.heads,
            "max_position_embeddings": model.max_positions,
            "activation_function": ACTIVATIONS[model.activation],
            "do_layer_norm_before": self.site == "input",
            "dropout": model.dropout,
            "attention_dropout": model.attention_dropout,
            "enable_bias": True,
            "tie_word_embeddings": model.tied_head,
        }

    def transform(self, state: State, model: ModelConfig) -> State:
        import torch

        made = with_norm_biases(state)
        table = made["embed.position.weight"]
        made["embed.position.weight"] = torch.cat([table.new_zeros(OFFSET, table.shape[1]), table])
        return made

    def restore(self, state: State, model: ModelConfig) -> State:
        return state | {"embed.position.weight": state["embed.position.weight"][OFFSET:].contiguous()}

    def read_config(self, config: Mapping[str, Any]) -> ModelConfig:
        wanted(config, enable_bias=True, layer_norm_elementwise_affine=True, _remove_final_layer_norm=False)
        wanted(config, word_embed_proj_dim=config["hidden_size"])
        before = bool(config.get("do_layer_norm_before", True))
        return ModelConfig(
            layers=config["num_hidden_layers"],
            width=config["hidden_size"],
            heads=config["num_attention_heads"],
            ffn=config["ffn_dim"],
            vocab_size=config["vocab_size"],
            max_positions=config["max_position_embeddings"],
            activation=activation(config.get("activation_function", "relu"), gated=False),  # type: ignore[arg-type]
            positions="learned",
            tied_head=bool(config.get("tie_word_embeddings", True)),
            bias=True,
            dropout=float(config.get("dropout", 0.0)),
            attention_dropout=float(config.get("attention_dropout", 0.0)),
            norm=NormConfig(patch={} if before else POST, kind="layernorm", eps=EPS),
        )


class OPTPreLN(OPTPostLN):
    site = "input"
    pattern = Pattern("layernorm", frozenset({"input"}), frozenset({"input"}))
