"""OLMo 2's reordered norm: ``x' = x + N(F(x))``, with q and k normalized over the full width (arXiv:2501.00656)."""

from typing import Any

from megnorm.norms.registry import register
from megnorm.norms.scheme import FFN, Attention, Layer, Norm, Scheme


@register
def olmo2(qk_norm: bool = True) -> Scheme:
    qk: dict[str, Any] = {"q": Norm("width"), "k": Norm("width")} if qk_norm else {}
    return Scheme(
        "olmo2",
        "arXiv:2501.00656",
        "norm on each branch's output; q, k norms over the full width",
        layer=Layer(Attention(output=Norm(), **qk), FFN(output=Norm())),
        final=Norm(),
    )
