"""SiameseNorm: a stream that is normalized on its way and one that is not, read together (arXiv:2602.08064).

With g = sqrt(2 l), l the layer's 1-based index, and o = F(z) the branch of every sub-layer:

    siamese             X = N(X), z = N_in(X + N_read(Y)), X' = X + o / g, Y' = Y + o
    siamese_hybrid      attention: z = c X + N_read(Y), c a learned vector, with norms on q, k and v by head; ffn as above

Behind the last layer N_f(N_x(X) + N_y(Y)). The first is the published vision model's block, the second the language model's.
"""

from math import sqrt

from megnorm.norms.registry import register
from megnorm.norms.scheme import FFN, Attention, Depth, Layer, Norm, Residual, Scale, Scheme, Second, Streams


def inverse(d: Depth) -> float:
    return 1 / sqrt(2 * d.index)


RESIDUAL = Residual(branch=Scale(inverse))
BOTH = Second(start=Norm(), read=Norm())
ENDS = Streams(x=Norm(), y=Norm())


@register
def siamese() -> Scheme:
    return Scheme(
        "siamese",
        "arXiv:2602.08064",
        "two streams, one normalized on its way, read together",
        layer=Layer(Attention(Norm(), residual=RESIDUAL, second=BOTH), FFN(Norm(), residual=RESIDUAL, second=BOTH)),
        final=Norm(),
        streams=ENDS,
    )


@register
def siamese_hybrid() -> Scheme:
    head = Norm(over="head")
    read = Second(read=Norm(), share=Scale(learned="width"))
    return Scheme(
        "siamese_hybrid",
        "arXiv:2602.08064",
        "two streams with HybridNorm's norms on q, k and v",
        layer=Layer(
            Attention(q=head, k=head, v=head, residual=RESIDUAL, second=read),
            FFN(Norm(), residual=RESIDUAL, second=BOTH),
        ),
        final=Norm(),
        streams=ENDS,
    )
