"""Which implementation serves which operation: offers, refusals, one choice at build time."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

OPS = {
    "norm": "N(x)",
    "sharded_norm": "N(x), the features spread over tp ranks",
    "add_norm": "N(skip x + branch f), and the sum where it goes on",
    "norm_add": "skip x + branch N(f)",
    "norm_add_norm": "x' = skip x + branch N(f), and N'(x')",
    "qkv_norm_rope": "norms of q, k, v by head, then the rotation of q and k",
    "act_stats": "N(act(h)), the activation in the pass that gathers statistics",
    "head_scale": "y times one scalar a head",
    "attention": "causal softmax attention",
    "rope": "rotary positions",
    "activation": "act(x), or act(gate) * up",
    "cross_entropy": "token losses over a vocabulary spread over tp ranks",
    "linear": "x W^T + b",
    "norm_linear": "N(x) W^T + b, and N(x) where it goes on",
    "permute": "tokens to the order of their experts, and back",
    "grouped_gemm": "one product for each expert",
    "adamw": "the update of masters and moments",
}


@dataclass(frozen=True)
class NormForm:
    """What a kernel must know of a norm: its kind, the features it sees (n, of which a rank holds ``width``), its form.

    gain: "vector" (one value a feature, also where a scalar was expanded), "wide" (such a vector in fp32: 1 + w),
    "per_head" ([heads, hd]) or "none". cast_first: an RMSNorm rounds to the input's dtype before its gain.
    """

    kind: str
    width: int
    gain: str = "vector"
    bias: bool = False
    cast_first: bool = False


@dataclass(frozen=True)
class Scores:
    """What happens to attention scores beside causality and a mask; each is named in ``FEATURES``.

    scale: factor on q k; None: 1 / sqrt(head_dim). softcap: c in c tanh(score / c), before what follows. window: how many
    tokens a token sees, itself included. alibi: the slopes of this rank's heads; -slope * distance is added.
    """

    scale: float | None = None
    softcap: float | None = None
    window: int | None = None
    alibi: tuple[float, ...] = ()

    def asked(self) -> frozenset[str]:
        """The features that a kernel must have."""
        return frozenset(name for name in FEATURES if getattr(self, name) not in (None, ()))


FEATURES = {
    "scale": "factor of its own on scores (model.attention.scale)",
    "softcap": "cap on scores (model.attention.softcap)",
    "window": "sliding window (model.attention.window)",
    "alibi": "linear biases (model.positions=alibi)",
}


@dataclass(frozen=True)
class Need:
    """What a layer asks for: the operation, where it runs, and what it must be able to do.

    kind: an activation's name. gated: it multiplies a second input. norms: of the operation, in order (None: absent).
    heads, kv_heads: on this rank. mask: a mask beside causality (padding). causal: nobody looks to its right.
    packed: documents that do not see each other. features: of a product, in and out, on this rank; biased: it adds a bias
    (attention: to scores); tokens: its rows in a micro-batch (0: not known); quantize: the recipe (kernels.fp8), "" for none.
    ranks: over which its outputs are spread, where the operation communicates itself; split_tokens: its input's tokens are
    spread over them too. keep: the norm's output is wanted.

    dropout: of attention weights. scores: what happens to them beside causality and a mask. deterministic: the same bits every
    run. capture: it will run in a CUDA graph. compiled: the run lets PyTorch's compiler serve.
    """

    op: str
    device: str
    dtype: torch.dtype
    kind: str = ""
    gated: bool = False
    norms: tuple[NormForm | None, ...] = ()
    sharded: bool = False
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    mask: bool = False
    causal: bool = True
    packed: bool = False
    features: tuple[int, int] = (0, 0)
    biased: bool = False
    tokens: int = 0
    quantize: str = ""
    ranks: int = 1
    split_tokens: bool = False
    keep: bool = False
    dropout: bool = False
    scores: Scores = Scores()
    deterministic: bool = False
    capture: bool = False
    compiled: bool = False

    @property
    def norm(self) -> NormForm:
        """The norm of an operation that has one."""
        form = self.norms[0]
        assert form is not None
        return form


Refusal = str | None


@dataclass(frozen=True)
class Offer:
    """A backend's implementation of one operation. refuse: its own reason why it cannot serve a need, or None.

    scores: the features of ``Scores`` that it has; ``reason`` refuses for it what asks for others, so that a kernel that knows
    nothing of one never drops it.
    """

    op: str
    backend: str
    priority: int
    refuse: Callable[[Need], Refusal]
    make: Callable[[Need], Callable[..., Any]]
    scores: frozenset[str] = frozenset()

    def reason(self, need: Need) -> Refusal:
        """Why it cannot serve ``need``; None if it can."""
        lacking = sorted(need.scores.asked() - self.scores)
        return f"has no {FEATURES[lacking[0]]}" if lacking else self.refuse(need)


@dataclass(frozen=True)
class Choice:
    """One line of the start-up report."""

    need: Need
    backend: str
    refusals: tuple[tuple[str, str], ...]


@runtime_checkable
class Keeper(Protocol):
    """An implementation that keeps something between calls, which checkpoints hold.

    unit: what recompute computes at the moment, for the first time or again; whoever builds the implementation sets it.
    state: tensors by name, the same on all ranks of a stage; written in place when a run continues.
    """

    unit: Callable[[], object | None]

    def state(self) -> dict[str, Tensor]: ...


_offers: list[Offer] = []
_choices: dict[Need, Choice] = {}


def offer(
    op: str, backend: str, priority: int, refuse: Callable[[Need], Refusal], scores: Iterable[str] = ()
) -> Callable[..., Any]:
    """Decorator on ``make(need) -> callable``: register it as a backend's offer for ``op``."""
    assert op in OPS, op

    def add(make: Callable[[Need], Callable[..., Any]]) -> Callable[[Need], Callable[..., Any]]:
        _offers.append(Offer(op, backend, priority, refuse, make, frozenset(scores)))
        return make

    return add


def offers(op: str | None = None) -> list[Offer]:
    """All offers (for one operation), best first, of the backends imported so far (kernels/backends.py imports all)."""
    return sorted((o for o in _offers if op in (None, o.op)), key=lambda o: -o.priority)


def choose(
    need: Need, prefer: Mapping[str, str], check: Callable[[Offer, Need], Refusal] = lambda offer, need: None
) -> Offer:
    """The offer that serves ``need``: the preferred backend's, else the best that does not refuse and passes ``check``.

    Raises ValueError when the preferred backend is unknown or refuses: a wish is never dropped silently.
    """
    for op in prefer:
        if op not in OPS:
            raise ValueError(f"kernels.prefer.{op}: there is no such operation; there are {', '.join(OPS)}")
    wanted = prefer.get(need.op)
    refusals: list[tuple[str, str]] = []
    for candidate in offers(need.op):
        if wanted is not None and candidate.backend != wanted:
            continue
        reason = candidate.reason(need) or check(candidate, need)
        if reason is None:
            _choices[need] = Choice(need, candidate.backend, tuple(refusals))
            return candidate
        refusals.append((candidate.backend, reason))
    known = ", ".join(sorted({o.backend for o in offers(need.op)}))
    why = "; ".join(f"{backend}: {reason}" for backend, reason in refusals)
    if wanted is None:
        key = f"kernels.fp8={need.quantize}" if need.quantize else "kernels"
        raise ValueError(f"{key}: nothing on this machine serves the operation '{need.op}' ({why})")
    raise ValueError(
        f"kernels.prefer.{need.op}: backend '{wanted}' "
        + (f"refuses ({why}); remove the preference" if refusals else f"is not known; there is {known}")
    )


def report() -> list[Choice]:
    """Every choice made so far in this process."""
    return list(_choices.values())


def summary() -> list[str]:
    """The report in words, one line an operation: who serves it, and why nobody better does."""
    served: dict[str, dict[str, set[str]]] = {}
    for choice in report():
        why = served.setdefault(choice.need.op, {}).setdefault(choice.backend, set())
        why |= {f"{backend} {reason}" for backend, reason in choice.refusals}
    return [
        f"{op}: " + "; ".join(backend + (f" ({', '.join(sorted(why))})" if why else "") for backend, why in by.items())
        for op, by in sorted(served.items())
    ]


def check_agreement(mine: Mapping[Need, str], other: Mapping[str, str]) -> None:
    """Compare this rank's choices with those of another (need in words -> backend). Raises ValueError where they differ."""
    for need, backend in mine.items():
        theirs = other.get(str(need), backend)
        if theirs != backend:
            raise ValueError(
                f"kernels: '{need.op}' is served by {backend} on one rank and by {theirs} on another; install the same "
                f"libraries everywhere, or set kernels.prefer.{need.op}"
            )
