"""T5, of either version: an encoder-decoder with an RMSNorm before each sub-layer and a relative position bias."""

from collections.abc import Collection, Mapping
from typing import Any

from megnorm.hf.families.base import ACTIVATIONS, Family, Pattern, activation, one_eps, wanted
from megnorm.hf.fold import State
from megnorm.models.config import GATED, AttentionConfig, ModelConfig
from megnorm.norms.config import NormConfig
from megnorm.norms.resolve import Resolved

WORDS = ACTIVATIONS | {gated: f"gated-{ACTIVATIONS[plain]}" for gated, plain in GATED.items() if plain != "gelu"}
"""Our activation -> feed_forward_proj. What it calls gated-gelu is gelu_tanh."""
QUERIES = (".attention.q.weight", ".cross_attention.q.weight")


def _names(gated: bool) -> dict[str, str]:
    found = {"embed.token": "shared", "head": "lm_head"}
    for stack in ("encoder", "decoder"):
        block = f"{stack}.block.{{i}}.layer"
        places = [("attention", "0", "SelfAttention"), ("ffn", "1", "DenseReluDense")]
        if stack == "decoder":
            places[1:] = [("cross_attention", "1", "EncDecAttention"), ("ffn", "2", "DenseReluDense")]
        for part, place, theirs in places:
            ours = f"{stack}.blocks.{{i}}.{part}"
            found[f"{ours}.input_norm"] = f"{block}.{place}.layer_norm"
            inside = {"up": "wi_1", "gate": "wi_0", "down": "wo"} if gated else {"up": "wi", "down": "wo"}
            for role, word in inside.items() if part == "ffn" else ((role, role) for role in "qkvo"):
                found[f"{ours}.{role}"] = f"{block}.{place}.{theirs}.{word}"
        found[f"{stack}.relative"] = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias"
        found[f"{stack}.final_norm"] = f"{stack}.final_layer_norm"
    return found


class T5(Family):
    """Its scores have no factor: ours goes into W_q. The factor d^-0.5 on the logits of T5's first version, whose head is
    the table of tokens, is read as ``logit_scale`` and written in the decoder's final norm."""

    architecture = "T5ForConditionalGeneration"
    family = "encdec"
    pattern = Pattern("rmsnorm", frozenset({"input"}), frozenset({"input"}))
    names: Mapping[str, str] = {}  # they depend on the activation

    def refuse(self, model: ModelConfig, resolved: Resolved) -> str | None:
        if model.positions != "none" or model.relative_buckets is None:
            return "positions, relative_buckets: the class has relative positions alone"
        if not model.shared_embedding:
            return "shared_embedding: the class has one table for both stacks"
        if model.bias or model.biased_qkv or model.biased_o:
            return "bias: the class has none"
        if model.activation not in WORDS:
            return f"activation: the class does not have '{model.activation}'"
        return "kv_heads: the class has as many as heads" if model.kv != model.heads else one_eps(resolved)

    def takes_scale(self, model: ModelConfig) -> bool:
        return True

    def config(self, model: ModelConfig, resolved: Resolved) -> dict[str, Any]:
        return {
            "model_type": self.name,
            "vocab_size": model.vocab_size,
            "d_model": model.width,
            "d_kv": model.hd,
            "d_ff": model.ffn,
            "num_layers": model.source_layers,
            "num_decoder_layers": model.layers,
            "num_heads": model.heads,
            "relative_attention_num_buckets": model.relative_buckets,
            "relative_attention_max_distance": model.relative_distance,
            "n_positions": model.max_positions,
            "dropout_rate": model.dropout,
            "layer_norm_epsilon": resolved.final.eps if resolved.final else None,
            "feed_forward_proj": WORDS[model.activation],
            "tie_word_embeddings": model.tied_head,
            "scale_decoder_outputs": False,
            "is_encoder_decoder": True,
        }

    def transform(self, state: State, model: ModelConfig) -> State:
        scale = model.hd**-0.5 if model.attention.scale is None else model.attention.scale
        return {name: tensor * scale if name.endswith(QUERIES) else tensor for name, tensor in state.items()}

    def told(self, config: Mapping[str, Any], names: Collection[str]) -> Mapping[str, Any]:
        """Whether the head is tied: later versions of transformers write so of every T5."""
        scaled = config.get("scale_decoder_outputs", config.get("tie_word_embeddings") is not False)
        return {**config, "tie_word_embeddings": "lm_head.weight" not in names, "scale_decoder_outputs": scaled}

    def read_config(self, config: Mapping[str, Any]) -> ModelConfig:
        wanted(config, is_decoder=False)
        first, _, act = config.get("feed_forward_proj", "relu").rpartition("-")
        gated, dropout = first == "gated", float(config.get("dropout_rate", 0.0))
        act = "gelu_new" if gated and act == "gelu" else act
        return ModelConfig(
            family="encdec",
            encoder_layers=config["num_layers"],
            layers=config.get("num_decoder_layers") or config["num_layers"],
            width=config["d_model"],
            heads=config["num_heads"],
            head_dim=config["d_kv"],
            ffn=config["d_ff"],
            vocab_size=config["vocab_size"],
            max_positions=config.get("n_positions", 512),
            activation=activation(act, gated=gated),  # type: ignore[arg-type]
            positions="none",
            attention=AttentionConfig(scale=1.0),
            relative_buckets=config["relative_attention_num_buckets"],
            relative_distance=config.get("relative_attention_max_distance", 128),
            shared_embedding=True,
            tied_head=config["tie_word_embeddings"],
            logit_scale=config["d_model"] ** -0.5 if config["scale_decoder_outputs"] else 1.0,
            dropout=dropout,
            attention_dropout=dropout,
            norm=NormConfig(kind="rmsnorm", eps=config.get("layer_norm_epsilon", 1e-6)),
        )

    def _table(self, model: ModelConfig) -> list[tuple[str, str]]:
        return self.table_of(_names(model.gated), model)
