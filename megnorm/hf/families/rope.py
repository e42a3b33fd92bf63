"""Rotary positions and windows as transformers writes them into config.json, and back."""

import math
from collections.abc import Mapping
from typing import Any

from megnorm.models.config import ModelConfig, RopeScaling

WINDOW, FULL = "sliding_attention", "full_attention"
KINDS = ("linear", "dynamic", "yarn", "llama3")


def rope_parameters(model: ModelConfig) -> dict[str, Any]:
    """rope_parameters: one set, or one for each type of layer where layers with a window have a theta of their own."""
    scaling, theta = model.rope_scaling, {"rope_theta": model.rope_theta}
    full: dict[str, Any] = {"rope_type": "default"} | theta
    if scaling.kind != "none":
        full = {"rope_type": scaling.kind, "factor": scaling.factor} | theta
    if scaling.kind in ("yarn", "llama3"):
        full["original_max_position_embeddings"] = scaling.original or model.max_positions
    if scaling.kind == "llama3":
        full |= {"low_freq_factor": scaling.low_freq, "high_freq_factor": scaling.high_freq}
    if scaling.kind == "yarn":
        full |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow, "truncate": scaling.truncate}
        full |= {} if scaling.attention_factor is None else {"attention_factor": scaling.attention_factor}
    part = {} if model.rope_fraction == 1.0 else {"partial_rotary_factor": model.rope_fraction}
    local = model.attention.window_rope_theta
    window = {"rope_type": "default", "rope_theta": local}
    return full | part if local is None else {FULL: full | part, WINDOW: window | part}


def longest(model: ModelConfig) -> int:
    """max_position_embeddings, which for dynamic scaling is the length of the first training."""
    dynamic = model.rope_scaling.kind == "dynamic"
    return model.rope_scaling.original or model.max_positions if dynamic else model.max_positions


def longest_input(config: Any) -> int | None:
    """The most positions that a model of a (loaded) config takes; None: it does not say."""
    names = ("max_position_embeddings", "max_seq_len", "seq_length")
    found = next((getattr(config, name) for name in names if getattr(config, name, None) is not None), None)
    rope = getattr(config, "rope_parameters", None) or {}
    dynamic = found is not None and rope.get("rope_type") == "dynamic"  # theta grows with the row
    return int(found * rope["factor"]) if dynamic else found


def read_rope(
    config: Mapping[str, Any], default: float = 10000.0, *, whole: bool = True
) -> tuple[float, RopeScaling, float | None]:
    """theta, scaling, and the theta of layers with a window, of a config of either generation of transformers.

    whole: the class turns whole heads, so that a config that says otherwise is refused.
    Raises ValueError for what megnorm cannot express.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    local: float | None = None
    if FULL in rope:
        window = rope.get(WINDOW) or {"rope_type": "default", "rope_theta": default}
        if window.get("rope_type", "default") != "default":
            raise ValueError(
                "config.json: rotary positions of layers with a window are scaled; megnorm scales none there"
            )
        rope, local = rope[FULL], float(window["rope_theta"])
    if whole and rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError("config.json: partial_rotary_factor must be 1 in this class")
    theta = float(rope.get("rope_theta", config.get("rope_theta", default)))
    return theta, _scaling(rope, config), local


def read_fraction(config: Mapping[str, Any], default: float = 1.0) -> float:
    """The share of a head's features that rotary positions turn."""
    rope = config.get("rope_parameters") or {}
    return float(rope.get(FULL, rope).get("partial_rotary_factor", default))


def _scaling(rope: Mapping[str, Any], config: Mapping[str, Any]) -> RopeScaling:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return RopeScaling()
    if kind not in KINDS:
        raise ValueError(f"config.json: rotary positions of type '{kind}' are not supported, only {', '.join(KINDS)}")
    original = rope.get("original_max_position_embeddings", config.get("original_max_position_embeddings"))
    common = {
        "kind": kind,
        "factor": float(rope["factor"]),
        "original": original if kind in ("yarn", "llama3") else None,
    }
    if kind == "llama3":
        common |= {"low_freq": float(rope["low_freq_factor"]), "high_freq": float(rope["high_freq_factor"])}
    if kind == "yarn":
        common |= {"beta_fast": float(rope.get("beta_fast") or 32), "beta_slow": float(rope.get("beta_slow") or 1)}
        common |= {"truncate": bool(rope.get("truncate", True)), "attention_factor": _attention_factor(rope)}
    return RopeScaling(**common)


def _attention_factor(rope: Mapping[str, Any]) -> float | None:
    """yarn's factor on cos and sin, which some configs give as two logarithmic ones."""
    given, over, under = (rope.get(name) for name in ("attention_factor", "mscale", "mscale_all_dim"))
    if given is not None or not (over and under):
        return None if given is None else float(given)
    log = 0.1 * math.log(float(rope["factor"]))
    return float((log * over + 1.0) / (log * under + 1.0))


def layer_types(model: ModelConfig) -> list[str]:
    """The type of each layer."""
    return [FULL if model.attention.window_of(i) is None else WINDOW for i in range(model.layers)]


def read_window(config: Mapping[str, Any], local: float | None = None) -> dict[str, Any]:
    """Fields of AttentionConfig: the window and its layers. local: theta of these layers."""
    window, layers = config.get("sliding_window"), config["num_hidden_layers"]
    if config.get("use_sliding_window") is False:
        window = None
    types = config.get("layer_types") or _types(config, layers)
    if window is None or WINDOW not in types:
        return {}
    if set(types) - {WINDOW, FULL}:
        raise ValueError(
            f"config.json: layer_types has {sorted(set(types) - {WINDOW, FULL})}, which megnorm does not know"
        )
    kinds = ["window" if one == WINDOW else "full" for one in types]
    period = next(n for n in range(1, layers + 1) if all(kinds[i] == kinds[i % n] for i in range(layers)))
    return {"window": window, "window_layers": tuple(kinds[:period]), "window_rope_theta": local}


def _types(config: Mapping[str, Any], layers: int) -> list[str]:
    """Layers of a config that does not list them: those from max_window_layers on, or all."""
    return [WINDOW if i >= config.get("max_window_layers", 0) else FULL for i in range(layers)]
