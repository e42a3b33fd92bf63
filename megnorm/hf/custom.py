"""The custom classes: config and tensor names of the modeling files that are shipped with an export."""

import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megnorm.hf.families.base import UNREAD, classes_of, label_fields
from megnorm.hf.families.rope import layer_types, longest, read_fraction, read_rope, read_window, rope_parameters
from megnorm.hf.fold import State, embedding_scale
from megnorm.models.config import AttentionConfig, ModelConfig, MoEConfig
from megnorm.norms.config import NormConfig
from megnorm.norms.resolve import Resolved, from_json, plain_norm

if TYPE_CHECKING:
    import torch
    from torch import Tensor

DECODER = ("configuration_megnorm.py", "norms_megnorm.py", "attention_megnorm.py", "ffn_megnorm.py", "layers_megnorm.py",
           "modeling_megnorm.py")  # fmt: skip
ENCODER = (*DECODER, "encoder_megnorm.py")
FILES = {"causal": DECODER, "masked": ENCODER, "classifier": ENCODER, "encdec": (*ENCODER, "seq2seq_megnorm.py")}
"""What is put beside the weights of a family; the last file has its classes."""
CLASSES = {
    "causal": ("AutoModelForCausalLM", "MegnormForCausalLM", "MegnormModel"),
    "masked": ("AutoModelForMaskedLM", "MegnormForMaskedLM", "MegnormEncoder"),
    "classifier": ("AutoModelForSequenceClassification", "MegnormForSequenceClassification", "MegnormEncoder"),
    "encdec": ("AutoModelForSeq2SeqLM", "MegnormForConditionalGeneration", "MegnormSeq2SeqModel"),
}
"""Family -> transformers' door, the class behind it, and that class without its head."""
HEADS = {"head": "lm_head", "transform": "transform", "pooler": "pooler", "classifier": "classifier"}
"""Modules that stand behind the base model: ours -> theirs."""
PLAIN = ("activation", "positions", "logit_scale", "head_bias", "dropout", "attention_dropout", "parallel_block",
         "parallel_norm", "segments",
         "relative_buckets", "relative_distance", "shared_embedding", "family", "vocab_size", "pooler")  # fmt: skip
"""Fields of ModelConfig that have the same name and value in config.json."""
RENAMED = {
    "num_hidden_layers": "layers",
    "hidden_size": "width",
    "num_attention_heads": "heads",
    "intermediate_size": "ffn",
    "position_padding_id": "padding_id",
    "final_logit_softcapping": "logit_softcap",
    "linear_bias": "bias",
    "tie_word_embeddings": "tied_head",
}
"""Name in config.json -> field of ModelConfig with the same value."""
LATER = {"family", "parallel_norm", "logit_scale", "final_logit_softcapping", "pooler", "segments", "relative_buckets",
         "relative_distance", "shared_embedding"}  # fmt: skip
"""Names in config.json that folders of earlier versions lack; their models are as by default."""


def config(model: ModelConfig, resolved: Resolved) -> dict[str, Any]:
    """Fields of config.json."""
    fields: dict[str, Any] = {"model_type": "megnorm"}
    fields |= {name: getattr(model, name) for name in PLAIN}
    fields |= {theirs: getattr(model, ours) for theirs, ours in RENAMED.items()}
    fields |= {
        "num_key_value_heads": model.kv,
        "head_dim": model.hd,
        "max_position_embeddings": longest(model),
        "max_source_positions": model.source_positions if model.family == "encdec" else None,
        "encoder_layers": model.source_layers,
        "pad_token_id": model.padding_id,
        "embedding_scale": embedding_scale(model),
        "layer_types": layer_types(model),
        "sliding_window": model.attention.window,
        "attention_scale": model.attention.scale,
        "attn_logit_softcapping": model.attention.softcap,
        "qkv_bias": model.biased_qkv,
        "o_bias": model.biased_o,
        "moe": asdict(model.moe) if model.moe.experts else None,
        "sparse_layers": [i for i in range(model.layers) if model.sparse(i)],
        "transform_norm": asdict(plain_norm(model.norm)) if model.head_transform else None,
        "norm": resolved.to_json(),
        "norm_config": asdict(model.norm),
    }
    if model.positions == "rotary":  # transformers looks for rotary positions wherever this field is
        fields["rope_parameters"] = rope_parameters(model)
    return fields | (label_fields(model.classes) if model.classes else {})


def read_config(fields: Mapping[str, Any]) -> tuple[ModelConfig, Resolved]:
    """The inverse of ``config``."""
    norm = dict(fields.get("norm_config") or {"scheme": fields["norm"]["scheme"]})
    theta, scaling, local = read_rope(fields, whole=False)
    norm["plugins"] = ()  # a folder from a stranger names no code to run; the numbers are in "norm"
    given = {name: fields[name] for name in PLAIN if name in fields or name not in LATER}
    given |= {ours: fields[theirs] for theirs, ours in RENAMED.items() if theirs in fields or theirs not in LATER}
    family, positions = fields.get("family", "causal"), fields["max_position_embeddings"]
    source = fields.get("max_source_positions")
    if family not in CLASSES:
        raise ValueError(f"config.json: family '{family}' is unknown; megnorm reads {', '.join(CLASSES)}")
    model = ModelConfig(
        **given,
        kv_heads=fields["num_key_value_heads"],
        head_dim=fields["head_dim"],
        max_positions=positions,
        max_source_positions=None if source == positions else source,
        encoder_layers=fields["encoder_layers"] if family == "encdec" else None,
        rope_theta=theta,
        rope_scaling=scaling,
        rope_fraction=read_fraction(fields),
        attention=AttentionConfig(
            scale=fields.get("attention_scale"),
            softcap=fields.get("attn_logit_softcapping"),
            **read_window(fields, local),
        ),
        embedding_scale=fields["embedding_scale"],
        qkv_bias=_unless(fields.get("qkv_bias"), fields["linear_bias"]),
        o_bias=_unless(fields.get("o_bias"), fields["linear_bias"]),
        moe=MoEConfig(**(fields.get("moe") or {})),
        head_transform=fields.get("transform_norm") is not None,
        classes=classes_of(fields) if family == "classifier" else 0,
        norm=NormConfig(**norm),
    )
    if model.head_transform and fields["transform_norm"] != asdict(plain_norm(model.norm)):
        raise ValueError("config.json: transform_norm is not what norm_config says; export the model again")
    return model, from_json(fields["norm"])


def _unless(value: bool | None, usual: bool) -> bool | None:
    return None if value == usual else value


def _tables(model: ModelConfig) -> dict[str, str]:
    """Of an encoder-decoder: our name of a token table that both stacks, or one and the head, use -> theirs."""
    if model.family != "encdec" or not (model.shared_embedding or model.tied_head):
        return {}
    return {"embed.token.weight": f"{'encoder' if model.shared_embedding else 'decoder'}.embed.token.weight"}


def rename(state: Mapping[str, "Tensor"], model: ModelConfig) -> State:
    tables, made = _tables(model), {}
    for name, tensor in state.items():
        if name == UNREAD:
            continue
        first, _, rest = name.partition(".")
        made[f"{HEADS[first]}.{rest}" if first in HEADS else f"model.{tables.get(name, name)}"] = tensor
    return made


def unrename(state: Mapping[str, "Tensor"], model: ModelConfig) -> State:
    tables, made = {theirs: ours for ours, theirs in _tables(model).items()}, {}
    heads = {theirs: ours for ours, theirs in HEADS.items()}
    for name, tensor in state.items():
        first, _, rest = name.partition(".")
        made[f"{heads[first]}.{rest}" if first in heads else tables.get(rest, rest)] = tensor
    return made


def shapes(model: ModelConfig, resolved: Resolved) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of every tensor that such a model has."""
    import torch

    with torch.device("meta"):
        empty = make(model, resolved)
    found = {name: tuple(tensor.shape) for name, tensor in unrename(empty.state_dict(), model).items()}
    if model.tied_head:
        del found["head.weight"]
    return found


def problem(model: ModelConfig) -> str | None:
    """Why no class for transformers holds such a model; None if one does."""
    if model.moe.experts and model.moe.capacity is not None:
        return (
            f"model.moe.capacity={model.moe.capacity}: which tokens an expert leaves out depends on the whole sequence, which "
            "nobody has who generates; finish the training with model.moe.capacity=null and export that"
        )
    scaling, other = model.rope_scaling, model.source_positions != model.max_positions
    if model.family == "encdec" and scaling.kind not in ("none", "linear") and scaling.original is None and other:
        return "model.rope_scaling.original is not set, and encoder and decoder differ in length; set it to export the model"
    return None


def check_state(state: Mapping[str, "Tensor"], model: ModelConfig, resolved: Resolved) -> None:
    """Raise ValueError for a model that cannot be exported, and for the first tensor that is missing, unknown or of
    another shape."""
    refused = problem(model)
    if refused is not None:
        raise ValueError(refused)
    expected = shapes(model, resolved)
    if UNREAD in state and model.padding_id is not None:
        expected[UNREAD] = (model.padding_id + 1, model.width)
    for name, shape in expected.items():
        if name not in state:
            raise ValueError(f"the weights have no tensor '{name}', which the model config asks for")
        if tuple(state[name].shape) != shape:
            raise ValueError(f"tensor '{name}' is {tuple(state[name].shape)}; the model config asks for {shape}")
    unknown = sorted(set(state) - set(expected))
    if unknown:
        raise ValueError(f"the weights have a tensor '{unknown[0]}' that the model config does not know")


def build(
    state: Mapping[str, "Tensor"],
    model: ModelConfig,
    resolved: Resolved,
    *,
    dtype: "torch.dtype | None" = None,
    device: "str | torch.device" = "cpu",
) -> Any:
    """The custom class in memory, in evaluation mode, from full logical tensors. Raises ValueError for misfits."""
    check_state(state, model, resolved)
    made = make(model, resolved)
    renamed = rename(state, model)
    if model.tied_head:
        renamed["lm_head.weight"] = renamed[made._tied_weights_keys["lm_head.weight"]]
    if dtype is not None:
        made = made.to(dtype)
    made.load_state_dict(renamed)
    return made.to(device).eval()


def make(model: ModelConfig, resolved: Resolved) -> Any:
    """The class of a model's family, with new weights."""
    import importlib

    from megnorm.hf.configuration_megnorm import MegnormConfig

    fields = {name: value for name, value in config(model, resolved).items() if name != "model_type"}
    module = importlib.import_module(f"megnorm.hf.{_module(model.family)}")
    return getattr(module, CLASSES[model.family][1])(MegnormConfig(**fields))


def architecture(family: str) -> str:
    return CLASSES[family][1]


def auto_map(family: str) -> dict[str, str]:
    """The classes of a folder by transformers' doors."""
    door, whole, base = CLASSES[family]
    module = _module(family)
    return {
        "AutoConfig": "configuration_megnorm.MegnormConfig",
        "AutoModel": f"{module}.{base}",
        door: f"{module}.{whole}",
    }


def _module(family: str) -> str:
    return FILES[family][-1].removesuffix(".py")


def sources(family: str) -> list[Path]:
    """The Python files to put beside the weights."""
    return [Path(__file__).parent / name for name in FILES[family]]


def door(architecture: str) -> str:
    """The class of transformers through which a model of some architecture is loaded."""
    ends = {
        r"ForMaskedLM$": "masked",
        r"ForSequenceClassification$": "classifier",
        r"ForConditionalGeneration$": "encdec",
    }
    found = (family for end, family in ends.items() if re.search(end, architecture))
    return CLASSES[next(found, "causal")][0]
