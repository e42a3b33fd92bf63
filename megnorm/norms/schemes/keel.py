"""KEEL: ``x' = N_post(2L * x + F(N_in(x)))`` (arXiv:2601.19895, equation 8 and section 3.1).

Exceptions of the paper in layer 1: attention has no post norm and skip 1; the FFN keeps its post norm, with skip 1. The
last post norm is the output norm. In the decoder of an encoder-decoder model the skip counts three sub-layers a layer.
"""

from megnorm.norms.registry import register
from megnorm.norms.scheme import FFN, Attention, Depth, Layer, Norm, Residual, Scale, Scheme, Where


def sublayers(d: Depth) -> float:
    return (3 if d.stack == "decoder" else 2) * d.layers


@register
def keel(exceptions: bool = True, skip: float | None = None, final_norm: bool = False) -> Scheme:
    """exceptions: of layer 1; False is x-transformers' form. skip: a number in place of 2L, for shallow models."""
    residual = Residual(skip=Scale(sublayers if skip is None else skip))
    first = Layer(Attention(input=Norm()), FFN(input=Norm(), post=Norm()), Attention(input=Norm(), post=Norm()))
    return Scheme(
        "keel",
        "arXiv:2601.19895",
        "Post-LN with input norms and a skip of 2L",
        layer=Layer(
            Attention(input=Norm(), post=Norm(), residual=residual), FFN(input=Norm(), post=Norm(), residual=residual)
        ),
        overrides=((Where.first(1), first),) if exceptions else (),
        final=Norm() if final_norm else None,
    )
