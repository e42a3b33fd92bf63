"""A resolved scheme in words: the numbers behind a run, layer by layer."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import groupby
from typing import Any

from megnorm.norms.resolve import Resolved
from megnorm.norms.scheme import Attention, Layer, Mix, Norm, Scale, Scheme
from megnorm.norms.table import norms, scales, sublayers


@dataclass(frozen=True)
class Group:
    """Consecutive layers that differ in numbers at most. first, last: 1-based."""

    first: int
    last: int
    layers: tuple[Layer, ...]

    @property
    def title(self) -> str:
        return f"layer {self.first}" if self.first == self.last else f"layers {self.first} to {self.last}"


def groups(resolved: Resolved) -> list[Group]:
    """The stack as runs of layers with the same wiring."""
    made, first = [], 1
    for _, run in groupby(resolved.layers, key=wiring):
        layers = tuple(run)
        made.append(Group(first, first + len(layers) - 1, layers))
        first += len(layers)
    return made


def wiring(value: Any) -> Any:
    """``value`` (a resolved Layer or a part of it) with its numbers erased."""
    if isinstance(value, Norm):
        return replace(value, scale=1.0, weight_init=1.0, alpha=None)
    if isinstance(value, Scale):
        return replace(value, value=1.0, warmup=float(value.warmup != 0.0))
    if isinstance(value, Mix):
        return replace(value, scale=1.0, first=0.0)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{item.name: wiring(getattr(value, item.name)) for item in fields(value)})
    return value


def span(values: Sequence[Any]) -> str:
    """One number for equal values, else the first and the last."""
    numbers = [f"{float(value):.6g}" for value in values]
    return numbers[0] if len(set(numbers)) == 1 else f"{numbers[0]} .. {numbers[-1]}"


def describe(scheme: Scheme, resolved: Resolved) -> Iterator[str]:
    """The lines of ``megnorm norms show``."""
    yield f"{resolved.scheme}: {scheme.summary} ({scheme.paper}); {len(resolved.layers)} layers"
    yield f"  embedding   {_outside(resolved.embedding)}"
    for group in groups(resolved):
        yield f"  {group.title}"
        names = [name for name, _ in sublayers(group.layers[0])]
        for i, name in enumerate(names):
            subs = [sublayers(layer)[i][1] for layer in group.layers]
            words = list(_sites(subs)) + list(_residual(subs))
            yield f"    {name:<10}" + ("; ".join(words) or "no norm, x + F(x)")
    ends = resolved.streams
    if ends is not None and ends.mixed:
        how = f"{float(ends.share):.4g} times their sum" if ends.exit is None else "what learned weights read of them"  # type: ignore[arg-type]
        yield f"  streams     {ends.mixed}, all from the embedding; they end in {how}"
    elif ends is not None:
        yield f"  streams     two; the second begins as {span([ends.entry])} of the embedding; they end in a sum of"
        yield f"    first     {_outside(ends.x)}"
        yield f"    second    {_outside(ends.y)}"
    yield f"  final       {_outside(resolved.final)}"
    yield from _initialization(resolved)


def _outside(norm: Norm | None) -> str:
    return "none" if norm is None else _norm([norm])


def _norm(found: Sequence[Norm]) -> str:
    norm = found[0]
    what = [str(norm.kind), f"gain {norm.gain}", *(["bias"] if norm.bias else []), f"eps {norm.eps:g}"]
    what += ["per head"] if norm.over == "head" else []
    what += [f"gain starts at {span([n.weight_init for n in found])}"] if any(n.weight_init != 1 for n in found) else []
    what += [f"times {span([n.scale for n in found])}"] if any(n.scale != 1 for n in found) else []
    return f"{what[0]} ({', '.join(what[1:])})"


def _sites(subs: Sequence[Any]) -> Iterator[str]:
    for i, (site, _) in enumerate(norms(subs[0])):
        found = [list(norms(sub))[i][1] for sub in subs]
        yield f"{site} {_norm(found)}"
    if isinstance(subs[0], Attention) and subs[0].head_scale is not None:
        yield f"head scale {subs[0].head_scale.replace('_', ' ')}"


def _residual(subs: Sequence[Any]) -> Iterator[str]:
    for i, (name, scale) in enumerate(scales(subs[0])):
        values = [scales(sub)[i][1].value for sub in subs]
        if scale.learned is not None:
            shared = ", shared by the layer" if scale.shared else ""
            yield f"{name} learned {scale.learned} from {span(values)}{shared}"
        elif any(value != 1.0 for value in values):
            yield f"{name} {span(values)}"
        if scale.warmup:
            yield f"{name} grows from 0 over {span([scales(sub)[i][1].warmup for sub in subs])} steps"
    gate = subs[0].residual.gate
    if gate is not None:
        shared = ", shared by the layer" if gate.shared else ""
        yield f"gate on the {gate.on} from {span([sub.residual.gate.value for sub in subs])}{shared}"
    if subs[0].residual.source == "input":
        yield "adds to the input norm's output"
    second = subs[0].second
    if second is not None:
        read = "" if second.read is None else ", read with the first"
        yield f"second stream: adds {span([sub.second.write for sub in subs])} of the branch{read}"
    mix = subs[0].mix
    if mix is not None:
        yield f"{mix.streams} streams mixed by token, rule {mix.rule}, scales from {span([sub.mix.scale for sub in subs])}"
    if subs[0].residual.layer_input:
        yield "adds the layer's input"


def _initialization(resolved: Resolved) -> Iterator[str]:
    roles = sorted({role for gains in resolved.gains for role in gains})
    gains = ", ".join(f"{role} {span([gain.get(role, 1.0) for gain in resolved.gains])}" for role in roles)
    distribution = resolved.distribution or "the model's distribution"
    yield f"  init        {distribution}; " + (f"gain {gains}" if gains else "gain 1 everywhere")
