"""Tokens to experts and back: who goes where, in which order, over the ranks that share the experts.

A slot is one of the top_k choices of a token. Slots that are kept are sorted by expert, so that each expert finds its rows
in one piece; what it gives is put back into the slots, and added up by token. Both ways are exact inverses: rows are copied.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megnorm.parallel.collectives import all_to_all, exchange
from megnorm.parallel.mesh import Axis


@dataclass(frozen=True)
class Routing:
    """What the sparse layers of a forward pass know of its tokens t = s * b, and where they leave their losses.

    segment: [t] int64, the sequence that a token is of (of packed rows: the document); there are ``count``. real: [t]
    bool, False for padding, which no expert gets; None: no padding. weight: [count], the tokens of a sequence that have a
    loss; None: no losses are asked for. losses: of the layers so far, scalars: sum of weight * mean over the sequence.
    shares: where all layers are balanced together, of each the mean scores and the shares of slots, [count, experts].
    """

    segment: Tensor
    count: int
    real: Tensor | None = None
    weight: Tensor | None = None
    losses: list[Tensor] = field(default_factory=list)
    shares: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @staticmethod
    def of(
        shape: tuple[int, int],
        device: torch.device,
        documents: tuple[int, ...] | None = None,
        real: Tensor | None = None,
        loss_mask: Tensor | None = None,
    ) -> "Routing":
        """For tokens of ``shape`` [s, b]; real, loss_mask: [s, b]."""
        s, b = shape
        if documents is None:
            segment, count = torch.arange(b, device=device).repeat(s), b
        else:
            lengths, count = torch.tensor(documents, device=device), len(documents)
            segment = torch.arange(count, device=device).repeat_interleave(lengths, output_size=s * b)
        weight = None
        if loss_mask is not None:
            weight = loss_mask.new_zeros(count).index_add_(0, segment, loss_mask.flatten())
        return Routing(segment, count, None if real is None else real.flatten(), weight)

    def tokens(self) -> Tensor | int:
        """How many are real."""
        return len(self.segment) if self.real is None else self.real.sum()

    def kept(self, chosen: Tensor, experts: int, capacity: float | None) -> Tensor | None:
        """[t, k] bool: the slots of ``chosen`` [t, k] that are served; None: all.

        Every expert takes ceil(capacity * k / experts * real tokens) slots of a sequence, those of earlier tokens first, so
        that no token depends on later ones, nor on other sequences.
        """
        real = None if self.real is None else self.real[:, None].expand_as(chosen)
        if capacity is None:
            return real
        k, bins = chosen.shape[1], self.count * experts
        key = self.segment[:, None] * experts + chosen
        key = (key if real is None else torch.where(real, key, bins)).flatten()
        sizes = torch.bincount(key, minlength=bins + 1)
        tokens = sizes[:bins].view(self.count, experts).sum(1).div(k, rounding_mode="floor")
        limit = (tokens.double() * (capacity * k / experts) - 1e-9).ceil().clamp_min(1).long()
        order = key.argsort(stable=True)
        place = torch.empty_like(key)
        place[order] = torch.arange(len(key), device=key.device) - (sizes.cumsum(0) - sizes)[key[order]]
        served = place.view_as(chosen) < limit[self.segment][:, None]
        return served if real is None else served & real


class _Send(torch.autograd.Function):
    """[t, d] -> [n, d]: the token of each kept slot, in the order of experts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, k: int) -> Tensor:
        ctx.order, ctx.shape = order, (x.shape[0], k)
        return _spread(x, order, k)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _add_up(grad, ctx.order, *ctx.shape), None, None


class _Combine(torch.autograd.Function):
    """[n, d] -> [t, d]: the sum over the slots of a token, 0 for one that was not kept; the transpose of _Send."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, t: int, k: int) -> Tensor:
        ctx.order, ctx.k = order, k
        return _add_up(rows, order, t, k)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _spread(grad, ctx.order, ctx.k), None, None, None


def _spread(x: Tensor, order: Tensor, k: int) -> Tensor:
    return x.index_select(0, order if k == 1 else order.div(k, rounding_mode="floor"))


def _add_up(rows: Tensor, order: Tensor, t: int, k: int) -> Tensor:
    """Through a copy in the order of slots: adding where several rows may meet would depend on who comes first."""
    empty = rows.new_empty if len(order) == t * k else rows.new_zeros
    slots = empty(t * k, *rows.shape[1:]).index_copy_(0, order, rows)
    return slots if k == 1 else slots.view(t, k, *rows.shape[1:]).sum(1)


class Dispatch:
    """The way of the slots ``chosen`` [t, k] (of experts over all ranks of ``ep``, each with an equal part) and back.

    kept: [t, k] bool; None: all. counts: [experts of this rank], the rows that each gets from all ranks.
    """

    def __init__(self, chosen: Tensor, kept: Tensor | None, experts: int, ep: Axis) -> None:
        self.shape, self.ep = (chosen.shape[0], chosen.shape[1]), ep
        key = (chosen if kept is None else torch.where(kept, chosen, experts)).flatten()
        by_expert = torch.bincount(key, minlength=experts + 1)[:experts]
        self.counts = by_expert
        self.order = key.argsort(stable=True)
        self.regroup: Tensor | None = None
        if kept is not None:
            self.order = self.order[: int(by_expert.sum())]
        if ep.size > 1:
            self._meet(by_expert.view(ep.size, -1))

    def _meet(self, leaving: Tensor) -> None:
        """Learn what comes. leaving: [ranks, experts of a rank] rows. Rows arrive by rank, and are regrouped by expert."""
        n, local = leaving.shape
        coming = all_to_all(leaving, [1] * n, [1] * n, self.ep)
        self.sent, self.received = leaving.sum(1).tolist(), coming.sum(1).tolist()
        expert = torch.arange(local, device=coming.device).repeat(n).repeat_interleave(coming.flatten())
        self.regroup = expert.argsort(stable=True)
        self.counts = coming.sum(0)

    def send(self, x: Tensor) -> Tensor:
        """Tokens [t, d] of this rank -> rows [n, d] of this rank's experts, one expert's behind the other's."""
        return self._forward(_Send.apply(x, self.order, self.shape[1]))

    def send_slots(self, x: Tensor) -> Tensor:
        """Values [t, k] of slots -> [n, 1], beside the rows of ``send``."""
        return self._forward(_Send.apply(x.reshape(-1, 1), self.order, 1))

    def _forward(self, rows: Tensor) -> Tensor:
        """Sorted rows -> those of this rank's experts."""
        if self.regroup is None:
            return rows
        arrived = exchange(rows, self.sent, self.received, self.ep)
        out: Tensor = _Send.apply(arrived, self.regroup, 1)
        return out

    def combine(self, rows: Tensor) -> Tensor:
        """What the experts made of those rows [n, d] -> its sum over the slots of each token of this rank, [t, d]."""
        summed: Tensor = _Combine.apply(self._back(rows), self.order, *self.shape)
        return summed

    def collect(self, rows: Tensor) -> Tensor:
        """The same slot by slot: [t, k, d], zero where not kept."""
        t, k = self.shape
        slots: Tensor = _Combine.apply(self._back(rows), self.order, t * k, 1)
        return slots.view(t, k, *slots.shape[1:])

    def _back(self, rows: Tensor) -> Tensor:
        """Rows of this rank's experts -> the sorted rows of this rank's tokens."""
        if self.regroup is None:
            return rows
        by_rank = _Combine.apply(rows, self.regroup, len(self.regroup), 1)
        return exchange(by_rank, self.received, self.sent, self.ep)
