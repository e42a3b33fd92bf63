"""A scheme of one's own: Peri-LN whose branches fade with depth, after a Pre-LN first layer.

    layer 1     x' = x + F(N(x))
    layer l     x' = x + l^(-power) N(F(N(x))),   q and k normalized per head

Matrices that write to the stream start at 1/sqrt(2L) of the base initialization.
"""

from math import sqrt

from megnorm.norms.registry import register
from megnorm.norms.scheme import FFN, Attention, Init, Layer, Norm, Scheme, Where


@register
def taper(power: float = 0.5) -> Scheme:
    fading = Norm(scale=lambda d: float(d.index**-power))
    heads = {"q": Norm("head"), "k": Norm("head")}
    return Scheme(
        "taper",
        "none: an example",
        "Peri-LN whose branches fade with depth",
        layer=Layer(Attention(input=Norm(), output=fading, **heads), FFN(input=Norm(), output=fading)),
        overrides=((Where.first(1), Layer(Attention(input=Norm(), **heads), FFN(input=Norm()))),),
        final=Norm(),
        init=Init(gain={role: lambda d: 1 / sqrt(2 * d.layers) for role in ("o", "down")}),
    )
