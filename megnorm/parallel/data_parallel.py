"""Gradients: one flat buffer of accumulation, summed over data-parallel ranks after the last micro-batch."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megnorm.parallel.collectives import all_reduce
from megnorm.parallel.mesh import Mesh


class GradBuffer:
    """``param.main_grad`` of every parameter, a view of one flat tensor of the accumulation dtype.

    Where a parameter has that dtype itself, autograd adds into the buffer directly; else a hook adds each low-precision
    gradient to it and frees the gradient.
    """

    def __init__(self, params: Sequence[nn.Parameter], dtype: torch.dtype) -> None:
        self.params = list(params)
        total = sum(param.numel() for param in self.params)
        self.flat = torch.zeros(total, dtype=dtype, device=self.params[0].device)
        start = 0
        for param in self.params:
            param.main_grad = self.flat[start : start + param.numel()].view_as(param)  # type: ignore[attr-defined]
            start += param.numel()
            if param.dtype == dtype:
                param.grad = param.main_grad  # type: ignore[attr-defined]
            else:
                param.register_post_accumulate_grad_hook(_accumulate)

    def zero(self) -> None:
        self.flat.zero_()

    def reduce(self, mesh: Mesh) -> None:
        """Sum over data-parallel ranks: the loss was divided by the global number of tokens, so the sum is the mean."""
        all_reduce(self.flat, mesh.dp)


def _accumulate(param: Tensor) -> None:
    assert param.grad is not None
    param.main_grad.add_(param.grad)  # type: ignore[attr-defined]
    param.grad = None
