"""What a normalization scheme is: a value.

A scheme says, for every sub-layer ``F`` of a transformer, where one normalizes and what is added to what:

    u  = input(x)                           Pre-LN, NormFormer, Sandwich
    y  = output(F(u))                       Sandwich, OLMo2: before the add
    r  = x  or  u                           Residual.source
    x' = post(skip * r + branch * y)        Post-LN, DeepNorm: after the add

An absent norm is the identity. Inside ``F`` further norms may stand: ``q``, ``k``, ``v``, ``context`` (before W_o) and
``inner`` (before W_down). Nothing here is a tensor and nothing here runs: ``norms/resolve.py`` turns the formulas into
numbers, ``layers/sublayer.py`` reads the numbers. Only the standard library is imported.

Two streams X and Y (``Second``, ``Streams``): X is the stream above, Y gathers what branches say and may be read with it.

Room for what is not here yet, each by a field whose default leaves today's schemes as they are. More streams, mixed by token
(hyper-connections): ``Residual.rule`` names another rule of ``layers/residual.py``, with parameters of its own. A projection of
weights after each step: a field of Init, by role.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal


@dataclass(frozen=True)
class Depth:
    """Where a layer stands; what every formula of a scheme may look at.

    index: 1-based, global (a pipeline stage does not renumber). layers: of this stack. stack: "only" for a model with
    one stack, else "encoder" or "decoder"; encoder_layers and decoder_layers are both set in the latter case.
    """

    index: int
    layers: int
    stack: Literal["only", "encoder", "decoder"] = "only"
    encoder_layers: int = 0
    decoder_layers: int = 0


Formula = float | Callable[[Depth], float]

NORM_KINDS = ("layernorm", "rmsnorm", "l2", "scalenorm", "dyt", "derf", "seednorm")
GAINS = ("vector", "scalar", "one_plus", "per_head", "none")
SOURCES = ("stream", "input")
RULES = ("add",)
BLOCK_ROLES = ("q", "k", "v", "o", "up", "gate", "down", "router")
ROLES = ("embed", "position", *BLOCK_ROLES, "head")


@dataclass(frozen=True)
class Norm:
    """One norm slot.

    over: "width" normalizes the whole last axis of the site, "head" each head's features, one gain shared by all heads
    unless gain is "per_head" (a gain of [heads of the site, hd]).
    kind, gain, bias, eps, cast, alpha: None means "as the model has it" (NormConfig).
    weight_init: initial gain. scale: constant factor on the norm's output, after gain and bias (LayerNorm Scaling).
    alpha: initial value of DyT's and Derf's scalar inside tanh / erf.
    """

    over: Literal["width", "head"] = "width"
    kind: str | None = None
    gain: str | None = None
    bias: bool | None = None
    eps: float | None = None
    cast: Literal["before_gain", "after_gain"] | None = None
    alpha: Formula | None = None
    weight_init: Formula = 1.0
    scale: Formula = 1.0


@dataclass(frozen=True)
class Scale:
    """A factor on the skip or the branch of a residual: a constant, or a parameter that starts at ``value``.

    learned: None (constant), "scalar", or "width" (a vector of d). shared: one parameter for all sub-layers of a layer.
    warmup: optimizer steps over which a constant grows from 0: in step t, from 1, it is value * min(t / warmup, 1).
    """

    value: Formula = 1.0
    learned: Literal["scalar", "width"] | None = None
    shared: bool = False
    warmup: Formula = 0.0


@dataclass(frozen=True)
class Gate:
    """A learned scalar g that damps what passes, and no gradient: x - silu(g) * stop_gradient(x) (GPAS).

    on: the "stream" after the add, or the "skip" before its factor. value: where g starts. shared: one for all sub-layers of
    a layer.
    """

    on: Literal["stream", "skip"] = "stream"
    value: Formula = 0.0
    shared: bool = True


@dataclass(frozen=True)
class Residual:
    """x' = post(skip * r + branch * y [+ layer input]).

    rule: the residual rule by name; "add" is the only one with a single static stream.
    source: r is the stream ("stream") or the input norm's output ("input", as in HybridNorm's FFN).
    layer_input: add the input of the whole layer as well (B2T). gate: of the stream or of r; None: there is none.
    """

    rule: str = "add"
    skip: Scale = Scale()
    branch: Scale = Scale()
    source: Literal["stream", "input"] = "stream"
    layer_input: bool = False
    gate: Gate | None = None


@dataclass(frozen=True)
class Second:
    """What a sub-layer does with a second stream Y beside the first one, X (ResiDual, SiameseNorm).

    X becomes start(X) before anything else. F reads share * X + read(Y); without ``read`` X alone. Then Y' = Y + write * y with
    the same y = output(F(u)) that the residual takes, and X' is the residual's, post norm and all.
    """

    start: Norm | None = None
    read: Norm | None = None
    share: Scale = Scale()
    write: Formula = 1.0


@dataclass(frozen=True)
class Streams:
    """The ends of two streams: X begins as the embedding and Y as ``entry`` times it; behind the last layer x(X) + y(Y) goes
    to the final norm. An absent norm is the identity."""

    entry: Formula = 1.0
    x: Norm | None = None
    y: Norm | None = None


@dataclass(frozen=True)
class SubLayer:
    """The norm sites around a branch, and how the branch returns to the stream. second: with a second stream."""

    input: Norm | None = None
    output: Norm | None = None
    post: Norm | None = None
    residual: Residual = Residual()
    second: Second | None = None


@dataclass(frozen=True)
class Attention(SubLayer):
    """Attention's own sites. q, k (before RoPE), v: on the projections; context: before W_o.

    head_scale: one learned scalar a head, on the context ("pre_projection", the NormFormer paper's place) or on
    head-sized slices of W_o's output ("post_projection", the place in its published code).
    """

    q: Norm | None = None
    k: Norm | None = None
    v: Norm | None = None
    context: Norm | None = None
    head_scale: Literal["pre_projection", "post_projection"] | None = None


@dataclass(frozen=True)
class FFN(SubLayer):
    """The feed-forward's own site. inner: over the f activations before W_down."""

    inner: Norm | None = None


@dataclass(frozen=True)
class Layer:
    """A transformer layer. cross_attention None: like attention. It serves decoders of encoder-decoder models only, between
    attention and ffn; its k and v sites are on projections of the encoder's output, the others as in attention."""

    attention: Attention = Attention()
    ffn: FFN = FFN()
    cross_attention: Attention | None = None


@dataclass(frozen=True)
class Where:
    """Which layers of a stack an override replaces: 1-based indices from ``low`` * L + 1 to ``high`` * L, by rule."""

    rule: Literal["first", "last", "fraction"]
    low: float = 0.0
    high: float = 0.0

    @staticmethod
    def first(n: int) -> "Where":
        return Where("first", high=n)

    @staticmethod
    def last(n: int) -> "Where":
        return Where("last", high=n)

    @staticmethod
    def fraction(low: float, high: float) -> "Where":
        """Layers l (0-based) with floor(low * L) <= l < floor(high * L)."""
        return Where("fraction", low, high)

    def holds(self, depth: Depth) -> bool:
        if self.rule == "first":
            return depth.index <= self.high
        if self.rule == "last":
            return depth.index > depth.layers - self.high
        low, high = (math.floor(part * depth.layers + 1e-9) for part in (self.low, self.high))
        return low < depth.index <= high


@dataclass(frozen=True)
class Init:
    """How hidden matrices start: a distribution (None: the user's) times a gain by role on each logical matrix.

    Embeddings and the head are the user's. "cross.v" overrides "v" in cross-attention. Roles without an entry: gain 1.
    unscaled_only: warn when combined with depth-scaled initialization (1/sqrt(2L) on o and down).
    """

    distribution: Literal["normal", "xavier_normal", "xavier_uniform", "uniform_fan_in"] | None = None
    gain: Mapping[str, Formula] = field(default_factory=dict)
    unscaled_only: bool = False


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


class SchemeError(ValueError):
    """A scheme that cannot mean anything; the message begins with the field's path."""


def evaluate(formula: Formula, depth: Depth, path: str) -> float:
    """The number that a formula gives at a depth. Raises SchemeError if it fails there or is not finite."""
    try:
        number = float(formula(depth) if callable(formula) else formula)
    except Exception as error:
        raise SchemeError(f"{path}: the formula fails at {_place(depth)}: {error}") from error
    if not math.isfinite(number):
        raise SchemeError(f"{path}: the formula gives {number} at {_place(depth)}")
    return number


def _place(depth: Depth) -> str:
    stack = "" if depth.stack == "only" else f" of the {depth.stack}"
    return f"layer {depth.index} of {depth.layers}{stack}"


def check(scheme: Scheme) -> None:
    """Refuse an impossible scheme where it is declared. Raises SchemeError naming the field."""
    layers = [("layer", scheme.layer)]
    for i, (where, layer) in enumerate(scheme.overrides):
        _check_where(f"{scheme.name}: overrides[{i}]", where)
        layers.append((f"overrides[{i}]", layer))
    for path, layer in layers:
        _check_layer(f"{scheme.name}: {path}", layer)
        for sub in (layer.attention, layer.cross_attention, layer.ffn):
            if sub is not None and (sub.second is None) != (scheme.streams is None):
                raise SchemeError(
                    f"{scheme.name}: {path}: two streams are declared by streams, and by second in every sub-layer"
                )
    for end in ("x", "y"):
        _check_norm(f"{scheme.name}: streams.{end}", getattr(scheme.streams, end, None), ("width",))
    for part in ("embedding", "final"):
        _check_norm(f"{scheme.name}: {part}", getattr(scheme, part), ("width",))
    for role in scheme.init.gain:
        if role.removeprefix("cross.") not in BLOCK_ROLES:
            known = ", ".join(BLOCK_ROLES)
            raise SchemeError(
                f"{scheme.name}: init.gain: no matrix of a block has the role '{role}'; roles are {known}"
            )
    for path, formula in _formulas(scheme, scheme.name):
        if not callable(formula):
            evaluate(formula, Depth(1, 1), path)
            continue
        for depth in PROBES:
            evaluate(formula, depth, path)


def _probes() -> Iterator[Depth]:
    for layers in (1, 2, 3, 12, 1000):
        for index in sorted({1, 2, layers // 2, layers} & set(range(1, layers + 1))):
            yield Depth(index, layers)
            yield Depth(index, layers, "encoder", layers, 6)
            yield Depth(index, layers, "decoder", 6, layers)


PROBES = tuple(_probes())


def _formulas(value: Any, path: str) -> Iterator[tuple[str, Formula]]:
    """Every number or formula in a declaration, with its path."""
    if isinstance(value, Norm | Scale | Gate):
        names: tuple[str, ...] = ("alpha", "weight_init", "scale") if isinstance(value, Norm) else ("value",)
        names += ("warmup",) if isinstance(value, Scale) else ()
        yield from ((f"{path}.{n}", getattr(value, n)) for n in names if getattr(value, n) is not None)
    if isinstance(value, Second | Streams):
        number = "write" if isinstance(value, Second) else "entry"
        yield f"{path}.{number}", getattr(value, number)
    if isinstance(value, Scheme | Layer | SubLayer | Residual | Second | Streams | Init):
        start = f"{path}: " if isinstance(value, Scheme) else f"{path}."
        for item in fields(value):
            yield from _formulas(getattr(value, item.name), start + item.name)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield f"{path}.{key}", item
    elif isinstance(value, tuple):
        for i, (_, layer) in enumerate(value):
            yield from _formulas(layer, f"{path}[{i}]")


def _check_where(path: str, where: Where) -> None:
    if where.rule not in ("first", "last", "fraction"):
        raise SchemeError(f"{path}: no rule '{where.rule}'; rules are first, last, fraction")
    if where.rule == "fraction" and not 0 <= where.low <= where.high <= 1:
        raise SchemeError(f"{path}: fraction({where.low}, {where.high}) is no part of a stack; 0 <= low <= high <= 1")
    if where.rule != "fraction" and (where.high < 0 or where.high != int(where.high)):
        raise SchemeError(f"{path}: {where.rule}({where.high}) is no number of layers")


def _check_layer(path: str, layer: Layer) -> None:
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
    if isinstance(sub, Attention) and sub.head_scale not in (None, "pre_projection", "post_projection"):
        raise SchemeError(f"{path}.head_scale: '{sub.head_scale}' is neither 'pre_projection' nor 'post_projection'")
    for item in fields(sub):
        if item.name not in ("residual", "head_scale", "second"):
            sites = ("width", "head") if item.name in ("q", "k", "v", "context") else ("width",)
            _check_norm(f"{path}.{item.name}", getattr(sub, item.name), sites)


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
    _check_norm(f"{path}.start", second.start, ("width",))
    _check_norm(f"{path}.read", second.read, ("width",))
    _check_scale(f"{path}.share", second.share)
    if second.share != Scale() and second.read is None:
        raise SchemeError(f"{path}.share: F reads the first stream alone; give read, or leave share out")
    if second.share.shared or second.share.warmup != 0.0:
        raise SchemeError(f"{path}.share: it is this sub-layer's own and does not grow; leave shared and warmup out")


def _check_gate(path: str, gate: Gate | None, sub: SubLayer) -> None:
    if gate is None:
        return
    if not isinstance(gate, Gate):
        raise SchemeError(f"{path}: give Gate(...) or None, in YAML {{on: ...}} or null, not {gate!r}")
    if gate.on not in ("stream", "skip"):
        raise SchemeError(f"{path}.on: '{gate.on}' is neither 'stream' nor 'skip'")
    if gate.on == "stream" and sub.post is not None:
        raise SchemeError(f"{path}.on: a post norm undoes what damps the whole stream; set on to 'skip'")


def _check_norm(path: str, norm: Norm | None, over: tuple[str, ...]) -> None:
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
