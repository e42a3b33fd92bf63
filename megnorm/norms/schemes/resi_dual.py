"""ResiDual: a Post-LN stream, and a second one that gathers the branches as they are (arXiv:2304.14802).

``X' = N(X + F(X))``, ``Y' = Y + s F(X)`` with Y from s times the embedding; behind the last layer ``X + N(Y)``. The factor s
(0.05 in the published translation runs) keeps fp16 from overflowing; N takes it out again, but for its eps.
"""

from megnorm.norms.registry import register
from megnorm.norms.scheme import FFN, Attention, Layer, Norm, Scheme, Second, Streams


@register
def resi_dual(scale: float = 1.0) -> Scheme:
    """scale: s."""
    second = Second(write=scale)
    return Scheme(
        "resi_dual",
        "arXiv:2304.14802",
        "Post-LN, and a second stream of raw branches that joins at the end",
        layer=Layer(Attention(post=Norm(), second=second), FFN(post=Norm(), second=second)),
        streams=Streams(entry=scale, y=Norm()),
    )
