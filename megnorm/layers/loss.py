"""Cross entropy over a vocabulary split across tp ranks."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megnorm.kernels.torch_ref import wide
from megnorm.parallel.collectives import all_reduce
from megnorm.parallel.mesh import Axis


class _CrossEntropy(torch.autograd.Function):
    """-log softmax(logits)[label] per token. Keeps logits and the log-sum-exp, not the probabilities."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, first: int, logical: int, axis: Axis) -> Tensor:
        z = _masked(logits, logical)
        top = all_reduce(z.amax(-1), axis, dist.ReduceOp.MAX)
        total = all_reduce(torch.exp(z - top[:, None]).sum(-1), axis)
        lse = total.log_().add_(top)
        local = labels - first
        mine = (local >= 0) & (local < logical)
        local = torch.where(mine, local, 0)
        picked = z.gather(-1, local[:, None]).squeeze(-1).masked_fill_(~mine, 0.0)
        ctx.save_for_backward(logits, lse, local, mine)
        ctx.logical = logical
        return lse - all_reduce(picked, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, lse, local, mine = ctx.saved_tensors
        p = _masked(logits, ctx.logical).sub_(lse[:, None]).exp_()
        p.scatter_add_(-1, local[:, None], -mine[:, None].to(p.dtype))
        return p.mul_(grad[:, None]).to(logits.dtype), None, None, None, None


def _masked(logits: Tensor, logical: int) -> Tensor:
    """A wide copy of the logits with -inf in the padding columns."""
    z = logits.to(wide(logits), copy=True)
    z[:, logical:] = -torch.inf
    return z


def cross_entropy(logits: Tensor, labels: Tensor, first: int, logical: int, axis: Axis) -> Tensor:
    """Per-token loss: local logits [..., padded v / ranks], labels [...] -> [...] in fp32 (fp64 for fp64).

    first, logical: this rank's first vocabulary row and how many of its rows are real. Labels outside the vocabulary
    (-100) give a value that the caller masks.
    """
    flat = _CrossEntropy.apply(logits.flatten(0, -2), labels.flatten(), first, logical, axis)
    return flat.view(labels.shape)
