"""What a normalization scheme is: a value.

A scheme says, for every sub-layer ``F`` of a transformer, where one normalizes and what is added to what:

    u  = input(x)                           Pre-LN, NormFormer, Sandwich
    y  = output(F(u))                       Sandwich, OLMo2: before the add
    r  = x  or  u                           Residual.source
    x' = post(skip * r + branch * y)        Post-LN, DeepNorm: after the add

An absent norm is the identity. Inside ``F`` further norms may stand: ``q``, ``k``, ``v``, ``context`` (before W_o) and
``inner`` (before W_down). Nothing here is a tensor and nothing here runs: ``norms/resolve.py`` turns the formulas into
numbers, ``layers/sublayer.py`` reads the numbers. Only the standard library is imported.

Two streams X and Y (``Second``, ``Streams``): X is the stream above, Y gathers what branches say and may be read with it. More
streams, mixed by weights that each token gives them (``Mix``), have that in place of the residual.

Room for what is not here yet, by a field whose default leaves today's schemes as they are: a projection of weights after each
step, of Init, by role.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

from megnorm.norms.check import PROBES, check_ends, check_layer, check_norm, check_streams, check_where, formulas
from megnorm.norms.parts import (
    BLOCK_ROLES,
    FFN,
    GAINS,
    MIXES,
    NORM_KINDS,
    ROLES,
    Attention,
    Depth,
    Formula,
    Gate,
    Init,
    Layer,
    Mix,
    Norm,
    Residual,
    Scale,
    SchemeError,
    Second,
    Streams,
    SubLayer,
    Where,
    evaluate,
)

__all__ = [
    "BLOCK_ROLES", "FFN", "GAINS", "MIXES", "NORM_KINDS", "ROLES", "Attention", "Depth", "Formula", "Gate", "Init",
    "Layer", "Mix", "Norm", "Residual", "Scale", "Scheme", "SchemeError", "Second", "Streams", "SubLayer", "Where",
    "check", "evaluate", "warnings_for",
]  # fmt: skip


@dataclass(frozen=True)
class Scheme:
    """A normalization scheme, complete: one layer, exceptions by depth, the norms outside blocks, initialization; where there
    are two streams, their ends."""

    name: str
    paper: str
    summary: str
    layer: Layer
    overrides: tuple[tuple[Where, Layer], ...] = ()
    embedding: Norm | None = None
    final: Norm | None = None
    init: Init = Init()
    streams: Streams | None = None

    def __post_init__(self) -> None:
        check(self)

    def each(self, change: Callable[[SubLayer], SubLayer], **others: Any) -> "Scheme":
        """With every sub-layer of every layer changed alike. others: further fields, such as the name."""
        overrides = tuple((where, layer.each(change)) for where, layer in self.overrides)
        return replace(self, layer=self.layer.each(change), overrides=overrides, **others)


def check(scheme: Scheme) -> None:
    """Refuse an impossible scheme where it is declared. Raises SchemeError naming the field."""
    layers = [("layer", scheme.layer)]
    for i, (where, layer) in enumerate(scheme.overrides):
        check_where(f"{scheme.name}: overrides[{i}]", where)
        layers.append((f"overrides[{i}]", layer))
    for path, layer in layers:
        check_layer(f"{scheme.name}: {path}", layer)
        for sub in (layer.attention, layer.cross_attention, layer.ffn):
            if sub is not None:
                check_streams(f"{scheme.name}: {path}", sub, scheme.streams)
    check_ends(f"{scheme.name}: streams", scheme.streams)
    for part in ("embedding", "final"):
        check_norm(f"{scheme.name}: {part}", getattr(scheme, part), ("width",))
    for role in scheme.init.gain:
        if role.removeprefix("cross.") not in BLOCK_ROLES:
            known = ", ".join(BLOCK_ROLES)
            raise SchemeError(
                f"{scheme.name}: init.gain: no matrix of a block has the role '{role}'; roles are {known}"
            )
    for path, formula in _formulas(scheme):
        if not callable(formula):
            evaluate(formula, Depth(1, 1), path)
            continue
        for depth in PROBES:
            evaluate(formula, depth, path)


def _formulas(scheme: Scheme) -> Iterator[tuple[str, Formula]]:
    """Every number or formula of a declaration, with its path."""
    for item in fields(scheme):
        yield from formulas(getattr(scheme, item.name), f"{scheme.name}: {item.name}")


def warnings_for(scheme: Scheme, *, depth_scaled: bool) -> list[str]:
    """What the literature says against a combination, a sentence each; empty if nothing.

    depth_scaled: whether o and down are initialized at 1/sqrt(2L) of the base (model.init.depth_scaled).
    """
    if not depth_scaled:
        return []
    found = []
    if scheme.init.unscaled_only:
        found.append(
            f"norm.scheme: '{scheme.name}' loses its gain with depth-scaled initialization (arXiv:2502.05795, "
            "table 6); set model.init.depth_scaled=false"
        )
    scaled = [role for role in ("o", "down") if scheme.init.gain.get(role, 1.0) != 1.0]
    if scaled:
        found.append(
            f"norm.scheme: '{scheme.name}' sets its own initial gain on {' and '.join(scaled)}, and depth-scaled "
            "initialization multiplies it by 1/sqrt(2L) once more; set model.init.depth_scaled=false"
        )
    return found
