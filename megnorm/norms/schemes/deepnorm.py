"""DeepNorm: ``x' = N(skip * x + F(x))`` with scaled-down initial weights (arXiv:2203.00555, table in figure 2).

    stack              skip (the paper's alpha)     gain on v, o, up, down (the paper's beta)
    only, L layers     (2 L)^(1/4)                  (8 L)^(-1/4)
    encoder of (N, M)  0.81 (N^4 M)^(1/16)          0.87 (N^4 M)^(-1/16)
    decoder of (N, M)  (3 M)^(1/4)                  (12 M)^(-1/4)

In cross-attention too. q and k keep gain 1, embeddings and the head are the user's.
"""

from dataclasses import replace
from math import pow
from typing import Any, Literal

from megnorm.norms.registry import register
from megnorm.norms.scheme import FFN, Attention, Depth, Init, Layer, Norm, Residual, Scale, Scheme


def alpha(d: Depth) -> float:
    if d.stack == "encoder":
        return 0.81 * pow(d.encoder_layers**4 * d.decoder_layers, 1 / 16)
    return pow((3 if d.stack == "decoder" else 2) * d.layers, 1 / 4)


def initialization(scale_gate: bool = True, encoder_beta: float = 0.87) -> Init:
    """Xavier normal on every logical matrix, gain beta on v, o and the feed-forward; q and k keep gain 1."""

    def beta(d: Depth) -> float:
        if d.stack == "encoder":
            return encoder_beta * pow(d.encoder_layers**4 * d.decoder_layers, -1 / 16)
        return pow((12 if d.stack == "decoder" else 8) * d.layers, -1 / 4)

    return Init("xavier_normal", dict.fromkeys(("v", "o", "up", "down", *(["gate"] if scale_gate else [])), beta))


@register
def deepnorm(
    scale_gate: bool = True,
    embedding_norm: bool = False,
    placement: Literal["post", "pre"] = "post",
    skip: float | None = None,
    encoder_beta: float = 0.87,
) -> Scheme:
    """scale_gate: the paper has no gated FFN; False leaves "gate" at gain 1, so that a gated FFN has beta^2 in all.

    placement "pre": the skip on a Pre-LN stack with its final norm, which torchscale's ``deepnorm`` flag alone builds.
    skip: a number in place of the paper's alpha. encoder_beta: torchscale has 1.15 where the paper has 0.87.
    """
    norms: dict[str, Any] = {"input": Norm()} if placement == "pre" else {"post": Norm()}
    residual = Residual(skip=Scale(alpha if skip is None else skip))
    return Scheme(
        "deepnorm",
        "arXiv:2203.00555",
        "Post-LN, scaled-up skip, scaled-down init",
        layer=Layer(Attention(**norms, residual=residual), FFN(**norms, residual=residual)),
        embedding=Norm() if embedding_norm else None,
        final=Norm() if placement == "pre" else None,
        init=initialization(scale_gate, encoder_beta),
    )


@register
def deepnorm_llama(scale_gate: bool = True, skip: float | None = None) -> Scheme:
    """skip: a number in place of alpha; some published baselines have 64^(1/4) = 2.8284271 at every depth."""
    base = deepnorm(scale_gate, skip=skip)
    return replace(base, name="deepnorm_llama", summary="DeepNorm with Llama's final norm", final=Norm())
