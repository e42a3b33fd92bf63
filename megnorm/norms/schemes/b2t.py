"""B2T (bottom to top): Post-LN whose last residual adds the layer's input once more (arXiv:2206.00330).

    m = N(x + A(x));   x' = N(x + m + F(m))

Every matrix of a block starts at 1/sqrt(L) of the base init, L the layers of its stack.
"""

from math import sqrt

from megnorm.norms.registry import register
from megnorm.norms.scheme import BLOCK_ROLES, FFN, Attention, Depth, Init, Layer, Norm, Residual, Scheme


def gain(d: Depth) -> float:
    return 1 / sqrt(d.layers)


@register
def b2t(scaled_init: bool = True) -> Scheme:
    """scaled_init: the published code's 1/sqrt(L) on the initial matrices."""
    return Scheme(
        "b2t",
        "arXiv:2206.00330",
        "Post-LN; the FFN's residual adds the layer's input too",
        layer=Layer(Attention(post=Norm()), FFN(post=Norm(), residual=Residual(layer_input=True))),
        init=Init(gain=dict.fromkeys(BLOCK_ROLES, gain) if scaled_init else {}),
    )
