"""Post-LN: ``x' = N(x + F(x))``, no final norm (arXiv:1706.03762)."""

from megnorm.norms.registry import register
from megnorm.norms.scheme import FFN, Attention, Layer, Norm, Scheme


@register
def postln(final_norm: bool = False, embedding_norm: bool = False) -> Scheme:
    """final_norm: one more norm before the head (Llama forms). embedding_norm: on the embedding (BERT)."""
    return Scheme(
        "postln",
        "arXiv:1706.03762",
        "norm after each residual add",
        layer=Layer(Attention(post=Norm()), FFN(post=Norm())),
        embedding=Norm() if embedding_norm else None,
        final=Norm() if final_norm else None,
    )
