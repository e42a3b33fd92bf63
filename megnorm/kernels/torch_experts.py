"""Operations of mixtures of experts in plain PyTorch: products by expert, and tokens brought to their experts and back."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megnorm.kernels.libraries import no_device
from megnorm.kernels.registry import Need, Refusal, offer

Permutation = tuple[Callable[..., tuple[Tensor, Any]], Callable[..., Tensor]]


def _serves_all(need: Need) -> None:
    return None


def _refuse_quantized(need: Need) -> Refusal:
    return "multiplies in the dtype of activations" if need.quantize else None


@offer("grouped_gemm", "torch", 0, _refuse_quantized)
def make_grouped(need: Need) -> Callable[[Tensor, Tensor, Sequence[int]], Tensor]:
    """fn(x [tokens, in], weight [experts, out, in], counts) -> [tokens, out]; counts: rows of each expert, in order."""

    def grouped(x: Tensor, weight: Tensor, counts: Sequence[int]) -> Tensor:
        parts = x.split(list(counts))
        return torch.cat([F.linear(part, own) for part, own in zip(parts, weight, strict=True)])

    return grouped


def refuse_one_call(need: Need) -> Refusal:
    if need.quantize:
        return "multiplies in the dtype of activations"
    if not hasattr(F, "grouped_mm"):
        return "torch 2.10 or newer has it"
    if need.dtype == torch.float64:
        return "multiplies in fp32 and below"
    if any(size * need.dtype.itemsize % 16 for size in need.features):
        return f"takes rows of multiples of 16 bytes, and a product here is {need.features[0]} by {need.features[1]}"
    return no_device((8, 0)) if need.device == "cuda" else None


def refuse_elsewhere(need: Need) -> Refusal:
    return refuse_one_call(need) or (
        None if need.device == "cuda" else "is a loop over experts there, as the reference is"
    )


@offer("grouped_gemm", "torch_grouped", 10, refuse_elsewhere)
@offer("grouped_gemm", "torch_grouped", -1, refuse_one_call)
def make_one_call(need: Need) -> Callable[[Tensor, Tensor, Sequence[int]], Tensor]:
    """One call for all experts."""

    def grouped(x: Tensor, weight: Tensor, counts: Sequence[int]) -> Tensor:
        ends = (
            torch.tensor(list(counts), dtype=torch.int32).cumsum(0, dtype=torch.int32).to(x.device, non_blocking=True)
        )
        y = F.grouped_mm(x.contiguous(), weight.transpose(1, 2), offs=ends)
        return _ContiguousGradient.apply(y)

    return grouped


class _ContiguousGradient(torch.autograd.Function):
    """The gradient of a sum is one number, seen as a tensor; grouped_mm takes none of such."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()


@offer("permute", "torch", 0, _serves_all)
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
