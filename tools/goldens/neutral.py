"""The neutral format: ``weight/<param>``, ``grad/<param>``, ``input/*``, ``output/*``, and a json with the config."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from goldens import placement
from goldens.case import NEUTRAL, Case, NotCovered, choose, field, take, with_defaults, with_ends
from megnorm.models.config import ModelConfig, MoEConfig
from megnorm.norms.config import NormConfig
from megnorm.norms.resolve import resolve, resolve_pair

ACTIVATIONS = {
    "gelu": "gelu", "gelu_tanh": "gelu_tanh", "relu": "relu", "relu_squared": "relu_squared", "silu": "silu",
    "swish": "silu", "swiglu": "swiglu", "geglu": "geglu", "geglu_tanh": "geglu_tanh", "reglu": "reglu",
}  # fmt: skip
KINDS_OF_MODEL = {"decoder-only": "causal", "encoder-only": "masked", "encoder-decoder": "encdec"}
KINDS = {"layernorm": "layernorm", "rmsnorm": "rmsnorm"}
PLACES = {"pre": "pre", "post": "post"}
POSITIONS = {"rotary": "rotary", "learned": "learned", "sinusoidal": "sinusoidal", "none": "none", "None": "none"}
MATRICES = {"query": "q", "key": "k", "value": "v", "output": "o", "up": "up", "gate": "gate", "down": "down"}
NORMS = {
    "query_norm": "q_norm", "key_norm": "k_norm", "value_norm": "v_norm", "context_norm": "context_norm",
    "output_norm": "output_norm",
}  # fmt: skip
OUTSIDE = {
    "embedding.token": "embed.token", "embedding.position": "embed.position", "embedding.norm": "embed.norm",
    "final_norm": "final_norm", "lm_head": "head",
}  # fmt: skip


# What goldens with experts do not say, being all alike: experts are down(silu(gate x) * (up x)), without biases.
SPARSE = {"norm_bias": False, "embedding_norm": False, "activation": "swiglu", "linear_bias": False}
ROUTER = "softmax over all experts in full precision, top-k probabilities used as they are (not renormalised)"


def case(data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Case:
    """A neutral golden. Raises NotCovered, or ValueError if it says something the format does not document."""
    config = data["config"]
    _refuse(config, tensors)
    family = choose(KINDS_OF_MODEL, config.get("kind", "decoder-only"), "kind")
    if "experts" in config:
        if not str(field(config, "router")).startswith(ROUTER):
            raise ValueError(f"config.router: '{config['router']}' is not documented; known is '{ROUTER}'")
        config = {**SPARSE, "ffn_hidden": field(config, "expert_ffn_hidden"), **config}
        tensors = dict(_by_expert(tensors))
    stack = {**config, **config.get("decoder", config.get("encoder", {}))}
    norm, own = _norm(stack)
    if family == "encdec":
        _check_encoder(config, stack, norm)
    defaults = {
        "kind": choose(KINDS, field(stack, "norm"), "norm"),
        "bias": bool(field(stack, "norm_bias")),
        "eps": field(stack, "norm_eps"),
    }
    norm = with_ends(norm, embedding=bool(field(stack, "embedding_norm")), final=bool(field(stack, "final_norm")))
    padding = tensors.get("input/padding_mask_true_means_pad")
    if family != "causal":
        tensors = {
            name: _longer(value) if name.endswith("position.weight") else value for name, value in tensors.items()
        }
    stored = [name.removeprefix("weight/") for name in tensors if name.startswith("weight/")]
    names = {name: canonical(name, own, family) for name in stored}
    if len(set(names.values())) < len(names):
        raise ValueError("two parameters of the golden have the same meaning")
    return Case(
        model=_model(stack, with_defaults(norm, **defaults), tensors, family),
        dtype=torch.float64,
        tokens=take(tensors, "input/ids"),
        labels=take(tensors, "input/targets"),
        weights={new: tensors[f"weight/{old}"] for old, new in names.items()},
        grads={new: take(tensors, f"grad/{old}") for old, new in names.items()},
        logits=take(tensors, "output/logits"),
        loss=float(take(tensors, "output/loss")),
        tolerance=NEUTRAL,
        logits_relative=True,
        table=tensors.get("constant/position_table"),
        source=take(tensors, "input/source_ids") if family == "encdec" else None,
        real=None if padding is None else padding == 0,
    )


def _longer(table: Tensor) -> Tensor:
    """A position table with rows for the padding that fills up an encoder's sequences for tensor parallelism.

    What enters the first layer there is zero, and so is the rows' gradient.
    """
    return F.pad(table, (0, 0, 0, -len(table) % 8))


def _refuse(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    if config.get("relative_bias") is not None and config.get("kind") != "encoder-only":
        raise NotCovered("relative position bias of a decoder that is bidirectional")


def _check_encoder(config: Mapping[str, Any], decoder: Mapping[str, Any], norm: NormConfig) -> None:
    """The encoder must have the decoder's sizes and placement, and the scheme both factors on the skip. Raises ValueError."""
    encoder = field(config, "encoder")
    for key in ("hidden", "heads", "ffn_hidden", "norm_placement_actually_used", "final_norm"):
        if field(encoder, key) != field(decoder, key):
            raise ValueError(f"config.encoder.{key} is {encoder[key]!r}, the decoder's {decoder[key]!r}")
    resolved = resolve_pair(norm, field(encoder, "layers"), field(decoder, "layers"))
    assert resolved.encoder is not None
    for side, layers in (("encoder", resolved.encoder.layers), ("decoder", resolved.layers)):
        ours, alpha = float(layers[0].attention.residual.skip.value), field(config, f"{side}_residual_alpha")  # type: ignore[arg-type]
        if not math.isclose(ours, alpha, rel_tol=1e-14):
            raise ValueError(f"config.{side}_residual_alpha is {alpha}, that of scheme {norm.scheme} {ours}")


def _by_expert(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors, with those [expert, out, in] as one for each expert."""
    for name, tensor in tensors.items():
        stem, found, role = name.partition(".experts.")
        if found:
            yield from ((f"{stem}.experts.{e}.{role}.weight", part) for e, part in enumerate(tensor))
        else:
            yield name, tensor


def _norm(stack: Mapping[str, Any]) -> tuple[NormConfig, str]:
    """The scheme, and which site the neutral name ``norm`` (the sub-layer's own) stands for."""
    if "placement_per_layer" in stack:
        return placement.norm_of(stack), "input_norm"
    if "norm_placement" in stack:
        place = choose(PLACES, stack["norm_placement"], "norm_placement")
        norm = _fairseq(stack, place)
    else:
        place = choose(PLACES, field(stack, "norm_placement_actually_used"), "norm_placement_actually_used")
        norm = _torchscale(stack, place)
    return norm, "input_norm" if place == "pre" else "post_norm"


def _fairseq(stack: Mapping[str, Any], place: str) -> NormConfig:
    flags = {name: bool(stack.get(name)) for name in ("scale_attn", "scale_fc", "scale_heads", "scale_resids")}
    if not any(flags.values()):
        return NormConfig(scheme="preln" if place == "pre" else "postln")
    options = {
        "head_scale": "post_projection" if flags["scale_heads"] else None,
        "attention_norm": flags["scale_attn"],
        "ffn_norm": flags["scale_fc"],
        "residual_scale": flags["scale_resids"],
        "placement": place,
    }
    return NormConfig(scheme="normformer", options=options)


def _torchscale(stack: Mapping[str, Any], place: str) -> NormConfig:
    alpha, layers = stack.get("residual_alpha"), field(stack, "layers")
    if stack.get("deepnorm"):
        norm = NormConfig(scheme="deepnorm", options={} if place == "post" else {"placement": place})
    elif stack.get("sub_ln"):
        if place != "pre":
            raise ValueError("config: sub_ln with post placement is not documented")
        norm = NormConfig(scheme="subln")
    else:
        norm = NormConfig(scheme="preln" if place == "pre" else "postln")
    if "encoder_residual_alpha" in stack:
        return norm
    alpha = 1.0 if alpha is None else float(alpha)
    residual = resolve(norm, layers).layers[0].attention.residual
    if math.isclose(float(residual.skip.value), alpha, rel_tol=1e-14):  # type: ignore[arg-type]
        return norm
    if norm.scheme == "deepnorm":
        return NormConfig(scheme="deepnorm", options={**norm.options, "skip": alpha})
    change = {"residual": {"skip": {"value": alpha}}}
    return NormConfig(scheme=norm.scheme, patch={"all_layers": {"attention": change, "ffn": change}})


def _model(stack: Mapping[str, Any], norm: NormConfig, tensors: Mapping[str, Tensor], family: str) -> ModelConfig:
    length = take(tensors, "input/ids").shape[1]
    prefix = "decoder." if family == "encdec" else ""
    own: dict[str, Any] = {}
    if family == "encdec":
        source = tensors.get("weight/encoder.embedding.position.weight")
        rows = take(tensors, "input/source_ids").shape[1] if source is None else source.shape[0]
        own = {"encoder_layers": stack["encoder"]["layers"], "max_source_positions": rows}
    if stack.get("relative_bias") is not None:
        bias = stack["relative_bias"]
        own = {"relative_buckets": field(bias, "buckets"), "relative_distance": field(bias, "max_distance")}
    if "experts" in stack:
        own["moe"] = MoEConfig(experts=stack["experts"], top_k=field(stack, "experts_per_token"))
    if not str(stack.get("rope_style", "half")).startswith("half"):
        raise ValueError(f"config.rope_style: '{stack['rope_style']}' is not documented; known is half-split")
    words = "rotary" if "rope_theta" in stack else str(field(stack, "positions")).split(",")[0]
    table = tensors.get(f"weight/{prefix}embedding.position.weight")
    scale = stack.get("embedding_scale", 1.0)
    tied = bool(field(stack, "tied_lm_head"))
    if tied == (f"weight/{prefix}lm_head.weight" in tensors):
        raise ValueError(f"config.tied_lm_head is {tied}, which 'weight/lm_head.weight' contradicts")
    return ModelConfig(
        family=family,  # type: ignore[arg-type]
        layers=field(stack, "layers"),
        width=field(stack, "hidden"),
        heads=field(stack, "heads"),
        kv_heads=stack.get("kv_heads", stack["heads"]),
        head_dim=stack.get("head_dim"),
        ffn=field(stack, "ffn_hidden"),
        vocab_size=field(stack, "vocab"),
        max_positions=length if table is None else table.shape[0],
        activation=choose(ACTIVATIONS, field(stack, "activation"), "activation"),  # type: ignore[arg-type]
        positions=choose(POSITIONS, words, "positions"),  # type: ignore[arg-type]
        rope_theta=float(stack.get("rope_theta", 10000.0)),
        padding_id=stack.get("padding_id"),
        embedding_scale="sqrt_width" if scale == "sqrt(hidden)" else float(scale),
        tied_head=tied,
        bias=bool(field(stack, "linear_bias")),
        head_bias=f"weight/{prefix}lm_head.bias" in tensors,
        norm=norm,
        **own,
    )


def canonical(name: str, own: str, family: str = "causal") -> str:
    """megnorm's name of a neutral parameter. own: what a sub-layer's ``norm`` is, "input_norm" or "post_norm"."""
    if family == "encdec":
        stack, _, rest = name.partition(".")
        if stack not in ("encoder", "decoder"):
            raise ValueError(f"the parameter '{name}' is not documented")
        inside = canonical(rest, own)
        return inside if inside.startswith("head.") else f"{stack}.{inside}"
    name = re.sub(r"\.gain$", ".weight", name.removeprefix("decoder."))
    if name == "attention.relative_bias.weight":
        return "relative.weight"
    outside, _, leaf = name.rpartition(".")
    if outside in OUTSIDE:
        return f"{OUTSIDE[outside]}.{leaf}"
    if sparse := re.fullmatch(r"block(\d+)\.(ffn\.(?:router|experts\.\d+\.(?:up|gate|down))\.weight)", name):
        return f"blocks.{sparse[1]}.{sparse[2]}"
    match = re.fullmatch(r"block(\d+)\.(attention|cross_attention|ffn)\.(\w+?)(\.weight|\.bias)?", name)
    if match is None:
        raise ValueError(f"the parameter '{name}' is not documented")
    layer, part, word, leaf = match.group(1), match.group(2), match.group(3), match.group(4) or ""
    inner = {"norm": own, "inner_norm": "context_norm" if part == "attention" else "inner_norm"}
    plain = {"head_scale": "head_scale", "residual_scale": "residual.skip"}
    new = {**MATRICES, **NORMS, **inner}.get(word) if leaf else plain.get(word)
    if new is None:
        raise ValueError(f"the parameter '{name}' is not documented")
    return f"blocks.{layer}.{part}.{new}{leaf}"
