"""Kernels that work head by head: K4 norm and rotation of q, k, v in one pass, K7 one scalar a head."""

from typing import Any

import torch
from torch import Tensor

from megnorm.kernels.torch_ref import NormArgs, Params
from megnorm.kernels.triton_rows import (
    block_of,
    dense,
    partials,
    programs_of,
    rows_of,
    summed,
    tl,
    triton,
    warps_of,
)

HeadNorm = tuple[Params, NormArgs] | None
BLOCK_ROWS = 16  # (token, head) pairs that a program holds at once


@triton.jit
def _places(row, batch, heads, x_s, x_b, x_h, c_s, c_b):
    """Offsets of rows (token-major, then batch, then head) in x, and in the tables of angles."""
    token, head = row // heads, row % heads
    s, b = (token // batch).to(tl.int64), token % batch
    return s * x_s + b * x_b + head * x_h, s * c_s + b * c_b


@triton.jit
def _half(W, cols, mask, HAS: tl.constexpr, OTHER: tl.constexpr):
    """A half of a gain or bias as a row, or ``OTHER``."""
    w = (cols * 0).to(tl.float32)[None, :] + OTHER
    if HAS:
        w = tl.load(W + cols, mask=mask, other=0.0).to(tl.float32)[None, :]
    return w


@triton.jit
def _forward(X, Y, W, B, COS, SIN, STATS, x_s, x_b, x_h, c_s, c_b, rows, batch, heads, hd, half, eps, scale,
             NORM: tl.constexpr, ROPE: tl.constexpr, RMS: tl.constexpr, HAS_W: tl.constexpr, HAS_B: tl.constexpr,
             CAST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """The two halves of a head lie in two tiles [ROWS, BLOCK]: the rotation turns them against each other."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    at, angle = _places(row, batch, heads, x_s, x_b, x_h, c_s, c_b)
    low, high = (row < rows)[:, None] & (cols < half)[None, :], (row < rows)[:, None] & (cols < hd - half)[None, :]
    a = tl.load(X + at[:, None] + cols[None, :], mask=low, other=0.0).to(tl.float32)
    b = tl.load(X + at[:, None] + half + cols[None, :], mask=high, other=0.0).to(tl.float32)
    if NORM:
        if not RMS:
            mean = (tl.sum(a, 1) + tl.sum(b, 1)) / hd
            tl.store(STATS + row * 2, mean, mask=row < rows)
            a = tl.where(low, a - mean[:, None], 0.0)
            b = tl.where(high, b - mean[:, None], 0.0)
        rstd = 1.0 / tl.sqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / hd + eps)
        tl.store(STATS + row * 2 + 1, rstd, mask=row < rows)
        a, b = a * rstd[:, None], b * rstd[:, None]
        wa, wb = _half(W, cols, cols < half, HAS_W, 1.0), _half(W, half + cols, cols < hd - half, HAS_W, 1.0)
        if CAST and HAS_W:
            kind = Y.dtype.element_ty
            a, b = a.to(kind).to(tl.float32), b.to(kind).to(tl.float32)
            wa, wb = wa.to(kind).to(tl.float32), wb.to(kind).to(tl.float32)
        a = (a * wa + _half(B, cols, cols < half, HAS_B, 0.0)) * scale
        b = (b * wb + _half(B, half + cols, cols < hd - half, HAS_B, 0.0)) * scale
    if ROPE:
        cos = tl.load(COS + angle[:, None] + cols[None, :], mask=low, other=0.0).to(tl.float32)
        sin = tl.load(SIN + angle[:, None] + cols[None, :], mask=low, other=0.0).to(tl.float32)
        a, b = a * cos - b * sin, b * cos + a * sin
    out = row.to(tl.int64)[:, None] * hd + cols[None, :]
    tl.store(Y + out, a.to(Y.dtype.element_ty), mask=low)
    tl.store(Y + out + half, b.to(Y.dtype.element_ty), mask=high)


@triton.jit
def _backward(DY, X, W, COS, SIN, STATS, DX, DW, DB, x_s, x_b, x_h, c_s, c_b, rows, blocks, batch, heads, hd, half, scale,
              NORM: tl.constexpr, ROPE: tl.constexpr, RMS: tl.constexpr, HAS_W: tl.constexpr, HAS_B: tl.constexpr,
              ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """A program takes ``blocks`` blocks of rows, and leaves partial gradients of gain and bias."""
    program = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    dwa, dwb = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    dba, dbb = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for block in range(program * blocks, (program + 1) * blocks):
        row = block * ROWS + tl.arange(0, ROWS)
        at, angle = _places(row, batch, heads, x_s, x_b, x_h, c_s, c_b)
        low, high = (row < rows)[:, None] & (cols < half)[None, :], (row < rows)[:, None] & (cols < hd - half)[None, :]
        out = row.to(tl.int64)[:, None] * hd + cols[None, :]
        a = tl.load(DY + out, mask=low, other=0.0).to(tl.float32)
        b = tl.load(DY + out + half, mask=high, other=0.0).to(tl.float32)
        if ROPE:
            cos = tl.load(COS + angle[:, None] + cols[None, :], mask=low, other=0.0).to(tl.float32)
            sin = tl.load(SIN + angle[:, None] + cols[None, :], mask=low, other=0.0).to(tl.float32)
            a, b = a * cos + b * sin, b * cos - a * sin
        if NORM:
            a, b = a * scale, b * scale
            xa = tl.load(X + at[:, None] + cols[None, :], mask=low, other=0.0).to(tl.float32)
            xb = tl.load(X + at[:, None] + half + cols[None, :], mask=high, other=0.0).to(tl.float32)
            rstd = tl.load(STATS + row * 2 + 1, mask=row < rows, other=0.0)[:, None]
            if not RMS:
                mean = tl.load(STATS + row * 2, mask=row < rows, other=0.0)[:, None]
                xa, xb = tl.where(low, xa - mean, 0.0), tl.where(high, xb - mean, 0.0)
            xa, xb = xa * rstd, xb * rstd
            dwa += tl.sum(a * xa, 0)
            dwb += tl.sum(b * xb, 0)
            dba += tl.sum(a, 0)
            dbb += tl.sum(b, 0)
            a = a * _half(W, cols, cols < half, HAS_W, 1.0)
            b = b * _half(W, half + cols, cols < hd - half, HAS_W, 1.0)
            dot = ((tl.sum(a * xa, 1) + tl.sum(b * xb, 1)) / hd)[:, None]
            total = 0.0
            if not RMS:
                total = ((tl.sum(a, 1) + tl.sum(b, 1)) / hd)[:, None]
            a, b = (a - xa * dot - total) * rstd, (b - xb * dot - total) * rstd
        tl.store(DX + out, a.to(DX.dtype.element_ty), mask=low)
        tl.store(DX + out + half, b.to(DX.dtype.element_ty), mask=high)
    if HAS_W:
        tl.store(DW + program * hd + cols, dwa, mask=cols < half)
        tl.store(DW + program * hd + half + cols, dwb, mask=cols < hd - half)
    if HAS_B:
        tl.store(DB + program * hd + cols, dba, mask=cols < half)
        tl.store(DB + program * hd + half + cols, dbb, mask=cols < hd - half)


class NormRope(torch.autograd.Function):
    """K4 on one of q, k, v [s, b, heads, hd], a part of the packed projection read where it lies."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor | None, b: Tensor | None, cos: Tensor | None, sin: Tensor | None,
                rms: bool, args: NormArgs | None) -> Tensor:  # fmt: skip
        x = x if x.stride(-1) == 1 else x.contiguous()
        s, batch, heads, hd = x.shape
        rows, half = s * batch * heads, (hd + 1) // 2
        norm = args is not None
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        stats = torch.empty(rows if norm else 0, 2, dtype=torch.float32, device=x.device)
        eps, scale, cast = (args.eps, args.scale, args.cast_first and rms) if args is not None else (0.0, 1.0, False)
        _forward[(triton.cdiv(rows, BLOCK_ROWS),)](
            x, y, w, b, cos, sin, stats, *x.stride()[:3], *_angle_strides(cos), rows, batch, heads, hd, half, eps, scale,
            NORM=norm, ROPE=cos is not None, RMS=rms, HAS_W=w is not None, HAS_B=b is not None, CAST=cast,
            ROWS=BLOCK_ROWS, BLOCK=block_of(half), num_warps=4,
        )  # fmt: skip
        ctx.save_for_backward(x if norm else None, w, b, cos, sin, stats)
        ctx.plan, ctx.strides = (norm, rms, scale, x.shape), x.stride()[:3]
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, w, b, cos, sin, stats = ctx.saved_tensors
        norm, rms, scale, (s, batch, heads, hd) = ctx.plan
        dy, rows, half = dy.contiguous(), s * batch * heads, (hd + 1) // 2
        blocks = triton.cdiv(rows, BLOCK_ROWS)
        programs = programs_of(dy, blocks)
        dx, dw, db = torch.empty_like(dy), partials(programs, w), partials(programs, b)
        _backward[(programs,)](
            dy, x, w, cos, sin, stats, dx, dw, db, *ctx.strides, *_angle_strides(cos), rows,
            triton.cdiv(blocks, programs), batch, heads, hd, half, scale, NORM=norm, ROPE=cos is not None, RMS=rms,
            HAS_W=w is not None, HAS_B=b is not None, ROWS=BLOCK_ROWS, BLOCK=block_of(half), num_warps=4,
        )  # fmt: skip
        return dx, summed(dw, w), summed(db, b), None, None, None, None


def _angle_strides(cos: Tensor | None) -> tuple[int, int]:
    """Of [s, 1|b, 1, hd/2] in s and b; one column of angles serves all of a batch."""
    return (0, 0) if cos is None else (cos.stride(0), 0 if cos.shape[1] == 1 else cos.stride(1))


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    y: Tensor = NormRope.apply(x, None, None, cos, sin, True, None)
    return y


def qkv_norm_rope(rms: bool, q: Tensor, k: Tensor, v: Tensor, norms: tuple[HeadNorm, ...],
                  rope: tuple[Tensor, Tensor] | None) -> tuple[Tensor, ...]:  # fmt: skip
    cos, sin = rope or (None, None)
    return tuple(
        _norm_rope(rms, x, norm, *turn)
        for x, norm, turn in zip((q, k, v), norms, ((cos, sin), (cos, sin), (None, None)), strict=True)
    )


def _norm_rope(rms: bool, x: Tensor, norm: HeadNorm, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    if norm is None and cos is None:
        return x
    p, args = norm if norm is not None else ({}, None)
    y: Tensor = NormRope.apply(x, dense(p.get("weight")), dense(p.get("bias")), cos, sin, rms, args)
    return y


@triton.jit
def _scale(Y, GAMMA, OUT, heads, hd, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr):
    """K7, one token a program."""
    row = tl.program_id(0).to(tl.int64)
    h, d = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    at, mask = row * heads * hd + h[:, None] * hd + d[None, :], (h < heads)[:, None] & (d < hd)[None, :]
    gamma = tl.load(GAMMA + h, mask=h < heads, other=0.0).to(tl.float32)[:, None]
    y = tl.load(Y + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(OUT + at, (y * gamma).to(OUT.dtype.element_ty), mask=mask)


@triton.jit
def _scale_backward(DOUT, Y, GAMMA, DY, DGAMMA, rows, per, heads, hd, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr):
    program = tl.program_id(0)
    first = program.to(tl.int64) * per
    h, d = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    mask = (h < heads)[:, None] & (d < hd)[None, :]
    gamma = tl.load(GAMMA + h, mask=h < heads, other=0.0).to(tl.float32)[:, None]
    total = tl.zeros((BLOCK_H,), tl.float32)
    for row in range(first, tl.minimum(first + per, rows)):
        at = row * heads * hd + h[:, None] * hd + d[None, :]
        dout = tl.load(DOUT + at, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(Y + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(DY + at, (dout * gamma).to(DY.dtype.element_ty), mask=mask)
        total += tl.sum(dout * y, 1)
    tl.store(DGAMMA + program * heads + h, total, mask=h < heads)


class HeadScale(torch.autograd.Function):
    """K7: y [..., h * hd] times scale [h]."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, gamma: Tensor) -> Tensor:
        shape, y = y.shape, rows_of(y)
        out, heads = torch.empty_like(y), len(gamma)
        hd = y.shape[1] // heads
        _scale[(len(y),)](
            y, gamma, out, heads, hd,
            BLOCK_H=block_of(heads), BLOCK_D=block_of(hd), num_warps=warps_of(block_of(y.shape[1])),
        )  # fmt: skip
        ctx.save_for_backward(y, gamma)
        return out.view(shape)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor]:
        y, gamma = ctx.saved_tensors
        shape, dout, heads = dout.shape, rows_of(dout), len(gamma)
        rows, hd = len(y), y.shape[1] // heads
        programs = programs_of(y, rows)
        dy, dgamma = torch.empty_like(y), torch.empty(programs, heads, dtype=torch.float32, device=y.device)
        _scale_backward[(programs,)](
            dout, y, gamma, dy, dgamma, rows, triton.cdiv(rows, programs), heads, hd,
            BLOCK_H=block_of(heads), BLOCK_D=block_of(hd), num_warps=warps_of(block_of(y.shape[1])),
        )  # fmt: skip
        return dy.view(shape), dgamma.sum(0).to(gamma.dtype)


def head_scale(y: Tensor, gamma: Tensor) -> Tensor:
    out: Tensor = HeadScale.apply(y, gamma.contiguous())
    return out
