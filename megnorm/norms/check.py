"""What a scheme's parts may not be; each function raises SchemeError, whose message begins with the field's path."""

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from megnorm.norms.parts import (
    FFN,
    GAINS,
    MIXES,
    NORM_KINDS,
    RULES,
    SOURCES,
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
)


def _probes() -> Iterator[Depth]:
    for layers in (1, 2, 3, 12, 1000):
        for index in sorted({1, 2, layers // 2, layers} & set(range(1, layers + 1))):
            yield Depth(index, layers)
            yield Depth(index, layers, "encoder", layers, 6)
            yield Depth(index, layers, "decoder", 6, layers)


PROBES = tuple(_probes())


def formulas(value: Any, path: str) -> Iterator[tuple[str, Formula]]:
    """Every number or formula in a declaration, with its path."""
    if isinstance(value, Norm | Scale | Gate):
        names: tuple[str, ...] = ("alpha", "weight_init", "scale") if isinstance(value, Norm) else ("value",)
        names += ("warmup",) if isinstance(value, Scale) else ()
        yield from ((f"{path}.{n}", getattr(value, n)) for n in names if getattr(value, n) is not None)
    own = {Second: ("write",), Streams: ("entry", "share"), Mix: ("scale", "first")}.get(type(value), ())
    yield from ((f"{path}.{name}", getattr(value, name)) for name in own)
    if isinstance(value, Layer | SubLayer | Residual | Second | Streams | Mix | Init):
        for item in fields(value):
            yield from formulas(getattr(value, item.name), f"{path}.{item.name}")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield f"{path}.{key}", item
    elif isinstance(value, tuple):
        for i, (_, layer) in enumerate(value):
            yield from formulas(layer, f"{path}[{i}]")


def check_where(path: str, where: Where) -> None:
    if where.rule not in ("first", "last", "fraction"):
        raise SchemeError(f"{path}: no rule '{where.rule}'; rules are first, last, fraction")
    if where.rule == "fraction" and not 0 <= where.low <= where.high <= 1:
        raise SchemeError(f"{path}: fraction({where.low}, {where.high}) is no part of a stack; 0 <= low <= high <= 1")
    if where.rule != "fraction" and (where.high < 0 or where.high != int(where.high)):
        raise SchemeError(f"{path}: {where.rule}({where.high}) is no number of layers")


def check_layer(path: str, layer: Layer) -> None:
    for part, kind in (("attention", Attention), ("cross_attention", Attention), ("ffn", FFN)):
        sub = getattr(layer, part)
        if sub is None and part == "cross_attention":
            continue
        if not isinstance(sub, kind):
            raise SchemeError(f"{path}.{part}: give {kind.__name__}(...), not {sub!r}")
        _check_sublayer(f"{path}.{part}", sub)
        if part != "ffn" and sub.residual.layer_input:
            raise SchemeError(
                f"{path}.{part}.residual.layer_input: only the last sub-layer, ffn, may add the layer's input"
            )
    parts = [part for part in (layer.attention, layer.cross_attention, layer.ffn) if part is not None]
    for name in ("skip", "branch", "gate"):
        factors = [getattr(part.residual, name) for part in parts]
        if any(factor is not None and factor.shared for factor in factors) and any(
            factor != factors[0] for factor in factors
        ):
            raise SchemeError(
                f"{path}: residual.{name}.shared: attention and ffn (and cross_attention) share a factor, so declare it "
                "alike in all"
            )


def _check_sublayer(path: str, sub: SubLayer) -> None:
    residual = sub.residual
    if not isinstance(residual, Residual):
        raise SchemeError(f"{path}.residual: give Residual(...), not {residual!r}")
    if residual.rule not in RULES:
        raise SchemeError(f"{path}.residual.rule: no rule '{residual.rule}'; rules are {', '.join(RULES)}")
    if residual.source not in SOURCES:
        raise SchemeError(f"{path}.residual.source: '{residual.source}' is none of {', '.join(SOURCES)}")
    if residual.source == "input" and sub.input is None:
        raise SchemeError(f"{path}.residual.source: 'input' needs an input norm; without one it is the stream itself")
    if residual.source == "input" and sub.post is not None:
        raise SchemeError(f"{path}.post: a post norm has one residual source, the stream; source is 'input'")
    for name in ("skip", "branch"):
        _check_scale(f"{path}.residual.{name}", getattr(residual, name))
    _check_gate(f"{path}.residual.gate", residual.gate, sub)
    _check_second(f"{path}.second", sub.second, residual)
    if sub.mix is not None:
        check_mix(f"{path}.mix", sub.mix)
        if residual != Residual() or sub.post is not None:
            raise SchemeError(
                f"{path}.mix: streams mixed by token have no other residual and no post norm; leave them out"
            )
    if isinstance(sub, Attention) and sub.head_scale not in (None, "pre_projection", "post_projection"):
        raise SchemeError(f"{path}.head_scale: '{sub.head_scale}' is neither 'pre_projection' nor 'post_projection'")
    for item in fields(sub):
        if item.name not in ("residual", "head_scale", "second", "mix"):
            sites = ("width", "head") if item.name in ("q", "k", "v", "context") else ("width",)
            check_norm(f"{path}.{item.name}", getattr(sub, item.name), sites)


def _check_scale(path: str, scale: Scale) -> None:
    if not isinstance(scale, Scale):
        raise SchemeError(f"{path}: give Scale(...), in YAML {{value: ...}}, not {scale!r}")
    if scale.learned not in (None, "scalar", "width"):
        raise SchemeError(
            f"{path}.learned: '{scale.learned}' is neither 'scalar' nor 'width'; leave it out for a constant"
        )
    if scale.learned is not None and scale.warmup != 0.0:
        raise SchemeError(f"{path}.warmup: a learned factor moves by itself; leave learned or warmup out")
    if scale.shared and scale.learned is None:
        raise SchemeError(f"{path}.shared: a constant has nothing to share; set learned, or leave shared out")


def _check_second(path: str, second: Second | None, residual: Residual) -> None:
    if second is None:
        return
    if not isinstance(second, Second):
        raise SchemeError(f"{path}: give Second(...) or None, in YAML {{write: ...}} or null, not {second!r}")
    if residual.source != "stream" or residual.layer_input:
        raise SchemeError(
            f"{path}: beside a second stream the residual adds to the first; leave source and layer_input"
        )
    check_norm(f"{path}.start", second.start, ("width",))
    check_norm(f"{path}.read", second.read, ("width",))
    _check_scale(f"{path}.share", second.share)
    if second.share != Scale() and second.read is None:
        raise SchemeError(f"{path}.share: F reads the first stream alone; give read, or leave share out")
    if second.share.shared or second.share.warmup != 0.0:
        raise SchemeError(f"{path}.share: it is this sub-layer's own and does not grow; leave shared and warmup out")


def check_mix(path: str, mix: Mix) -> None:
    if not isinstance(mix, Mix):
        raise SchemeError(f"{path}: give Mix(...) or None, in YAML {{streams: ...}} or null, not {mix!r}")
    if mix.rule not in MIXES:
        raise SchemeError(f"{path}.rule: no rule '{mix.rule}'; rules are {', '.join(MIXES)}")
    for name, least in (("streams", 2), ("rounds", 1)):
        number = getattr(mix, name)
        if not isinstance(number, int) or isinstance(number, bool) or number < least:
            raise SchemeError(f"{path}.{name}: {number!r} is no whole number from {least}")
    if not mix.eps >= 0:
        raise SchemeError(f"{path}.eps: {mix.eps} is negative")
    if mix.norm is None:
        raise SchemeError(f"{path}.norm: what a token's weights are read from is normalized; give Norm(...)")
    check_norm(f"{path}.norm", mix.norm, ("width",))


def check_streams(path: str, sub: SubLayer, streams: Streams | None) -> None:
    """Whether a sub-layer has the streams that its scheme has."""
    if streams is not None and streams.mixed:
        if sub.second is not None or sub.mix is None or sub.mix.streams != streams.mixed:
            raise SchemeError(
                f"{path}: every sub-layer mixes the {streams.mixed} of streams.mixed; declare mix alike in all"
            )
        return
    if sub.mix is not None:
        raise SchemeError(f"{path}: mix needs streams, with mixed={sub.mix.streams}")
    if (sub.second is None) != (streams is None):
        raise SchemeError(f"{path}: two streams are declared by streams, and by second in every sub-layer")


def check_ends(path: str, streams: Streams | None) -> None:
    if streams is None:
        return
    for end in ("x", "y"):
        check_norm(f"{path}.{end}", getattr(streams, end), ("width",))
    if streams.mixed and (streams.x is not None or streams.y is not None or streams.entry != 1.0):
        raise SchemeError(
            f"{path}: entry, x and y are of two streams, not of {streams.mixed} mixed ones; leave them out"
        )
    if not streams.mixed and (streams.exit is not None or streams.share != 1.0):
        raise SchemeError(f"{path}: share and exit are of mixed streams; set mixed, or leave them out")
    if streams.exit is not None:
        check_mix(f"{path}.exit", streams.exit)
        if streams.exit.rule != "sinkhorn" or streams.exit.streams != streams.mixed or streams.share != 1.0:
            raise SchemeError(
                f"{path}.exit: the end reads all {streams.mixed} streams by rule 'sinkhorn', in place of share"
            )


def _check_gate(path: str, gate: Gate | None, sub: SubLayer) -> None:
    if gate is None:
        return
    if not isinstance(gate, Gate):
        raise SchemeError(f"{path}: give Gate(...) or None, in YAML {{on: ...}} or null, not {gate!r}")
    if gate.on not in ("stream", "skip"):
        raise SchemeError(f"{path}.on: '{gate.on}' is neither 'stream' nor 'skip'")
    if gate.on == "stream" and sub.post is not None:
        raise SchemeError(f"{path}.on: a post norm undoes what damps the whole stream; set on to 'skip'")


def check_norm(path: str, norm: Norm | None, over: tuple[str, ...]) -> None:
    if norm is None:
        return
    if not isinstance(norm, Norm):
        raise SchemeError(f"{path}: give Norm(...) or None, in YAML {{}} or null, not {norm!r}")
    if norm.over not in over:
        raise SchemeError(f"{path}.over: '{norm.over}' is not possible at this site; it takes {' or '.join(over)}")
    if norm.kind is not None and norm.kind not in NORM_KINDS:
        raise SchemeError(f"{path}.kind: no norm kind '{norm.kind}'; kinds are {', '.join(NORM_KINDS)}")
    if norm.gain is not None and norm.gain not in GAINS:
        raise SchemeError(f"{path}.gain: no gain '{norm.gain}'; gains are {', '.join(GAINS)}")
    if norm.gain == "per_head" and norm.over != "head":
        raise SchemeError(f"{path}.gain: 'per_head' needs over='head'")
    if norm.cast not in (None, "before_gain", "after_gain"):
        raise SchemeError(f"{path}.cast: '{norm.cast}' is neither 'before_gain' nor 'after_gain'")
    if norm.eps is not None and not norm.eps >= 0:
        raise SchemeError(f"{path}.eps: {norm.eps} is negative")
