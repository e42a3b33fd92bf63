"""Operations of mixtures of experts in plain PyTorch: products by expert, and tokens brought to their experts and back."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megnorm.kernels.libraries import no_device
from megnorm.kernels.registry import Need, Refusal, offer

Permutation = tuple[Callable[..., tuple[Tensor, Any]], Callable[..., Tensor]]


def _refuse_capture(need: Need) -> Refusal:
    return "counts rows on the host (kernels.graphs)" if need.capture else None


def _refuse_quantized(need: Need) -> Refusal:
    return "multiplies in the dtype of activations" if need.quantize else _refuse_capture(need)


class _GroupedLinear(torch.autograd.Function):
    """Rows of x in groups, one behind the other, each times its own matrix."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, sizes: list[int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.sizes = sizes
        out = x.new_empty(x.shape[0], weight.shape[1])
        for rows, matrix, result in zip(x.split(sizes), weight, out.split(sizes), strict=True):
            torch.mm(rows, matrix.t(), out=result)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grads, dx, dweight = grad.contiguous().split(ctx.sizes), torch.empty_like(x), torch.empty_like(weight)
        for g, rows, matrix, d_rows, d_matrix in zip(
            grads, x.split(ctx.sizes), weight, dx.split(ctx.sizes), dweight, strict=True
        ):
            torch.mm(g, matrix, out=d_rows)
            torch.mm(g.t(), rows, out=d_matrix)  # zeros for a group without rows
        return dx, dweight, None


@offer("grouped_gemm", "torch", 0, _refuse_quantized)
def make_grouped_gemm(need: Need) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """fn(x [n, k], weight [e, rows, k], counts [e] int64, their sum n) -> [n, rows]: counts[i] rows of x by matrix i."""

    def grouped_gemm(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        y: Tensor = _GroupedLinear.apply(x, weight, counts.tolist())
        return y

    return grouped_gemm


def refuse_one_call(need: Need) -> Refusal:
    if need.quantize:
        return "multiplies in the dtype of activations"
    if not hasattr(F, "grouped_mm"):
        return "torch 2.10 or newer has it"
    if need.dtype == torch.float64:
        return "multiplies in fp32 and below"
    if need.features == (0, 0):
        return "is not told the sizes of its products"
    if any(size * need.dtype.itemsize % 16 for size in need.features):
        return f"takes rows of multiples of 16 bytes, and a product here is {need.features[0]} by {need.features[1]}"
    return no_device((8, 0)) if need.device == "cuda" else None


def refuse_elsewhere(need: Need) -> Refusal:
    return refuse_one_call(need) or (
        None if need.device == "cuda" else "is a loop over experts there, as the reference is"
    )


@offer("grouped_gemm", "torch_grouped", 10, refuse_elsewhere)
@offer("grouped_gemm", "torch_grouped", -1, refuse_one_call)
def make_one_call(need: Need) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """One call for all experts, whose counts the host need not know."""

    def grouped_gemm(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        y = F.grouped_mm(x.contiguous(), weight.transpose(1, 2), offs=counts.cumsum(0, dtype=torch.int32))
        out: Tensor = _ContiguousGradient.apply(y)
        return out

    return grouped_gemm


class _ContiguousGradient(torch.autograd.Function):
    """The gradient of a sum is one number, seen as a tensor; grouped_mm takes none of such."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()


@offer("permute", "torch", 0, _refuse_capture)
def make_permutation(need: Need) -> Permutation:
    """(there, back):

    there(x [tokens, d], routes [tokens, experts] bool, total) -> ([total, d], where): the rows that go to the first expert, in
    their order, then those of the second, ...; total: how many there are in all, a Python number.
    back(y [total, d], where, weights [tokens, experts] or None) -> [tokens, d]: the sum over a token's experts, weighted.
    """

    def there(x: Tensor, routes: Tensor, total: int) -> tuple[Tensor, Any]:
        expert, token = routes.t().nonzero(as_tuple=True)
        assert len(token) == total
        return x[token], (token, expert, len(x))

    def back(y: Tensor, where: Any, weights: Tensor | None) -> Tensor:
        token, expert, count = where
        if weights is not None:
            y = y * weights[token, expert].unsqueeze(-1).to(y.dtype)
        return y.new_zeros(count, y.shape[1]).index_add(0, token, y)

    return there, back
