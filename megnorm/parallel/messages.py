"""Collectives made of messages, for the CPU.

gloo hands a collective to a thread of its own and passes shares around a ring: on one machine a small sum over four ranks
takes three times as long as a message from each to each, a large reduce-scatter, which gloo makes of an all-reduce, twice
as long. The sums here are taken in the order of ranks, so that every rank has the same bits.
"""

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megnorm.parallel.mesh import Axis

SMALL = 1 << 18  # bytes: a larger tensor is summed sooner by gloo, whose ranks add a share each
ABANDONED = timedelta(seconds=30)  # how long messages whose result nobody wants may take to arrive
TAG = 1 << 30  # apart from the tags of the pipeline's messages, which may pass through the same group

REDUCTIONS: dict[dist.ReduceOp.RedOpType, Callable[[Tensor], Tensor]] = {
    dist.ReduceOp.SUM: lambda terms: terms.sum(0, dtype=terms.dtype),
    dist.ReduceOp.MAX: lambda terms: terms.amax(0),
    dist.ReduceOp.MIN: lambda terms: terms.amin(0),
}


class Pending(Protocol):
    """A collective under way. Its result may be read, and what it sends written, behind ``wait``."""

    def wait(self) -> object: ...


class Exchange:
    """A message to each other rank of the axis and one from each, under way; ``end`` runs when all are through.

    sent, received: by rank of the axis; this rank's own are not looked at.
    """

    def __init__(
        self, sent: Sequence[Tensor], received: Sequence[Tensor], axis: Axis, end: Callable[[], object] = lambda: None
    ) -> None:
        self.works: list[dist.Work] = []
        # Every rank begins with its right neighbour, so that not all of them send to the same rank first.
        others = [(axis.rank + i) % axis.size for i in range(1, axis.size)]
        self.held, self.end = (sent, received), end
        works = [dist.irecv(received[r], group=axis.group, group_src=r, tag=TAG) for r in reversed(others)]
        works += [dist.isend(sent[r], group=axis.group, group_dst=r, tag=TAG) for r in others]
        self.works += [work for work in works if work is not None]

    def wait(self) -> None:
        while self.works:
            self.works.pop().wait()
        self.end()

    def __del__(self) -> None:
        # A message that nobody waits for is lost with its buffer, and the next one would be taken for it.
        while self.works and dist.is_initialized():
            self.works.pop().wait(ABANDONED)


def serve(x: Tensor) -> bool:
    """Do messages serve x: is it on the CPU?"""
    return x.device.type == "cpu"


def start_all_reduce(x: Tensor, axis: Axis, op: dist.ReduceOp.RedOpType) -> Pending:
    """Begin to reduce x over the axis, in place: every rank is handed all terms."""
    terms = x.new_empty((axis.size, *x.shape))
    terms[axis.rank] = x
    rows = terms.unbind()
    return Exchange([rows[axis.rank]] * axis.size, rows, axis, lambda: x.copy_(REDUCTIONS[op](terms)))


def start_all_gather(out: Tensor, axis: Axis) -> Pending:
    """Begin to fill out [n * size, ...], of which this rank has its own n in place."""
    parts = out.chunk(axis.size)
    return Exchange([parts[axis.rank]] * axis.size, parts, axis)


def start_reduce_scatter(x: Tensor, out: Tensor, axis: Axis) -> Pending:
    """Begin to sum x [n * size, ...] over the axis into out [n, ...], which may be this rank's part of x."""
    parts = x.chunk(axis.size)
    terms = out.new_empty((axis.size, *out.shape))
    terms[axis.rank] = parts[axis.rank]
    return Exchange(parts, terms.unbind(), axis, lambda: torch.sum(terms, 0, out=out))
