"""What schemes are made of: norms, factors, residuals, sub-layers, layers, initialization. Values, nothing that runs.

``norms/scheme.py`` says how they belong together. Only the standard library is imported.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal


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
BLOCK_ROLES = ("q", "k", "v", "o", "up", "gate", "down", "router", "mix")
MIXES = ("tanh", "sinkhorn")
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
class Mix:
    """How n streams X_1 .. X_n are read, mixed and written to, by weights that each token gives them (hyper-connections).

    F reads sum_s read_s X_s; then X_t' = sum_s mix_st X_s + write_t * y, y = output(F(u)). With a learned map M, learned
    scales c that start at ``scale`` and learned biases b:

    rule "tanh": (read_s, mix_s1 .. mix_sn, write_s) = c tanh(M norm(X_s)) + b_s, c one for read and mix, one for write. b
    starts such that F reads stream ``first``, every stream stays what it is, and y goes to all.
    rule "sinkhorn": with m = c M norm(X_1, .., X_n side by side) + b, c one for each of the three, b starting at 0:
    read = sigmoid(m) + eps, write = 2 sigmoid(m), mix = softmax(m) by row + eps, whose columns, then ``rounds`` - 1 times
    rows and columns, are divided by their sums + eps.
    """

    streams: int = 4
    rule: Literal["tanh", "sinkhorn"] = "sinkhorn"
    norm: Norm | None = None
    scale: Formula = 0.01
    first: Formula = 0.0
    rounds: int = 20
    eps: float = 1e-6

    def kinds(self, *, exits: bool = False) -> tuple[int, ...]:
        """For each row of M, which of the learned scales it has; exits: where streams are only read."""
        n = self.streams
        if self.rule == "tanh":
            return *(0,) * (n + 1), 1
        return (0,) * n if exits else (*(0,) * n, *(1,) * n, *(2,) * (n * n))

    def biases(self, *, exits: bool = False) -> int:
        """How many there are: rule "tanh" has its own for each stream."""
        return len(self.kinds(exits=exits)) * (self.streams if self.rule == "tanh" else 1)


@dataclass(frozen=True)
class Streams:
    """The ends of two streams: X begins as the embedding and Y as ``entry`` times it; behind the last layer x(X) + y(Y) goes
    to the final norm. An absent norm is the identity.

    mixed: the number of streams where they are mixed by token (``Mix``), else 0. Each of those begins as the embedding, and
    ``share`` times their sum goes to the final norm, or what F would read of them by ``exit``.
    """

    entry: Formula = 1.0
    x: Norm | None = None
    y: Norm | None = None
    mixed: int = 0
    share: Formula = 1.0
    exit: Mix | None = None

    @property
    def count(self) -> int:
        return self.mixed or 2


@dataclass(frozen=True)
class SubLayer:
    """The norm sites around a branch, and how the branch returns to the stream. second: with a second stream. mix: with
    streams mixed by token, in place of the residual."""

    input: Norm | None = None
    output: Norm | None = None
    post: Norm | None = None
    residual: Residual = Residual()
    second: Second | None = None
    mix: Mix | None = None


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

    def each(self, change: Callable[[SubLayer], SubLayer]) -> "Layer":
        """With every sub-layer changed alike; ``change`` gives back the kind that it got."""
        parts = {"attention": self.attention, "ffn": self.ffn, "cross_attention": self.cross_attention}
        return replace(self, **{name: change(part) for name, part in parts.items() if part is not None})  # type: ignore[arg-type]


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
