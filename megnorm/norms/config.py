"""Options of normalization: which scheme, and what its norms are made of."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class NormConfig:
    """scheme: a registered name (``megnorm norms`` lists them).
    options: the scheme's own options, e.g. ``{head_scale: post_projection}`` for normformer.
    patch: fields of the scheme's declaration to replace, e.g. ``{layer: {ffn: {inner: {}}}}``; ``{}`` is a plain norm
    and null none. ``all_layers`` instead of ``layer`` reaches a scheme's exceptions too.
    plugins: Python files or modules that register schemes of your own, imported before the scheme is looked up.
    kind, gain, bias, eps, cast, alpha: what a norm is unless its slot says otherwise. bias: LayerNorm only by default.
    cast: RMSNorm casts to the working dtype before (Llama) or after (Gemma) its gain.
    """

    scheme: str = "preln"
    options: Mapping[str, Any] = field(default_factory=dict)
    patch: Mapping[str, Any] = field(default_factory=dict)
    plugins: tuple[str, ...] = ()
    kind: Literal["layernorm", "rmsnorm", "l2", "scalenorm", "dyt", "derf", "seednorm"] = "rmsnorm"
    gain: Literal["vector", "scalar", "one_plus", "none"] = "vector"
    bias: bool | None = None
    eps: float = 1e-5
    cast: Literal["before_gain", "after_gain"] = "before_gain"
    alpha: float = 0.5
