"""Llama forms of the frontier format: the schemes of the Mix-LN, LayerNorm-Scaling and GPAS repositories."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from goldens.case import NotCovered, choose, field, take, with_defaults, with_ends
from goldens.renaming import Renamed
from megnorm.models.config import ModelConfig
from megnorm.norms.config import NormConfig
from megnorm.norms.resolve import resolve

# "scale_" is about initialization only; "lns" without a kept factor is an initial gain on Pre-LN.
TYPES = {
    "pre": "pre", "scale_pre": "pre", "post": "post", "post_pre": "post_pre", "scale_post_pre": "post_pre",
    "sandwich": "sandwich", "deeppost": "deeppost", "scale_res_pre_norm": "scale_res", "lns": "pre",
}  # fmt: skip
PRE = {"input_layernorm": "attention.input_norm", "post_attention_layernorm": "ffn.input_norm"}
POST = {"post_attention_layernorm": "attention.post_norm", "post_feedforward_layernorm": "ffn.post_norm"}
SANDWICH = {
    "input_layernorm": "attention.input_norm", "post_attention_layernorm": "attention.output_norm",
    "pre_feedforward_layernorm": "ffn.input_norm", "post_feedforward_layernorm": "ffn.output_norm",
}  # fmt: skip
MATRICES = {
    "self_attn.q_proj": "attention.q", "self_attn.k_proj": "attention.k", "self_attn.v_proj": "attention.v",
    "self_attn.o_proj": "attention.o", "mlp.up_proj": "ffn.up", "mlp.gate_proj": "ffn.gate",
    "mlp.down_proj": "ffn.down",
}  # fmt: skip
OUTSIDE = {"model.embed_tokens": "embed.token", "model.norm": "final_norm", "lm_head": "head"}
STACKED = ("_gpas", "_prores")
FACTORS = {"raw_scaling_factor_attn": "attention.residual.branch", "raw_scaling_factor_mlp": "ffn.residual.branch"}


def kind_of(data: Mapping[str, Any]) -> str:
    """pre, post, post_pre, sandwich, deeppost, scale_res or lns."""
    if "branch_input_scale" in data:
        formula = str(data["branch_input_scale"]).split(",")[0].strip()
        if formula != "1/sqrt(i+1)":
            raise ValueError(f"branch_input_scale: '{formula}' is not a documented formula; known is 1/sqrt(i+1)")
        return "lns"
    words = str(data["norm_type"]).lower()
    return choose(TYPES, words.rpartition("_")[0] if words.endswith(STACKED) else words, "norm_type")


def _stacked(data: Mapping[str, Any], kind: str, layers: int) -> NormConfig:
    """GPAS or ProRes on the scheme that would be without it."""
    word = str(data["norm_type"]).lower().rpartition("_")[2]
    host = norm_of({**data, "norm_type": str(data["norm_type"])[: -len(word) - 1]})
    options: dict[str, Any] = {"host": host.scheme}
    if word == "prores":
        options["steps"] = _steps(data)
    norm = NormConfig(scheme=word, options=options)
    found, wanted = (
        [
            (layer.attention.residual.skip, layer.ffn.residual.skip, layer.ffn.post)
            for layer in resolve(one, layers).layers
        ]
        for one in (norm, host)
    )
    if found != wanted:
        raise NotCovered(f"{word} on '{kind}' with options of its own")
    return norm


def _steps(data: Mapping[str, Any]) -> int:
    """T of a documented schedule."""
    schedule = field(data, "schedule")
    if (schedule.get("kind"), schedule.get("formula")) != ("linear", "min(t/(T*(i+1)),1)"):
        raise ValueError(f"schedule: {schedule} is not documented; known is the linear min(t/(T*(i+1)),1)")
    return int(field(schedule, "T"))


def norm_of(data: Mapping[str, Any]) -> NormConfig:
    """The scheme of a Llama golden, but for its final norm."""
    kind, layers = kind_of(data), field(data["config"], "num_hidden_layers")
    if str(data["norm_type"]).lower().endswith(STACKED):
        return _stacked(data, kind, layers)
    if kind == "post_pre":
        return NormConfig(scheme="mixln", options={"post_layers": field(data["config"], "post_num")})
    if kind == "deeppost":
        norm, alpha = NormConfig(scheme="deepnorm_llama"), float(field(data, "residual_scale"))
        skip = resolve(norm, layers).layers[0].attention.residual.skip.value
        if math.isclose(float(skip), alpha, rel_tol=1e-14):  # type: ignore[arg-type]
            return norm
        return NormConfig(scheme="deepnorm_llama", options={"skip": alpha})
    names = {"pre": "preln", "post": "postln", "sandwich": "sandwich", "scale_res": "skipinit", "lns": "lns"}
    return NormConfig(scheme=names[kind])


def model(data: Mapping[str, Any], params: Mapping[str, Tensor]) -> ModelConfig:
    """The model of a Llama golden."""
    config = data["config"]
    heads, width = field(config, "num_attention_heads"), field(config, "hidden_size")
    tied = bool(field(config, "tied"))
    norm = with_ends(norm_of(data), embedding=False, final="model.norm.weight" in params)
    hd = config.get("head_dim") or width // heads
    return ModelConfig(
        layers=field(config, "num_hidden_layers"),
        width=width,
        heads=heads,
        kv_heads=take(params, "model.layers.0.self_attn.k_proj.weight").shape[0] // hd,
        head_dim=hd,
        ffn=field(config, "intermediate_size"),
        vocab_size=field(config, "vocab_size"),
        activation="swiglu",
        positions="rotary",
        rope_theta=float(field(config, "rope_theta")),
        tied_head=tied,
        norm=with_defaults(norm, kind="rmsnorm", eps=float(field(config, "rms_norm_eps"))),
    )


def renaming(data: Mapping[str, Any]) -> Callable[[str], list[Renamed]]:
    """Reference name -> canonical name. The same norm name is another site in another kind of layer."""
    kind = kind_of(data)
    post_layers = data["config"].get("post_num") or 0

    def norms(layer: int) -> Mapping[str, str]:
        if kind == "sandwich":
            return SANDWICH
        return POST if kind in ("post", "deeppost") or (kind == "post_pre" and layer < post_layers) else PRE

    def rename(name: str) -> list[Renamed]:
        module, _, leaf = name.rpartition(".")
        if module in OUTSIDE:
            return [Renamed(f"{OUTSIDE[module]}.{leaf}")]
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        if match is not None:
            layer, rest = int(match.group(1)), match.group(2)
            if rest == "gpas_block.gate":
                return [Renamed(f"blocks.{layer}.attention.residual.gate", vector=True)]
            if rest in FACTORS:
                return [Renamed(f"blocks.{layer}.{FACTORS[rest]}", vector=True)]
            inner = {**MATRICES, **norms(layer)}.get(rest.removesuffix(f".{leaf}"))
            if inner is not None:
                return [Renamed(f"blocks.{layer}.{inner}.{leaf}")]
        raise ValueError(f"the parameter '{name}' is not documented for norm_type '{data['norm_type']}'")

    return rename
