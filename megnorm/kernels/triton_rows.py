"""What our Triton kernels share: a row's statistics, gain and gradient, and how many programs work on how many rows.

Statistics and sums are in fp32. The kernels run on a GPU, or on a CPU with TRITON_INTERPRET=1 set before triton is
imported; so nothing here asks CUDA for anything unless a tensor lies there, nothing is tuned by timing, and only
functions that the interpreter knows are used.
"""

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("megnorm's Triton kernels need the package triton, which comes with torch for CUDA") from error

import torch
from torch import Tensor


@triton.jit
def gain(xh, W, B, cols, mask, ROUND: tl.constexpr, HAS_W: tl.constexpr, HAS_B: tl.constexpr, CAST: tl.constexpr):
    """xh * w + b. CAST: xh and w are rounded to ROUND, the dtype of the output, before they meet."""
    y = xh
    if HAS_W:
        w = tl.load(W + cols, mask=mask, other=0.0)
        if CAST:
            y, w = y.to(ROUND).to(tl.float32), w.to(ROUND)
        y = y * w.to(tl.float32)
    if HAS_B:
        y += tl.load(B + cols, mask=mask, other=0.0).to(tl.float32)
    return y


@triton.jit
def weighted(dy, W, cols, mask, HAS_W: tl.constexpr):
    """dy times the gain: the gradient of the normalized row."""
    g = dy
    if HAS_W:
        g = dy * tl.load(W + cols, mask=mask, other=0.0).to(tl.float32)
    return g


@triton.jit
def ungain(g, xh, rstd, n, mask, RMS: tl.constexpr):
    """The gradient of a row from that of its normalized form, statistics included."""
    d = g - xh * (tl.sum(g * xh, 0) / n)
    if not RMS:
        d -= tl.sum(g, 0) / n
    return tl.where(mask, d * rstd, 0.0)


def block_of(n: int) -> int:
    return int(triton.next_power_of_2(n))


def warps_of(block: int) -> int:
    """Warps for a row of ``block`` elements: 8 elements a thread, 1 to 16 warps."""
    return min(max(block // 256, 1), 16)


def programs_of(x: Tensor, rows: int) -> int:
    """How many programs share the rows of a backward kernel: each leaves one row of partial weight gradients.

    One, where there is no row (experts that no token was sent to): it leaves zeros.
    """
    if not x.is_cuda:
        return max(1, min(rows, 3))
    return max(1, min(rows, 2 * torch.cuda.get_device_properties(x.device).multi_processor_count))


def rows_of(x: Tensor) -> Tensor:
    """[..., n] -> [rows, n], contiguous."""
    return x.contiguous().view(-1, x.shape[-1])


def summed(partial: Tensor | None, like: Tensor | None) -> Tensor | None:
    """Partial weight gradients [programs, n] -> [n] in the weight's dtype; None where there is no weight."""
    return None if partial is None or like is None else partial.sum(0).to(like.dtype)


def partials(programs: int, like: Tensor | None) -> Tensor | None:
    """Storage of partial weight gradients, or None."""
    return None if like is None else like.new_empty(programs, like.shape[-1], dtype=torch.float32)


def dense(weight: Tensor | None) -> Tensor | None:
    """A weight as kernels read it (an expanded scalar has stride 0)."""
    return None if weight is None else weight.contiguous()
