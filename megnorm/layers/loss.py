"""Cross entropy over a vocabulary split across tp ranks."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megnorm.kernels.registry import Need, offer
from megnorm.kernels.torch_ref import wide
from megnorm.layers.env import Env
from megnorm.parallel.collectives import all_reduce
from megnorm.parallel.mesh import Axis

# Elements that are widened at a time: on a CPU what stays in a core's cache, elsewhere a bound on memory.
CHUNK = {"cpu": 1 << 19}
CHUNK_ELSEWHERE = 1 << 28


class _CrossEntropy(torch.autograd.Function):
    """-log softmax(logits)[label] per token. Keeps logits and the log-sum-exp, not the probabilities.

    spread, each: shares of a target that all words have together, and each of them.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, first: int, logical: int, axis: Axis, spread: float, each: float
    ) -> Tensor:
        local = labels - first
        mine = (local >= 0) & (local < logical)
        local = torch.where(mine, local, 0)
        lse = logits.new_empty(len(logits), dtype=wide(logits))
        all_words = torch.zeros_like(lse)
        for rows in _chunks(logits):
            z = _masked(logits[rows], logical)
            lse[rows] = torch.logsumexp(z, -1)
            if spread:
                all_words[rows] = z[:, :logical].sum(-1)
        top = all_reduce(lse.clone(), axis, dist.ReduceOp.MAX)
        lse = all_reduce(lse.sub_(top).exp_(), axis).log_().add_(top)
        picked = logits.gather(-1, local[:, None]).squeeze(-1).to(lse.dtype).masked_fill_(~mine, 0.0)
        ctx.save_for_backward(logits, lse, local, mine)
        ctx.logical, ctx.spread, ctx.each = logical, spread, each
        if spread:
            picked.mul_(1.0 - spread).add_(all_words, alpha=each)
        return lse - all_reduce(picked, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, lse, local, mine = ctx.saved_tensors
        out = torch.empty_like(logits)
        for rows in _chunks(logits):
            p = _masked(logits[rows], ctx.logical).sub_(lse[rows, None]).exp_()
            p.scatter_add_(-1, local[rows, None], mine[rows, None].to(p.dtype).mul_(ctx.spread - 1.0))
            if ctx.spread:
                p[:, : ctx.logical] -= ctx.each
            out[rows] = p.mul_(grad[rows, None])
        return out, None, None, None, None, None, None


def _chunks(logits: Tensor) -> Iterator[slice]:
    rows = max(1, CHUNK.get(logits.device.type, CHUNK_ELSEWHERE) // logits.shape[1])
    for first in range(0, len(logits), rows):
        yield slice(first, first + rows)


def _masked(logits: Tensor, logical: int) -> Tensor:
    """A wide copy of the logits with -inf in the padding columns."""
    z = logits.to(wide(logits), copy=True)
    z[:, logical:] = -torch.inf
    return z


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    first: int,
    logical: int,
    axis: Axis,
    *,
    smoothing: float = 0.0,
    vocab_size: int = 1,
) -> Tensor:
    """Per-token loss: local logits [..., padded v / ranks], labels [...] -> [...] in fp32 (fp64 for fp64).

    first, logical: this rank's first vocabulary row and how many of its rows are real. Labels outside the vocabulary
    (-100) give a value that the caller masks. smoothing: share of a target spread evenly over all ``vocab_size`` words,
    the label among them (arXiv:1512.00567, section 7).
    """
    flat = _CrossEntropy.apply(
        logits.flatten(0, -2), labels.flatten(), first, logical, axis, smoothing, smoothing / vocab_size
    )
    return flat.view(labels.shape)


# The reference of the operation lies here and not in kernels/, which know no collectives.
@offer("cross_entropy", "torch", 0, lambda need: None)
def make_cross_entropy(need: Need) -> Callable[[Tensor, Tensor, int, int, Axis], Tensor]:
    return cross_entropy


def token_loss(env: Env) -> Callable[[Tensor, Tensor, int, int, Axis], Tensor]:
    """The implementation of ``cross_entropy`` that serves an environment."""
    return env.kernel("cross_entropy")
