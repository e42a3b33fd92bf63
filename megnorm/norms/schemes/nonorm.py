"""No norm at all: ``x' = x + F(x)``. A baseline, and a base for patches."""

from math import sqrt

from megnorm.norms.registry import register
from megnorm.norms.scheme import Init, Layer, Norm, Scheme


@register
def nonorm(depth_gain: bool = True, final_norm: bool = False) -> Scheme:
    """depth_gain: o and down start at 1/sqrt(2L) of the base init, without which deep stacks overflow."""
    roles = ("o", "down") if depth_gain else ()
    return Scheme(
        "nonorm",
        "none",
        "plain residual sums",
        layer=Layer(),
        final=Norm() if final_norm else None,
        init=Init(gain={role: lambda d: 1 / sqrt(2 * d.layers) for role in roles}),
    )
