"""HybridNorm: norms on q, k, v in attention, norm-then-residual in the FFN (arXiv:2503.04598, equations 4 to 7).

    y = x + A(x) with q, k, v normalized per head;   z = N(y);   x' = z + F(z)

HybridNorm* begins with a Pre-LN layer that keeps the q, k, v norms. ``hybridnorm_ablations.py`` has the paper's others.
"""

from math import sqrt
from typing import Any

from megnorm.norms.registry import register
from megnorm.norms.scheme import FFN, Attention, Depth, Layer, Norm, Residual, Scheme, Where


def heads(sites: str) -> dict[str, Any]:
    """The per-head norms that letters name: q, k, v, and c for the context."""
    names = {"q": "q", "k": "k", "v": "v", "c": "context"}
    return {names[letter]: Norm("head") for letter in sites}


FROM_NORMED = Residual(source="input")
HYBRID = Layer(Attention(**heads("qkv")), FFN(input=Norm(), residual=FROM_NORMED))
FIRST = Layer(Attention(input=Norm(), **heads("qkv")), FFN(input=Norm()))


@register
def hybridnorm(embedding_norm: bool = False) -> Scheme:
    return Scheme(
        "hybridnorm",
        "arXiv:2503.04598",
        "q, k, v norms; the FFN adds to its normalized input",
        layer=HYBRID,
        embedding=Norm() if embedding_norm else None,
        final=Norm(),
    )


@register
def hybridnorm_star() -> Scheme:
    return Scheme(
        "hybridnorm_star",
        "arXiv:2503.04598",
        "HybridNorm with a Pre-LN first layer",
        layer=HYBRID,
        overrides=((Where.first(1), FIRST),),
        final=Norm(),
    )


@register
def hybridnorm_7b() -> Scheme:
    def gain(d: Depth) -> float:
        return 1 / sqrt(2 * d.layers)

    output = Norm(weight_init=gain)
    return Scheme(
        "hybridnorm_7b",
        "arXiv:2503.04598",
        "HybridNorm* with a norm on the attention's output, as at 7B",
        layer=Layer(Attention(output=output, **heads("qkv")), HYBRID.ffn),
        overrides=((Where.first(1), Layer(Attention(input=Norm(), output=output, **heads("qkv")), FIRST.ffn)),),
        final=Norm(),
    )
