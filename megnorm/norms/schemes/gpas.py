"""GPAS: a gate that damps the stream and lets its gradient pass, on any other scheme (arXiv:2506.22049).

``x' = x - silu(g) * stop_gradient(x)``, g a learned scalar that starts at 0. It stands on the stream after the add, or, where
a post norm would undo that, on the skip before its factor. One gate a layer, as in the published code; the paper's text has
one a sub-layer (``shared=False``).
"""

from dataclasses import replace

from megnorm.norms import registry
from megnorm.norms.registry import register
from megnorm.norms.scheme import Gate, Scheme, SubLayer


@register
def gpas(host: str = "preln", shared: bool = True) -> Scheme:
    """host: the scheme whose layers get gates, with its own options' defaults."""

    def gated(part: SubLayer) -> SubLayer:
        gate = Gate("stream" if part.post is None else "skip", shared=shared)
        return replace(part, residual=replace(part.residual, gate=gate))

    summary = "a gate that damps the stream, not its gradient, on another scheme"
    return registry.get(host).each(gated, name="gpas", paper="arXiv:2506.22049", summary=summary)
