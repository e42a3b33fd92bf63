"""Branches that grow with the optimizer's step t, on another scheme.

    prores       a = min(t / (T l), 1), l the layer's 1-based index: deep layers join late   arXiv:2603.05369, equations 2, 3
    branchnorm   N(x + a F(x)), a = min(t / T, 1), on the way to a plain Post-LN              arXiv:2305.02790

ProRes multiplies the branch after its output norm, where the host has one; T is 1000 in the paper. Nothing is learned, and
once all factors are 1 the model is the host's. The published code counts t from 0, so that its first step moves no branch;
here t is the number of the step, from 1.
"""

from dataclasses import replace

from megnorm.norms import registry
from megnorm.norms.registry import register
from megnorm.norms.scheme import FFN, Attention, Depth, Layer, Norm, Residual, Scale, Scheme, SchemeError, SubLayer


@register
def prores(host: str = "preln", steps: int = 1000) -> Scheme:
    """host: the scheme whose branches grow, with its own options' defaults. steps: T."""

    def warmup(d: Depth) -> float:
        return steps * d.index

    def growing(part: SubLayer) -> SubLayer:
        branch = part.residual.branch
        if branch.learned is not None:
            raise SchemeError(
                f"norm.options.host: the branches of '{host}' have learned factors, which move by themselves"
            )
        return replace(part, residual=replace(part.residual, branch=replace(branch, warmup=warmup)))

    summary = "branches grow layer by layer in the first steps, on another scheme"
    return registry.get(host).each(growing, name="prores", paper="arXiv:2603.05369", summary=summary)


@register
def branchnorm(steps: int = 4000) -> Scheme:
    """steps: T."""
    residual = Residual(branch=Scale(warmup=steps))
    layer = Layer(Attention(post=Norm(), residual=residual), FFN(post=Norm(), residual=residual))
    return Scheme("branchnorm", "arXiv:2305.02790", "Post-LN whose branches grow in the first steps", layer)
