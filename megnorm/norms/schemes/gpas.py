"""GPAS: a gate that damps the stream and lets its gradient pass, on any other scheme (arXiv:2506.22049).

``x' = x - silu(g) * stop_gradient(x)``, g a learned scalar that starts at 0. It stands on the stream after the add, or, where
a post norm would undo that, on the skip before its factor. One gate a layer, as in the published code; the paper's text has
one a sub-layer (``shared=False``).
"""

from dataclasses import replace
from typing import TypeVar

from megnorm.norms import registry
from megnorm.norms.registry import register
from megnorm.norms.scheme import Gate, Layer, Scheme, SubLayer

Part = TypeVar("Part", bound=SubLayer)


def _gated(part: Part, shared: bool) -> Part:
    gate = Gate("stream" if part.post is None else "skip", shared=shared)
    return replace(part, residual=replace(part.residual, gate=gate))


@register
def gpas(host: str = "preln", shared: bool = True) -> Scheme:
    """host: the scheme whose layers get gates, with its own options' defaults."""
    base = registry.get(host)

    def gated(layer: Layer) -> Layer:
        cross = None if layer.cross_attention is None else _gated(layer.cross_attention, shared)
        return Layer(_gated(layer.attention, shared), _gated(layer.ffn, shared), cross)

    return replace(
        base,
        name="gpas",
        paper="arXiv:2506.22049",
        summary="a gate that damps the stream, not its gradient, on another scheme",
        layer=gated(base.layer),
        overrides=tuple((where, gated(layer)) for where, layer in base.overrides),
    )
