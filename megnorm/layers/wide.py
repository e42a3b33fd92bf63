"""Products of low-precision activations whose result is wanted in full: logits of routers and of mixing."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megnorm.kernels.torch_ref import wide


class WideLinear(torch.autograd.Function):
    """x [..., d], weight [n, d] -> [..., n] in fp32 (fp64 for fp64); for backward x is kept as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x.to(wide(x)), weight.to(wide(x)))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        rows, columns = grad.flatten(0, -2), x.flatten(0, -2).to(grad.dtype)
        return (grad @ weight.to(grad.dtype)).to(x.dtype), (rows.t() @ columns).to(weight.dtype)
