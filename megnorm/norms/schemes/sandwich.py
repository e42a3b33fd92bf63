"""Sandwich-LN (CogView, arXiv:2105.13290) and Peri-LN (arXiv:2502.02732; Gemma 2 and 3): ``x' = x + N(F(N(x)))``.

Both normalize a branch before and after. CogView trains it with ``model.init.depth_scaled``, Peri-LN without; Gemma 3
adds q and k norms per head.
"""

from typing import Any

from megnorm.norms.registry import register
from megnorm.norms.scheme import FFN, Attention, Layer, Norm, Scheme


@register
def sandwich() -> Scheme:
    return Scheme(
        "sandwich",
        "arXiv:2105.13290",
        "norm before and after each branch",
        layer=Layer(Attention(input=Norm(), output=Norm()), FFN(input=Norm(), output=Norm())),
        final=Norm(),
    )


@register
def periln(embedding_norm: bool = False, qk_norm: bool = False, output_gain: float = 1.0) -> Scheme:
    """qk_norm: per head, as Gemma 3. output_gain: initial gain of the output norms; small ones start near identity."""
    output = Norm(weight_init=output_gain)
    qk: dict[str, Any] = {"q": Norm("head"), "k": Norm("head")} if qk_norm else {}
    return Scheme(
        "periln",
        "arXiv:2502.02732",
        "norm before and after each branch, as Gemma",
        layer=Layer(Attention(input=Norm(), output=output, **qk), FFN(input=Norm(), output=output)),
        embedding=Norm() if embedding_norm else None,
        final=Norm(),
    )
