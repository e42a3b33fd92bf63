"""BART and mBART: encoder-decoders with learned positions and a norm on the embedding; Post-LN, and Pre-LN with final norms."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megnorm.hf.families.base import ACTIVATIONS, Pattern, activation, wanted
from megnorm.hf.families.gpt2 import refuse_plain, with_norm_biases
from megnorm.hf.families.opt import EPS, OFFSET, POST, OPTPostLN
from megnorm.hf.fold import State
from megnorm.models.config import ModelConfig
from megnorm.norms.config import NormConfig
from megnorm.norms.resolve import Resolved

PARTS = {"attention": "self_attn", "cross_attention": "encoder_attn"}
ROLES = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}
SIZES = ("attention_heads", "ffn_dim")


class Bart(OPTPostLN):
    """As in OPT, eps has no field, rows stand before the first position's, and a constant skip is folded."""

    architecture = "BartForConditionalGeneration"
    family = "encdec"
    site = "post"
    pattern = Pattern("layernorm", frozenset({"post"}), frozenset({"post"}), embedding=True, final=False)

    @property
    def names(self) -> Mapping[str, str]:  # type: ignore[override]
        found = {"embed.token": "model.shared", "head": "lm_head"}
        for stack in ("encoder", "decoder"):
            theirs, layer = f"model.{stack}", f"model.{stack}.layers.{{i}}"
            found[f"{stack}.embed.position"] = f"{theirs}.embed_positions"
            found[f"{stack}.embed.norm"] = f"{theirs}.layernorm_embedding"
            found[f"{stack}.final_norm"] = f"{theirs}.layer_norm"
            ours = f"{stack}.blocks.{{i}}"
            for part, word in PARTS.items() if stack == "decoder" else [("attention", "self_attn")]:
                found[f"{ours}.{part}.{self.site}_norm"] = f"{layer}.{word}_layer_norm"
                found |= {f"{ours}.{part}.{role}": f"{layer}.{word}.{name}" for role, name in ROLES.items()}
            found |= {f"{ours}.ffn.up": f"{layer}.fc1", f"{ours}.ffn.down": f"{layer}.fc2"}
            found[f"{ours}.ffn.{self.site}_norm"] = f"{layer}.final_layer_norm"
        return found

    def refuse_sizes(self, model: ModelConfig) -> str | None:
        """The table of tokens may have the factor sqrt(d)."""
        plain = replace(model, embedding_scale=1.0) if _root(model) else model
        return super().refuse_sizes(plain)

    def refuse(self, model: ModelConfig, resolved: Resolved) -> str | None:
        if model.relative_buckets is not None:
            return "relative_buckets: the class has no such bias"
        if not (model.shared_embedding and model.tied_head):
            return "shared_embedding, tied_head: the class has one table for both stacks and the head"
        if model.source_positions != model.max_positions:
            return "max_source_positions: both stacks of the class are of one length"
        return refuse_plain(model) or super().refuse(model, resolved)

    def config(self, model: ModelConfig, resolved: Resolved) -> dict[str, Any]:
        fields: dict[str, Any] = {
            "model_type": self.name,
            "vocab_size": model.vocab_size,
            "d_model": model.width,
            "encoder_layers": model.source_layers,
            "decoder_layers": model.layers,
            "max_position_embeddings": model.max_positions,
            "activation_function": ACTIVATIONS[model.activation],
            "scale_embedding": _root(model),
            "dropout": model.dropout,
            "attention_dropout": model.attention_dropout,
            "activation_dropout": 0.0,
            "is_encoder_decoder": True,
            "forced_eos_token_id": None,
            "tie_word_embeddings": True,
        }
        for size, value in zip(SIZES, (model.heads, model.ffn), strict=True):
            fields |= {f"encoder_{size}": value, f"decoder_{size}": value}
        return fields

    def transform(self, state: State, model: ModelConfig) -> State:
        import torch

        made = with_norm_biases(state)
        for name in [name for name in made if name.endswith("embed.position.weight")]:
            table = made[name]
            made[name] = torch.cat([table.new_zeros(OFFSET, table.shape[1]), table])
        return made

    def restore(self, state: State, model: ModelConfig) -> State:
        return {
            name: tensor[OFFSET:].contiguous() if name.endswith("embed.position.weight") else tensor
            for name, tensor in state.items()
        }

    def read_config(self, config: Mapping[str, Any]) -> ModelConfig:
        wanted(config, is_decoder=False, tie_word_embeddings=True)
        for size in SIZES:
            wanted(config, **{f"decoder_{size}": config[f"encoder_{size}"]})
        norm = NormConfig(patch={**(POST if self.site == "post" else {}), "embedding": {}}, kind="layernorm", eps=EPS)
        return ModelConfig(
            family="encdec",
            encoder_layers=config["encoder_layers"],
            layers=config["decoder_layers"],
            width=config["d_model"],
            heads=config["encoder_attention_heads"],
            ffn=config["encoder_ffn_dim"],
            vocab_size=config["vocab_size"],
            max_positions=config["max_position_embeddings"],
            activation=activation(config.get("activation_function", "gelu"), gated=False),  # type: ignore[arg-type]
            positions="learned",
            embedding_scale="sqrt_width" if config.get("scale_embedding", False) else 1.0,
            shared_embedding=True,
            tied_head=True,
            bias=True,
            dropout=float(config.get("dropout", 0.0)),
            attention_dropout=float(config.get("attention_dropout", 0.0)),
            norm=norm,
        )


def _root(model: ModelConfig) -> bool:
    return model.embedding_scale in ("sqrt_width", model.width**0.5)


class MBart(Bart):
    architecture = "MBartForConditionalGeneration"
    site = "input"
    pattern = Pattern("layernorm", frozenset({"input"}), frozenset({"input"}), embedding=True)
