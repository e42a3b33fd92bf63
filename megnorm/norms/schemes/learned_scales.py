"""Learned factors on the residual: ReZero, SkipInit, LayerScale on the branch, ResScale on the skip.

    rezero      x + a F(x)         a: one scalar a layer, starts at 0; no norms       arXiv:2003.04887
    skipinit    x + a F(N(x))      a: one scalar a sub-layer, starts at 0             arXiv:2002.10444
    layerscale  x + g * F(N(x))    g: a vector of d, starts at 1e-4                   arXiv:2103.17239
    resscale    g * x + F(N(x))    g: a vector of d, starts at 1                      arXiv:2110.09456

``start`` is the initial value of each.
"""

from megnorm.norms.registry import register
from megnorm.norms.scheme import FFN, Attention, Layer, Norm, Residual, Scale, Scheme


def _layer(residual: Residual, norms: bool = True) -> Layer:
    norm = Norm() if norms else None
    return Layer(Attention(input=norm, residual=residual), FFN(input=norm, residual=residual))


@register
def rezero(start: float = 0.0, final_norm: bool = False) -> Scheme:
    layer = _layer(Residual(branch=Scale(start, learned="scalar", shared=True)), norms=False)
    final = Norm() if final_norm else None
    return Scheme("rezero", "arXiv:2003.04887", "no norms, one learned branch scalar a layer", layer, final=final)


@register
def skipinit(start: float = 0.0, norms: bool = True) -> Scheme:
    """norms False: the paper's form, without any norm; its scalar starts at 0."""
    layer = _layer(Residual(branch=Scale(start, learned="scalar")), norms)
    summary = "Pre-LN with a learned scalar on each branch"
    return Scheme("skipinit", "arXiv:2002.10444", summary, layer, final=Norm() if norms else None)


@register
def layerscale(start: float = 1e-4) -> Scheme:
    layer = _layer(Residual(branch=Scale(start, learned="width")))
    return Scheme("layerscale", "arXiv:2103.17239", "Pre-LN with a learned vector on each branch", layer, final=Norm())


@register
def resscale(start: float = 1.0) -> Scheme:
    layer = _layer(Residual(skip=Scale(start, learned="width")))
    return Scheme("resscale", "arXiv:2110.09456", "Pre-LN with a learned vector on each skip", layer, final=Norm())
