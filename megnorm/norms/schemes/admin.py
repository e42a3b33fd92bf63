"""Admin: ``x' = N(omega * x + F(x))`` (arXiv:2004.08249), with the constant omega of the authors' admin-torch.

With n sub-layers in the stack, by how the output's change may grow with depth:

    log n     omega = sqrt((n + 1) / ln(n + 1) - 1)        n    omega = 1        1    omega = sqrt(n)

The paper's own omega is profiled with data in a first forward pass, which this is not.
"""

from math import log, sqrt
from typing import Literal

from megnorm.norms.registry import register
from megnorm.norms.scheme import FFN, Attention, Depth, Layer, Norm, Residual, Scale, Scheme


@register
def admin(growth: Literal["log n", "n", "1"] = "log n", learned: bool = False) -> Scheme:
    """learned: omega is a vector of d that starts at the constant and trains."""

    def omega(d: Depth) -> float:
        n = (3 if d.stack == "decoder" else 2) * d.layers
        if growth == "log n":
            return sqrt((n + 1) / log(n + 1) - 1)
        return 1.0 if growth == "n" else sqrt(n)

    residual = Residual(skip=Scale(omega, learned="width" if learned else None))
    return Scheme(
        "admin",
        "arXiv:2004.08249",
        "Post-LN with a scaled-up skip",
        layer=Layer(Attention(post=Norm(), residual=residual), FFN(post=Norm(), residual=residual)),
    )
