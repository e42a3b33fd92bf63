"""LayerNorm Scaling: ``x' = x + F(N(x) / sqrt(l))``, l the layer's 1-based index (arXiv:2502.05795, equation 12).

The factor is kept through training; it is no initial gain. The final norm is not scaled. Initialization that shrinks o
and down with depth undoes the gain (the paper's table 6).
"""

from math import sqrt

from megnorm.norms.registry import register
from megnorm.norms.scheme import FFN, Attention, Init, Layer, Norm, Scheme


@register
def lns() -> Scheme:
    norm = Norm(scale=lambda d: 1 / sqrt(d.index))
    return Scheme(
        "lns",
        "arXiv:2502.05795",
        "Pre-LN whose norms shrink as 1/sqrt(layer)",
        layer=Layer(Attention(input=norm), FFN(input=norm)),
        final=Norm(),
        init=Init(unscaled_only=True),
    )
