"""BERT and RoBERTa: encoders with a norm after each add, for masked language models and for classes."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megnorm.hf.families.base import (
    ACTIVATIONS,
    UNREAD,
    Family,
    Pattern,
    activation,
    classes_of,
    label_fields,
    one_eps,
    wanted,
)
from megnorm.hf.families.gpt2 import refuse_plain, with_norm_biases
from megnorm.hf.families.opt import POST
from megnorm.hf.fold import State
from megnorm.models.config import ModelConfig
from megnorm.norms.config import NormConfig
from megnorm.norms.resolve import Resolved, plain_norm


def _encoder(root: str) -> dict[str, str]:
    layer = f"{root}.encoder.layer.{{i}}"
    return {
        "embed.token": f"{root}.embeddings.word_embeddings",
        "embed.position": f"{root}.embeddings.position_embeddings",
        "embed.segment": f"{root}.embeddings.token_type_embeddings",
        "embed.norm": f"{root}.embeddings.LayerNorm",
        "blocks.{i}.attention.q": f"{layer}.attention.self.query",
        "blocks.{i}.attention.k": f"{layer}.attention.self.key",
        "blocks.{i}.attention.v": f"{layer}.attention.self.value",
        "blocks.{i}.attention.o": f"{layer}.attention.output.dense",
        "blocks.{i}.attention.post_norm": f"{layer}.attention.output.LayerNorm",
        "blocks.{i}.ffn.up": f"{layer}.intermediate.dense",
        "blocks.{i}.ffn.down": f"{layer}.output.dense",
        "blocks.{i}.ffn.post_norm": f"{layer}.output.LayerNorm",
    }


class BertMasked(Family):
    """Also the base of the others. padded: it finds padding by its token, and gives it no position."""

    name = "bert"
    architecture = "BertForMaskedLM"
    family = "masked"
    pattern = Pattern("layernorm", frozenset({"post"}), frozenset({"post"}), embedding=True, final=False)
    names: Mapping[str, str] = _encoder("bert") | {
        "transform.dense": "cls.predictions.transform.dense",
        "transform.norm": "cls.predictions.transform.LayerNorm",
        "head": "cls.predictions",
    }
    padded = False

    def refuse_sizes(self, model: ModelConfig) -> str | None:
        if self.padded != (model.padding_id is not None):
            return f"padding_id: the class {'finds' if self.padded else 'does not find'} padding by its token"
        return super().refuse_sizes(replace(model, head_bias=False, padding_id=None))

    def refuse(self, model: ModelConfig, resolved: Resolved) -> str | None:
        if model.relative_buckets is not None:
            return "relative_buckets: the class has no such bias"
        return refuse_plain(model) or one_eps(resolved) or self.refuse_head(model, resolved)

    def refuse_head(self, model: ModelConfig, resolved: Resolved) -> str | None:
        if self.family == "classifier":
            return None if model.pooler else "pooler: the class has one"
        if not (model.head_transform and model.head_bias and model.tied_head):
            return "head_transform, head_bias, tied_head: the class has them all"
        norm, eps = plain_norm(model.norm), resolved.embedding.eps if resolved.embedding else None
        if (norm.kind, norm.gain, norm.eps) != ("layernorm", "vector", eps):
            return "norm: the norm before the class's head is a LayerNorm like the others"
        if self.padded and model.activation != "gelu":
            return "activation: the class has gelu before its head"
        return None

    def config(self, model: ModelConfig, resolved: Resolved) -> dict[str, Any]:
        fields: dict[str, Any] = {
            "model_type": self.name,
            "vocab_size": model.vocab_size,
            "hidden_size": model.width,
            "num_hidden_layers": model.layers,
            "num_attention_heads": model.heads,
            "intermediate_size": model.ffn,
            "hidden_act": ACTIVATIONS[model.activation],
            "hidden_dropout_prob": model.dropout,
            "attention_probs_dropout_prob": model.attention_dropout,
            "max_position_embeddings": model.max_positions + _offset(model),
            "type_vocab_size": max(1, model.segments),
            "layer_norm_eps": resolved.embedding.eps if resolved.embedding else None,
            "tie_word_embeddings": True,
        }
        if self.family == "classifier":
            fields |= label_fields(model.classes)
        return fields

    def transform(self, state: State, model: ModelConfig) -> State:
        import torch

        made = with_norm_biases(state)
        table = made["embed.position.weight"]
        unread = made.pop(UNREAD, table.new_zeros(_offset(model), model.width))
        made["embed.position.weight"] = torch.cat([unread, table])
        if not model.segments:
            made["embed.segment.weight"] = table.new_zeros(1, model.width)
        return made

    def restore(self, state: State, model: ModelConfig) -> State:
        unread, table = state["embed.position.weight"].tensor_split([_offset(model)])
        made = state | {"embed.position.weight": table.contiguous()}
        return made | {UNREAD: unread.contiguous()} if unread.any() else made

    def read_config(self, config: Mapping[str, Any]) -> ModelConfig:
        wanted(config, is_decoder=False, add_cross_attention=False, position_embedding_type="absolute")
        padding = config["pad_token_id"] if self.padded else None
        head: dict[str, Any] = {"classes": classes_of(config)}
        if self.family == "masked":
            wanted(config, tie_word_embeddings=True)
            head = {"tied_head": True, "head_bias": True, "head_transform": True}
        model = ModelConfig(
            family=self.family,  # type: ignore[arg-type]
            layers=config["num_hidden_layers"],
            width=config["hidden_size"],
            heads=config["num_attention_heads"],
            ffn=config["intermediate_size"],
            vocab_size=config["vocab_size"],
            max_positions=config["max_position_embeddings"],
            activation=activation(config["hidden_act"], gated=False),  # type: ignore[arg-type]
            positions="learned",
            padding_id=padding,
            bias=True,
            segments=config["type_vocab_size"],
            dropout=config["hidden_dropout_prob"],
            attention_dropout=config["attention_probs_dropout_prob"],
            norm=NormConfig(patch={**POST, "embedding": {}}, kind="layernorm", eps=config["layer_norm_eps"]),
            **head,
        )
        return replace(model, max_positions=model.max_positions - _offset(model))


def _offset(model: ModelConfig) -> int:
    """Rows before the first token's in the position table."""
    return 0 if model.padding_id is None else model.padding_id + 1


class BertClasses(BertMasked):
    architecture = "BertForSequenceClassification"
    family = "classifier"
    names: Mapping[str, str] = _encoder("bert") | {"pooler": "bert.pooler.dense", "classifier": "classifier"}


class RobertaMasked(BertMasked):
    name = "roberta"
    architecture = "RobertaForMaskedLM"
    names: Mapping[str, str] = _encoder("roberta") | {
        "transform.dense": "lm_head.dense",
        "transform.norm": "lm_head.layer_norm",
        "head": "lm_head",
    }
    padded = True


class RobertaClasses(RobertaMasked):
    architecture = "RobertaForSequenceClassification"
    family = "classifier"
    names: Mapping[str, str] = _encoder("roberta") | {"pooler": "classifier.dense", "classifier": "classifier.out_proj"}
