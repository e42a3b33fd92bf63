"""Pre-LN: ``x' = x + F(N(x))``, a final norm before the head (arXiv:2002.04745; GPT-2's order)."""

from megnorm.norms.registry import register
from megnorm.norms.scheme import FFN, Attention, Layer, Norm, Scheme


@register
def preln(embedding_norm: bool = False) -> Scheme:
    """embedding_norm: on the embedding (BLOOM, mBART). GPT-2's scaled init is ``model.init.depth_scaled``."""
    return Scheme(
        "preln",
        "arXiv:2002.04745",
        "norm before each sub-layer",
        layer=Layer(Attention(input=Norm()), FFN(input=Norm())),
        embedding=Norm() if embedding_norm else None,
        final=Norm(),
    )
