"""Collectives over a mesh axis, with their gradients. Every one is the identity on an axis of size 1.

On the CPU they are made of messages where those are quicker (``messages``); elsewhere they are torch's.
Activations are [s, b, ...]; with sequence parallelism dimension 0 is split over the axis, contiguous for both
collectives below.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megnorm.parallel import messages
from megnorm.parallel.mesh import Axis
from megnorm.parallel.messages import Pending
from megnorm.parallel.recorder import RECORDER

T = TypeVar("T")

# torch 2.13 renamed these; older versions have the old names only.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def all_reduce(x: Tensor, axis: Axis, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """Sum (or other reduction) of x over the axis, in place; no gradient."""
    if axis.size > 1:
        RECORDER.begin("all_reduce", axis.name, x.nbytes)
        if _small(x):
            messages.start_all_reduce(x, axis, op).wait()
        else:
            dist.all_reduce(x, op=op, group=axis.group)
        RECORDER.end()
    return x


def all_gather(x: Tensor, axis: Axis) -> Tensor:
    """[n, ...] of every rank -> [n * size, ...] in rank order; no gradient."""
    if axis.size == 1:
        return x
    out = x.new_empty((x.shape[0] * axis.size, *x.shape[1:]))
    RECORDER.begin("all_gather", axis.name, out.nbytes)
    if messages.serve(x):
        own_slice(out, axis).copy_(x)
        messages.start_all_gather(out, axis).wait()
    else:
        _all_gather(out, x.contiguous(), group=axis.group)
    RECORDER.end()
    return out


def reduce_scatter(x: Tensor, axis: Axis) -> Tensor:
    """[n * size, ...] on every rank -> this rank's [n, ...] of the sum; no gradient."""
    if axis.size == 1:
        return x
    out = x.new_empty((x.shape[0] // axis.size, *x.shape[1:]))
    RECORDER.begin("reduce_scatter", axis.name, x.nbytes)
    if messages.serve(x):
        messages.start_reduce_scatter(x.contiguous(), out, axis).wait()
    else:
        _reduce_scatter(out, x.contiguous(), group=axis.group)
    RECORDER.end()
    return out


def wait_for(work: Pending, what: str, axis: str, size: int) -> None:
    """Wait for a collective or message under way. size: its bytes."""
    RECORDER.begin(what, axis, size)
    work.wait()
    RECORDER.end()


class Started(NamedTuple):
    """A collective that computation goes on beside. given: what it sends, which must live until then."""

    result: Tensor
    work: Pending
    given: Tensor
    what: str
    axis: str
    size: int

    def wait(self) -> Tensor:
        wait_for(self.work, self.what, self.axis, self.size)
        return self.result


def begin_all_gather(x: Tensor, axis: Axis) -> Started:
    """``all_gather`` over an axis of several ranks, not waited for."""
    out = x.new_empty((x.shape[0] * axis.size, *x.shape[1:]))
    own_slice(out, axis).copy_(x)
    return Started(out, start_all_gather(out, axis), out, "all_gather", axis.name, out.nbytes)


def begin_reduce_scatter(x: Tensor, axis: Axis) -> Started:
    """``reduce_scatter`` over an axis of several ranks, not waited for."""
    x = x.contiguous()
    out = x.new_empty((x.shape[0] // axis.size, *x.shape[1:]))
    return Started(out, start_reduce_scatter(x, out, axis), x, "reduce_scatter", axis.name, x.nbytes)


def begin_all_reduce(x: Tensor, axis: Axis) -> Started:
    """``all_reduce`` over an axis of several ranks, in place and not waited for."""
    x = x.contiguous()
    work = start_all_reduce(x, axis)
    assert work is not None, "an axis of one rank has nothing to sum"
    return Started(x, work, x, "all_reduce", axis.name, x.nbytes)


def start_all_reduce(x: Tensor, axis: Axis) -> Pending | None:
    """Begin to sum x over the axis, in place; wait for the work before x is read."""
    if axis.size == 1:
        return None
    if _small(x):
        return messages.start_all_reduce(x, axis, dist.ReduceOp.SUM)
    work: Pending = dist.all_reduce(x, group=axis.group, async_op=True)
    return work


def _small(x: Tensor) -> bool:
    return messages.serve(x) and x.nbytes <= messages.SMALL


def start_reduce_scatter(x: Tensor, out: Tensor, axis: Axis) -> Pending:
    """Begin to sum x [n * size, ...] over the axis: this rank's part into out [n, ...], which may be that part of x."""
    if messages.serve(x):
        return messages.start_reduce_scatter(x, out, axis)
    work: Pending = _reduce_scatter(out, x, group=axis.group, async_op=True)
    return work


def start_all_gather(out: Tensor, axis: Axis) -> Pending:
    """Begin to fill out [n * size, ...] with the parts of all ranks; this rank's n are in place."""
    if messages.serve(out):
        return messages.start_all_gather(out, axis)
    work: Pending = _all_gather(out, own_slice(out, axis), group=axis.group, async_op=True)
    return work


def start_all_to_all(
    x: Tensor, sent: Sequence[int], received: Sequence[int], axis: Axis
) -> tuple[Tensor, dist.Work | None]:
    """Begin to hand out x, of which ``sent[r]`` elements go to rank r: what arrives, in rank order, and the work."""
    if axis.size == 1:
        return x, None
    out = x.new_empty(sum(received))
    return out, dist.all_to_all_single(out, x, list(received), list(sent), group=axis.group, async_op=True)


def all_to_all(x: Tensor, sent: Sequence[int], received: Sequence[int], axis: Axis) -> Tensor:
    """Rows [n, ...], of which ``sent[r]`` go to rank r -> what arrives, in rank order; no gradient."""
    if axis.size == 1:
        return x
    out = x.new_empty((sum(received), *x.shape[1:]))
    RECORDER.begin("all_to_all", axis.name, out.nbytes)
    dist.all_to_all_single(out, x.contiguous(), list(received), list(sent), group=axis.group)
    RECORDER.end()
    return out


def gather_objects(value: T, axis: Axis) -> list[T]:
    """The small plain value of every rank of the axis, in rank order."""
    if axis.size == 1:
        return [value]
    values: list[Any] = [None] * axis.size
    RECORDER.begin("gather_objects", axis.name, 0)  # of sizes that only torch knows
    dist.all_gather_object(values, value, group=axis.group)
    RECORDER.end()
    return values


def own_slice(x: Tensor, axis: Axis) -> Tensor:
    """This rank's part of dimension 0; no gradient."""
    n = x.shape[0] // axis.size
    return x.narrow(0, axis.rank * n, n)


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grad.contiguous(), ctx.axis), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        return all_reduce(x.clone(), axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, partial: bool) -> Tensor:
        ctx.axis, ctx.partial = axis, partial
        return all_gather(x, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return (reduce_scatter if ctx.partial else own_slice)(grad, ctx.axis), None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return reduce_scatter(x, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_gather(grad, ctx.axis), None


class _Slice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return own_slice(x, axis).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_gather(grad, ctx.axis), None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: Sequence[int], received: Sequence[int], axis: Axis) -> Tensor:
        ctx.counts, ctx.axis = (received, sent), axis
        return all_to_all(x, sent, received, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        sent, received = ctx.counts
        return all_to_all(grad, sent, received, ctx.axis), None, None, None


def exchange(x: Tensor, sent: Sequence[int], received: Sequence[int], axis: Axis) -> Tensor:
    """``all_to_all`` with its gradient, which goes back the same way."""
    return x if axis.size == 1 else _Exchange.apply(x, sent, received, axis)


def copy_to(x: Tensor, axis: Axis) -> Tensor:
    """Identity; gradients are summed over the axis (the input of a column-parallel layer)."""
    return x if axis.size == 1 else _Copy.apply(x, axis)


def sum_from(x: Tensor, axis: Axis) -> Tensor:
    """Sum over the axis; the gradient passes unchanged (the output of a row-parallel layer)."""
    return x if axis.size == 1 else _Sum.apply(x, axis)


def gather_sequence(x: Tensor, axis: Axis, *, partial: bool = True) -> Tensor:
    """[s/n, ...] -> [s, ...]; gradients are summed and scattered if every rank's is ``partial``, else sliced."""
    return x if axis.size == 1 else _Gather.apply(x, axis, partial)


def scatter_sequence(x: Tensor, axis: Axis) -> Tensor:
    """Partial sums [s, ...] -> the sum's [s/n, ...]; gradients are gathered."""
    return x if axis.size == 1 else _Scatter.apply(x, axis)


def slice_sequence(x: Tensor, axis: Axis) -> Tensor:
    """The same [s, ...] on every rank -> this rank's [s/n, ...]; gradients are gathered."""
    return x if axis.size == 1 else _Slice.apply(x, axis)
