"""SiameseNorm's language model of the frontier format: names and options of the OLMo fork that it lives in."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from goldens.case import field, with_defaults
from goldens.renaming import Renamed
from megnorm.models.config import ModelConfig
from megnorm.norms.config import NormConfig

# What the published block is; other values were never run by its authors.
BLOCK = {
    "rope": True, "activation_type": "swiglu", "block_type": "sequential", "include_bias": False, "layer_norm_type": "rms",
    "layer_norm_with_affine": True, "bias_for_layer_norm": False, "use_query_norm": True, "use_key_norm": True,
    "use_value_norm": True, "use_context_norm": False, "attn_norm": False, "ffn_norm": True, "ffn_residual_after_norm": True,
    "weight_tying": False,
}  # fmt: skip
OUTSIDE = {
    "wte.weight": "embed.token.weight", "ff_out.weight": "head.weight", "ln_f.weight": "joined.x_norm.weight",
    "ln_y_f.weight": "joined.y_norm.weight", "ln_final_f.weight": "final_norm.weight",
}  # fmt: skip
INSIDE = {
    "attn_out.weight": "attention.o.weight", "attn_y_norm.weight": "attention.second.read_norm.weight",
    "c1": "attention.second.share", "q_norm.weight": "attention.q_norm.weight", "k_norm.weight": "attention.k_norm.weight",
    "v_norm.weight": "attention.v_norm.weight", "ff_norm.weight": "ffn.second.start_norm.weight",
    "ff_y_norm.weight": "ffn.second.read_norm.weight", "ff_input_norm.weight": "ffn.input_norm.weight",
    "ff_out.weight": "ffn.down.weight",
}  # fmt: skip


def model(data: Mapping[str, Any], params: Mapping[str, Tensor]) -> ModelConfig:
    """The model of a golden; its head's width is one head's share."""
    config = data["config"]
    for key, value in BLOCK.items():
        if field(config, key) != value:
            raise ValueError(f"config.{key}: {config[key]!r} is not documented; known is {value!r}")
    norm = NormConfig("siamese_hybrid")
    return ModelConfig(
        layers=field(config, "n_layers"),
        width=field(config, "d_model"),
        heads=field(config, "n_heads"),
        ffn=field(config, "mlp_hidden_size") // 2,
        vocab_size=field(config, "vocab_size"),
        activation="swiglu",
        positions="rotary",
        norm=with_defaults(norm, kind="rmsnorm", eps=float(field(config, "layer_norm_eps"))),
    )


def rename(name: str) -> list[Renamed]:
    """Reference name -> canonical names. ``ff_proj``: first half up, second half gate."""
    plain = name.removeprefix("transformer.")
    if plain in OUTSIDE:
        return [Renamed(OUTSIDE[plain])]
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", plain)
    if match is not None:
        path, rest = f"blocks.{match[1]}", match[2]
        if rest == "att_proj.weight":
            return [Renamed(f"{path}.attention.{part}.weight", (i, 3)) for i, part in enumerate("qkv")]
        if rest == "ff_proj.weight":
            return [Renamed(f"{path}.ffn.{part}.weight", (i, 2)) for i, part in enumerate(("up", "gate"))]
        if rest in INSIDE:
            return [Renamed(f"{path}.{INSIDE[rest]}")]
    raise ValueError(f"the parameter '{name}' is not documented")
