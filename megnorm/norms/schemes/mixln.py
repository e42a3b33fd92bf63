"""Mix-LN: the first layers are Post-LN, the others Pre-LN, and the final norm stays (arXiv:2412.13795)."""

from megnorm.norms.registry import register
from megnorm.norms.scheme import FFN, Attention, Layer, Norm, Scheme, Where


@register
def mixln(fraction: float = 0.25, post_layers: int | None = None) -> Scheme:
    """fraction: floor(fraction * L) layers are Post-LN (1/16 for the paper's 7B). post_layers: their number instead."""
    post = Layer(Attention(post=Norm()), FFN(post=Norm()))
    where = Where.fraction(0, fraction) if post_layers is None else Where.first(post_layers)
    return Scheme(
        "mixln",
        "arXiv:2412.13795",
        "Post-LN in the first quarter, Pre-LN above",
        layer=Layer(Attention(input=Norm()), FFN(input=Norm())),
        overrides=((where, post),),
        final=Norm(),
    )
