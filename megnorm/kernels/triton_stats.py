"""Norms whose statistics may cross ranks, of an activation or of the row itself: K5 and K6, and the plain norm.

N(a), a = x, act(gate) or act(gate) * up, over the n features of all ranks, of which a row holds ``width``. Where all
features lie on one rank a single pass does it. Otherwise one pass gathers each row's statistics, the sum crosses ranks, and
a second pass applies them, forward and backward alike. The activation is computed in every pass and never stored.
"""

from typing import Any

import torch
from torch import Tensor

from megnorm.kernels.torch_ref import NormArgs, Params
from megnorm.kernels.triton_rows import (
    block_of,
    dense,
    gain,
    partials,
    programs_of,
    rows_of,
    summed,
    tl,
    triton,
    warps_of,
    weighted,
)

BOTH, GATHER, APPLY = 0, 1, 2  # what a pass does


@triton.jit
def act(x, ACT: tl.constexpr):
    """The activation and its derivative."""
    if ACT == "gelu":
        inside = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        y, slope = x * inside, inside + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    elif ACT == "gelu_tanh":
        # (1 + tanh z) / 2 = sigmoid(2 z)
        half = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        y = x * half
        slope = half + y * (1.0 - half) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    elif ACT == "silu":
        half = tl.sigmoid(x)
        y, slope = x * half, half * (1.0 + x * (1.0 - half))
    elif ACT == "relu":
        y, slope = tl.maximum(x, 0.0), (x > 0.0).to(tl.float32)
    elif ACT == "relu_squared":
        kept = tl.maximum(x, 0.0)
        y, slope = kept * kept, 2.0 * kept
    else:
        y, slope = x, tl.full(x.shape, 1.0, tl.float32)
    return y, slope


@triton.jit
def _forward(G, U, W, B, Y, STATS, g_row, u_row, width, n, eps, scale,
             PASS: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, RMS: tl.constexpr, HAS_W: tl.constexpr,
             HAS_B: tl.constexpr, CAST: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """STATS [rows, 2] fp32: after GATHER the row's sum and its squares about its own mean; else mean and 1 / deviation."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < width
    a, _ = act(tl.load(G + row * g_row + cols, mask=mask, other=0.0).to(tl.float32), ACT)
    if GATED:
        a *= tl.load(U + row * u_row + cols, mask=mask, other=0.0).to(tl.float32)
    mean = 0.0
    if PASS == 2:
        rstd = tl.load(STATS + row * 2 + 1)
        if not RMS:
            mean = tl.load(STATS + row * 2)
        c = tl.where(mask, a - mean, 0.0)
    else:
        if not RMS:
            total = tl.sum(a, 0)
            mean = total / width
        c = tl.where(mask, a - mean, 0.0)
        squares = tl.sum(c * c, 0)
        if PASS == 1:
            if not RMS:
                tl.store(STATS + row * 2, total)
            tl.store(STATS + row * 2 + 1, squares)
        else:
            rstd = 1.0 / tl.sqrt(squares / n + eps)
            if not RMS:
                tl.store(STATS + row * 2, mean)
            tl.store(STATS + row * 2 + 1, rstd)
    if PASS != 1:
        y = gain(c * rstd, W, B, cols, mask, Y.dtype.element_ty, HAS_W, HAS_B, CAST) * scale
        tl.store(Y + row * width + cols, y.to(Y.dtype.element_ty), mask=mask)


@triton.jit
def _backward(DY, G, U, W, STATS, SUMS, DG, DU, DW, DB, g_row, u_row, rows, per, width, n, scale,
              PASS: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, RMS: tl.constexpr, HAS_W: tl.constexpr,
              HAS_B: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """``per`` rows a program. SUMS [rows, 2]: sums of g and of g xh over the row, after GATHER; their means for APPLY."""
    program = tl.program_id(0)
    first = program.to(tl.int64) * per
    cols = tl.arange(0, BLOCK)
    mask = cols < width
    dw, db = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for row in range(first, tl.minimum(first + per, rows)):
        y, slope = act(tl.load(G + row * g_row + cols, mask=mask, other=0.0).to(tl.float32), ACT)
        a = y
        if GATED:
            u = tl.load(U + row * u_row + cols, mask=mask, other=0.0).to(tl.float32)
            a = y * u
        rstd = tl.load(STATS + row * 2 + 1)
        if not RMS:
            a -= tl.load(STATS + row * 2)
        xh = tl.where(mask, a * rstd, 0.0)
        dy = tl.load(DY + row * width + cols, mask=mask, other=0.0).to(tl.float32) * scale
        g = weighted(dy, W, cols, mask, HAS_W)
        if PASS == 2:
            da = g - xh * tl.load(SUMS + row * 2 + 1)
            if not RMS:
                da -= tl.load(SUMS + row * 2)
        else:
            dot = tl.sum(g * xh, 0)
            dw += dy * xh
            db += dy
            if PASS == 1:
                if not RMS:
                    tl.store(SUMS + row * 2, tl.sum(g, 0))
                tl.store(SUMS + row * 2 + 1, dot)
            else:
                da = g - xh * (dot / n)
                if not RMS:
                    da -= tl.sum(g, 0) / n
        if PASS != 1:
            da *= rstd
            if GATED:
                tl.store(DU + row * width + cols, (da * y).to(DU.dtype.element_ty), mask=mask)
                da *= u
            tl.store(DG + row * width + cols, (da * slope).to(DG.dtype.element_ty), mask=mask)
    if PASS != 2:
        if HAS_W:
            tl.store(DW + program * width + cols, dw, mask=mask)
        if HAS_B:
            tl.store(DB + program * width + cols, db, mask=mask)


def _join(stats: Tensor, width: int, rms: bool, args: NormArgs) -> Tensor:
    """Row statistics of this rank -> mean and 1 / deviation over all ranks. Deviations are taken about the common mean."""
    squares = stats[:, 1]
    if not rms:
        own = stats[:, 0] / width
        mean = args.reduce(stats[:, 0] * args.share) / args.n
        squares = squares + width * (own - mean).square()
        stats[:, 0] = mean
    stats[:, 1] = (args.reduce(squares * args.share) / args.n + args.eps).rsqrt()
    return stats


class StatsNorm(torch.autograd.Function):
    """Keeps the inputs and two numbers a row. sharded: statistics cross ranks."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor | None, w: Tensor | None, b: Tensor | None, kind: str, rms: bool,
                args: NormArgs, sharded: bool) -> Tensor:  # fmt: skip
        shape, width = gate.shape, gate.shape[-1]
        gate, up = _rows(gate), None if up is None else _rows(up)
        rows, block = gate.shape[0], block_of(width)
        y = gate.new_empty(rows, width)
        stats = torch.empty(rows, 2, dtype=torch.float32, device=gate.device)

        def run(step: int) -> None:
            _forward[(rows,)](
                gate, up, w, b, y, stats, gate.stride(0), 0 if up is None else up.stride(0), width, args.n, args.eps,
                args.scale, PASS=step, ACT=kind, GATED=up is not None, RMS=rms, HAS_W=w is not None, HAS_B=b is not None,
                CAST=args.cast_first and rms, BLOCK=block, num_warps=warps_of(block),
            )  # fmt: skip

        if sharded:
            run(GATHER)
            _join(stats, width, rms, args)
            run(APPLY)
        else:
            run(BOTH)
        ctx.save_for_backward(gate, up, w, b, stats)
        ctx.plan, ctx.args, ctx.shape = (kind, rms, sharded), args, shape
        return y.view(shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        gate, up, w, b, stats = ctx.saved_tensors
        (kind, rms, sharded), args = ctx.plan, ctx.args
        dy, (rows, width) = rows_of(dy), gate.shape
        programs, block = programs_of(gate, rows), block_of(width)
        sums = torch.zeros_like(stats) if sharded else stats
        dgate, dup = torch.empty_like(dy), None if up is None else torch.empty_like(dy)
        dw, db = partials(programs, w), partials(programs, b)

        def run(step: int) -> None:
            _backward[(programs,)](
                dy, gate, up, w, stats, sums, dgate, dup, dw, db, gate.stride(0), 0 if up is None else up.stride(0),
                rows, triton.cdiv(rows, programs), width, args.n, args.scale, PASS=step, ACT=kind, GATED=up is not None,
                RMS=rms, HAS_W=w is not None, HAS_B=b is not None, BLOCK=block, num_warps=warps_of(block),
            )  # fmt: skip

        if sharded:
            run(GATHER)
            sums = args.reduce(sums[:, 1:] if rms else sums) * (args.share / args.n)
            sums = torch.cat([sums, sums], 1) if rms else sums.contiguous()
            run(APPLY)
        else:
            run(BOTH)
        dgate = dgate.view(ctx.shape)
        return (
            dgate,
            None if dup is None else dup.view(ctx.shape),
            summed(dw, w),
            summed(db, b),
            *(None for _ in range(4)),
        )


def _rows(x: Tensor) -> Tensor:
    """[..., width] -> [rows, width] without a copy where rows lie at one distance (a part of a packed projection)."""
    flat = x.flatten(0, -2)
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def norm(rms: bool, sharded: bool, x: Tensor, p: Params, args: NormArgs) -> Tensor:
    y: Tensor = StatsNorm.apply(
        x, None, dense(p.get("weight")), dense(p.get("bias")), "none", rms, _unscaled(args), sharded
    )
    return y


def act_stats(
    kind: str, rms: bool, sharded: bool, gate: Tensor, up: Tensor | None, p: Params, args: NormArgs
) -> Tensor:
    y: Tensor = StatsNorm.apply(gate, up, dense(p.get("weight")), dense(p.get("bias")), kind, rms, args, sharded)
    return y


def _unscaled(args: NormArgs) -> NormArgs:
    """A plain norm leaves its constant factor to the layer."""
    return NormArgs(args.eps, args.n, args.cast_first, args.share, args.reduce)
