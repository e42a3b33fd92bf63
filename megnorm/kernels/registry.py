"""Which implementation serves which operation: offers, refusals, one choice at build time."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

OPS = ("norm", "attention", "activation", "rope", "grouped_gemm")


@dataclass(frozen=True)
class Need:
    """What a layer asks for: the operation, where it runs, and what it must be able to do.

    kind: norm kind or activation name. sharded: statistics cross ranks. dropout: attention dropout is on.
    """

    op: str
    device: str
    dtype: torch.dtype
    kind: str = ""
    head_dim: int = 0
    sharded: bool = False
    dropout: bool = False


@dataclass(frozen=True)
class Offer:
    """A backend's implementation of one operation. refuse: the reason it cannot serve a need, or None."""

    op: str
    backend: str
    priority: int
    refuse: Callable[[Need], str | None]
    make: Callable[[Need], Callable[..., Any]]


@dataclass(frozen=True)
class Choice:
    """One line of the start-up report."""

    need: Need
    backend: str
    refusals: tuple[tuple[str, str], ...]


_offers: list[Offer] = []
_choices: dict[Need, Choice] = {}


def offer(op: str, backend: str, priority: int, refuse: Callable[[Need], str | None]) -> Callable[..., Any]:
    """Decorator on ``make(need) -> callable``: register it as a backend's offer for ``op``."""

    def add(make: Callable[[Need], Callable[..., Any]]) -> Callable[[Need], Callable[..., Any]]:
        _offers.append(Offer(op, backend, priority, refuse, make))
        return make

    return add


def offers(op: str | None = None) -> list[Offer]:
    """All offers (for one operation), best first, of the backends imported so far (kernels/backends.py imports all)."""
    return sorted((o for o in _offers if op in (None, o.op)), key=lambda o: -o.priority)


def choose(need: Need, prefer: Mapping[str, str]) -> Callable[..., Any]:
    """The implementation for ``need``: the preferred backend, else the best that does not refuse.

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
        reason = candidate.refuse(need)
        if reason is None:
            _choices[need] = Choice(need, candidate.backend, tuple(refusals))
            return candidate.make(need)
        refusals.append((candidate.backend, reason))
    known = ", ".join(sorted({o.backend for o in offers(need.op)}))
    why = "; ".join(f"{backend}: {reason}" for backend, reason in refusals)
    raise ValueError(
        f"kernels.prefer.{need.op}: backend '{wanted}' "
        + (f"refuses ({why}); remove the preference" if refusals else f"is not installed; there is {known}")
    )


def report() -> list[Choice]:
    """Every choice made so far in this process."""
    return list(_choices.values())
