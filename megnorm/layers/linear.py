"""Column- and row-parallel linear layers: one GEMM each, with the logical matrices in it named.

Shapes are [s, b, features]; with sequence parallelism inputs of a column layer and outputs of a row layer are
[s/tp, b, d], and the layers gather and scatter.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megnorm.kernels.registry import Keeper
from megnorm.layers.env import Env
from megnorm.layers.recompute import running
from megnorm.parallel.collectives import (
    all_gather,
    begin_all_gather,
    begin_all_reduce,
    begin_reduce_scatter,
    copy_to,
    gather_sequence,
    scatter_sequence,
    sum_from,
)
from megnorm.parallel.layout import Layout, Matrix, parameter
from megnorm.parallel.mesh import Axis, Mesh


@dataclass(frozen=True)
class Out:
    """One logical output of a column-parallel layer: ``units`` groups of ``width`` rows (heads of hd; f rows of 1)."""

    role: str
    units: int
    width: int = 1


@dataclass(frozen=True)
class Share:
    """This rank's part of ``units`` groups: the first group, how many, and on how many ranks the same ones lie."""

    first: int
    count: int
    replicas: int

    @staticmethod
    def of(units: int, mesh: Mesh) -> "Share":
        tp = mesh.tp
        if units % tp.size == 0:
            return Share(tp.rank * (units // tp.size), units // tp.size, 1)
        assert tp.size % units == 0, "plan refuses head counts that neither divide tp nor are divided by it"
        replicas = tp.size // units
        return Share(tp.rank // replicas, 1, replicas)


class _GatherLinear(torch.autograd.Function):
    """F.linear(all_gather(x), weight, bias), gathering again in backward unless the gathered input is kept.

    Backward multiplies while tokens travel: the input is gathered beside the product for its gradient, and that gradient is
    scattered beside the product for the weight's.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, axis: Axis, keep: bool) -> Tensor:
        full = all_gather(x, axis)
        ctx.save_for_backward(full if keep else x, weight)
        ctx.axis, ctx.keep, ctx.bias = axis, keep, bias is not None
        return F.linear(full, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved, weight = ctx.saved_tensors
        gathering = None if ctx.keep else begin_all_gather(saved, ctx.axis)
        whole = grad @ weight
        full = saved if gathering is None else gathering.wait()
        scattering = begin_reduce_scatter(whole, ctx.axis)
        rows = grad.flatten(0, -2)
        dweight = rows.t() @ full.flatten(0, -2)
        return scattering.wait(), dweight, rows.sum(0) if ctx.bias else None, None, None


class _CopyLinear(torch.autograd.Function):
    """F.linear of what all ranks of the axis have; backward sums its gradient beside the product for the weight's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, axis: Axis) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.axis, ctx.bias = axis, bias is not None
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        summing = begin_all_reduce(grad @ weight, ctx.axis)
        rows = grad.flatten(0, -2)
        dweight = rows.t() @ x.flatten(0, -2)
        return summing.wait(), dweight, rows.sum(0) if ctx.bias else None, None


class ColumnParallelLinear(nn.Module):
    """x [s, b, d_in] -> one [s, b, local rows] per output, rows split over tp.

    Outputs with fewer units than ranks are held by several ranks (key/value heads); their gradients are summed.
    """

    def __init__(self, d_in: int, outs: Sequence[Out], env: Env, *, bias: bool) -> None:
        super().__init__()
        self.mesh = env.mesh
        weights, biases, start = [], [], 0
        for out in outs:
            share = Share.of(out.units, env.mesh)
            rows, first, local = out.units * out.width, share.first * out.width, share.count * out.width
            held = partial(
                Matrix,
                out.role,
                start=start,
                grad_sum="kv" if share.replicas > 1 else None,
                owner=env.mesh.tp.rank % share.replicas == 0,
            )
            weights.append(held(out.role, (rows, d_in), (first, 0), (local, d_in)))
            biases.append(held("bias", (rows,), (first,), (local,)))
            start += local
        self.sizes = [matrix.local[0] for matrix in weights]
        self.weight = parameter(env.empty(start, d_in), Layout(tuple(weights)))
        self.bias = parameter(env.full((start,), 0.0), Layout(tuple(biases))) if bias else None
        self.product = _product(d_in, start, bias, env)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.linear(x).split(self.sizes, dim=-1)

    def linear(self, x: Tensor) -> Tensor:
        """All outputs side by side: [s, b, sum of local rows]."""
        if self.product is not None:
            full = gather_sequence(x, self.mesh.tp) if self.mesh.sequence_parallel else copy_to(x, self.mesh.tp)
            y: Tensor = self.product(full, self.weight, self.bias)
            return y
        if self.mesh.sequence_parallel:
            return _GatherLinear.apply(x, self.weight, self.bias, self.mesh.tp, self.mesh.keep_gathered)
        if self.mesh.tp.size > 1:
            return _CopyLinear.apply(x, self.weight, self.bias, self.mesh.tp)
        return F.linear(x, self.weight, self.bias)


def _product(inside: int, outside: int, biased: bool, env: Env) -> Callable[..., Any] | None:
    """What multiplies this rank's features in place of F.linear; None: F.linear itself."""
    product = env.fused("linear", features=(inside, outside), biased=biased, tokens=env.tokens, quantize=env.quantize)
    if isinstance(product, Keeper):
        product.unit = running
    return product


class RowParallelLinear(nn.Module):
    """x [s, b, d_in/tp] -> [s, b, d_out] ([s/tp, b, d_out] with sequence parallelism); the bias is added once, after."""

    def __init__(self, d_in: int, d_out: int, role: str, env: Env, *, bias: bool) -> None:
        super().__init__()
        tp = env.mesh.tp
        self.mesh, local = env.mesh, d_in // tp.size
        matrix = Matrix("", role, (d_out, d_in), (0, tp.rank * local), (d_out, local))
        self.weight = parameter(env.empty(d_out, local), Layout((matrix,)))
        whole = Layout.whole(
            (d_out,), "bias", grad_sum="tp" if env.mesh.sequence_parallel else None, owner=tp.rank == 0
        )
        self.bias = parameter(env.full((d_out,), 0.0), whole) if bias else None
        self.product = _product(local, d_out, bias and tp.size == 1, env) or F.linear

    def forward(self, x: Tensor) -> Tensor:
        if self.mesh.tp.size == 1:
            return self.product(x, self.weight, self.bias)
        y = self.product(x, self.weight, None)
        y = scatter_sequence(y, self.mesh.tp) if self.mesh.sequence_parallel else sum_from(y, self.mesh.tp)
        return y if self.bias is None else y + self.bias
