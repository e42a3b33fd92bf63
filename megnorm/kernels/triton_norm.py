"""Residual add and norm in one pass, forward and backward: K1 N(skip x + branch f), K2 skip x + branch N(f), K3 both norms."""

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
    ungain,
    warps_of,
    weighted,
)


@triton.jit
def _add_norm(X, F, W, B, Y, S, MEAN, RSTD, n, eps, skip, branch, scale,
              RMS: tl.constexpr, HAS_W: tl.constexpr, HAS_B: tl.constexpr, CAST: tl.constexpr,
              BLOCK: tl.constexpr):  # fmt: skip
    """K1, one row a program: the sum (rounded as it is stored) and its norm."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask, at = cols < n, row * n + cols
    x = tl.load(X + at, mask=mask, other=0.0).to(tl.float32)
    f = tl.load(F + at, mask=mask, other=0.0).to(tl.float32)
    rounded = (skip * x + branch * f).to(S.dtype.element_ty)
    tl.store(S + at, rounded, mask=mask)
    s, mean = rounded.to(tl.float32), 0.0
    if not RMS:
        mean = tl.sum(s, 0) / n
        tl.store(MEAN + row, mean)
    c = tl.where(mask, s - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(c * c, 0) / n + eps)
    tl.store(RSTD + row, rstd)
    y = gain(c * rstd, W, B, cols, mask, Y.dtype.element_ty, HAS_W, HAS_B, CAST) * scale
    tl.store(Y + at, y.to(Y.dtype.element_ty), mask=mask)


@triton.jit
def _add_norm_backward(DY, S, DS, W, MEAN, RSTD, DX, DF, DW, DB, rows, per, n, skip, branch, scale,
                       RMS: tl.constexpr, HAS_W: tl.constexpr, HAS_B: tl.constexpr, HAS_DS: tl.constexpr,
                       HAS_DX: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """``per`` rows a program. DS: the sum's own gradient. DX: written where it differs from DF."""
    program = tl.program_id(0)
    first = program.to(tl.int64) * per
    cols = tl.arange(0, BLOCK)
    mask = cols < n
    dw, db = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for row in range(first, tl.minimum(first + per, rows)):
        at = row * n + cols
        dy = tl.load(DY + at, mask=mask, other=0.0).to(tl.float32) * scale
        s = tl.load(S + at, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(RSTD + row)
        if not RMS:
            s -= tl.load(MEAN + row)
        xh = tl.where(mask, s * rstd, 0.0)
        ds = ungain(weighted(dy, W, cols, mask, HAS_W), xh, rstd, n, mask, RMS)
        if HAS_DS:
            ds += tl.load(DS + at, mask=mask, other=0.0).to(tl.float32)
        if HAS_DX:
            tl.store(DX + at, (skip * ds).to(DX.dtype.element_ty), mask=mask)
        tl.store(DF + at, (branch * ds).to(DF.dtype.element_ty), mask=mask)
        dw += dy * xh
        db += dy
    if HAS_W:
        tl.store(DW + program * n + cols, dw, mask=mask)
    if HAS_B:
        tl.store(DB + program * n + cols, db, mask=mask)


@triton.jit
def _norm_add(X, F, W, B, W2, B2, OUT, H, MEAN, RSTD, MEAN2, RSTD2, n, eps, eps2, skip, branch, scale, scale2,
              RMS: tl.constexpr, HAS_W: tl.constexpr, HAS_B: tl.constexpr, CAST: tl.constexpr, SECOND: tl.constexpr,
              RMS2: tl.constexpr, HAS_W2: tl.constexpr, HAS_B2: tl.constexpr, CAST2: tl.constexpr,
              BLOCK: tl.constexpr):  # fmt: skip
    """K2 and, with SECOND, K3, one row a program."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask, at = cols < n, row * n + cols
    f = tl.load(F + at, mask=mask, other=0.0).to(tl.float32)
    mean = 0.0
    if not RMS:
        mean = tl.sum(f, 0) / n
        tl.store(MEAN + row, mean)
    c = tl.where(mask, f - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(c * c, 0) / n + eps)
    tl.store(RSTD + row, rstd)
    y = gain(c * rstd, W, B, cols, mask, OUT.dtype.element_ty, HAS_W, HAS_B, CAST) * scale
    x = tl.load(X + at, mask=mask, other=0.0).to(tl.float32)
    out = (skip * x + branch * y).to(OUT.dtype.element_ty)
    tl.store(OUT + at, out, mask=mask)
    if SECOND:
        stream, mean2 = out.to(tl.float32), 0.0
        if not RMS2:
            mean2 = tl.sum(stream, 0) / n
            tl.store(MEAN2 + row, mean2)
        c2 = tl.where(mask, stream - mean2, 0.0)
        rstd2 = 1.0 / tl.sqrt(tl.sum(c2 * c2, 0) / n + eps2)
        tl.store(RSTD2 + row, rstd2)
        h = gain(c2 * rstd2, W2, B2, cols, mask, H.dtype.element_ty, HAS_W2, HAS_B2, CAST2) * scale2
        tl.store(H + at, h.to(H.dtype.element_ty), mask=mask)


@triton.jit
def _norm_add_backward(DOUT, DH, F, OUT, W, W2, MEAN, RSTD, MEAN2, RSTD2, DX, DF, DW, DB, DW2, DB2,
                       rows, per, n, skip, branch, scale, scale2,
                       RMS: tl.constexpr, HAS_W: tl.constexpr, HAS_B: tl.constexpr, SECOND: tl.constexpr,
                       RMS2: tl.constexpr, HAS_W2: tl.constexpr, HAS_B2: tl.constexpr, HAS_DX: tl.constexpr,
                       BLOCK: tl.constexpr):  # fmt: skip
    """The gradient of the sum goes to x by skip, and through the norm to f."""
    program = tl.program_id(0)
    first = program.to(tl.int64) * per
    cols = tl.arange(0, BLOCK)
    mask = cols < n
    dw, db = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    dw2, db2 = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for row in range(first, tl.minimum(first + per, rows)):
        at = row * n + cols
        ds = tl.load(DOUT + at, mask=mask, other=0.0).to(tl.float32)
        if SECOND:
            dh = tl.load(DH + at, mask=mask, other=0.0).to(tl.float32) * scale2
            out = tl.load(OUT + at, mask=mask, other=0.0).to(tl.float32)
            rstd2 = tl.load(RSTD2 + row)
            if not RMS2:
                out -= tl.load(MEAN2 + row)
            xh2 = tl.where(mask, out * rstd2, 0.0)
            ds += ungain(weighted(dh, W2, cols, mask, HAS_W2), xh2, rstd2, n, mask, RMS2)
            dw2 += dh * xh2
            db2 += dh
        if HAS_DX:
            tl.store(DX + at, (skip * ds).to(DX.dtype.element_ty), mask=mask)
        dy = ds * (branch * scale)
        f = tl.load(F + at, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(RSTD + row)
        if not RMS:
            f -= tl.load(MEAN + row)
        xh = tl.where(mask, f * rstd, 0.0)
        df = ungain(weighted(dy, W, cols, mask, HAS_W), xh, rstd, n, mask, RMS)
        tl.store(DF + at, df.to(DF.dtype.element_ty), mask=mask)
        dw += dy * xh
        db += dy
    if HAS_W:
        tl.store(DW + program * n + cols, dw, mask=mask)
    if HAS_B:
        tl.store(DB + program * n + cols, db, mask=mask)
    if HAS_W2:
        tl.store(DW2 + program * n + cols, dw2, mask=mask)
    if HAS_B2:
        tl.store(DB2 + program * n + cols, db2, mask=mask)


def _vector(x: Tensor, rows: int) -> Tensor:
    return torch.empty(rows, dtype=torch.float32, device=x.device)


class AddNorm(torch.autograd.Function):
    """K1. Keeps the sum and one or two numbers a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, f: Tensor, w: Tensor | None, b: Tensor | None, rms: bool, args: NormArgs,
                skip: float, branch: float) -> tuple[Tensor, Tensor]:  # fmt: skip
        shape, x, f = x.shape, rows_of(x), rows_of(f)
        rows, n = x.shape
        y, s = torch.empty_like(x), torch.empty_like(x)
        mean, rstd = _vector(x, 0 if rms else rows), _vector(x, rows)
        block = block_of(n)
        _add_norm[(rows,)](
            x, f, w, b, y, s, mean, rstd, n, args.eps, skip, branch, args.scale,
            RMS=rms, HAS_W=w is not None, HAS_B=b is not None, CAST=args.cast_first and rms, BLOCK=block,
            num_warps=warps_of(block),
        )  # fmt: skip
        ctx.save_for_backward(s, w, b, mean, rstd)
        ctx.rms, ctx.factors = rms, (skip, branch, args.scale)
        ctx.set_materialize_grads(False)
        return y.view(shape), s.view(shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, ds: Tensor | None) -> tuple[Any, ...]:
        s, w, b, mean, rstd = ctx.saved_tensors
        skip, branch, scale = ctx.factors
        shape = (dy if dy is not None else ds).shape  # type: ignore[union-attr]
        dy = torch.zeros_like(s) if dy is None else rows_of(dy)
        ds = None if ds is None else rows_of(ds)
        rows, n = s.shape
        programs, block = programs_of(s, rows), block_of(n)
        df = torch.empty_like(s)
        dx = df if skip == branch else torch.empty_like(s)
        dw, db = partials(programs, w), partials(programs, b)
        _add_norm_backward[(programs,)](
            dy, s, ds, w, mean, rstd, dx, df, dw, db, rows, triton.cdiv(rows, programs), n, skip, branch, scale,
            RMS=ctx.rms, HAS_W=w is not None, HAS_B=b is not None, HAS_DS=ds is not None, HAS_DX=dx is not df,
            BLOCK=block, num_warps=warps_of(block),
        )  # fmt: skip
        return dx.view(shape), df.view(shape), summed(dw, w), summed(db, b), None, None, None, None


class NormAdd(torch.autograd.Function):
    """K2, and K3 where the second norm is given. Keeps f, the sum (K3) and one or two numbers a row and norm."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, f: Tensor, w: Tensor | None, b: Tensor | None, w2: Tensor | None, b2: Tensor | None,
                rms: bool, args: NormArgs, rms2: bool | None, args2: NormArgs | None,
                skip: float, branch: float) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        shape, x, f = x.shape, rows_of(x), rows_of(f)
        rows, n = x.shape
        second = args2 is not None
        out = torch.empty_like(x)
        h = torch.empty_like(x) if second else None
        mean, rstd = _vector(x, 0 if rms else rows), _vector(x, rows)
        mean2, rstd2 = _vector(x, rows if second and not rms2 else 0), _vector(x, rows if second else 0)
        eps2, scale2 = (args2.eps, args2.scale) if args2 is not None else (0.0, 1.0)
        block = block_of(n)
        _norm_add[(rows,)](
            x, f, w, b, w2, b2, out, h, mean, rstd, mean2, rstd2,
            n, args.eps, eps2, skip, branch, args.scale, scale2,
            RMS=rms, HAS_W=w is not None, HAS_B=b is not None, CAST=args.cast_first and rms, SECOND=second,
            RMS2=bool(rms2), HAS_W2=w2 is not None, HAS_B2=b2 is not None,
            CAST2=args2 is not None and args2.cast_first and bool(rms2), BLOCK=block, num_warps=warps_of(block),
        )  # fmt: skip
        ctx.save_for_backward(f, out if second else None, w, b, w2, b2, mean, rstd, mean2, rstd2)
        ctx.kinds, ctx.factors, ctx.shape = (rms, bool(rms2), second), (skip, branch, args.scale, scale2), shape
        ctx.set_materialize_grads(False)
        return out.view(shape), None if h is None else h.view(shape)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dh: Tensor | None) -> tuple[Any, ...]:
        f, out, w, b, w2, b2, mean, rstd, mean2, rstd2 = ctx.saved_tensors
        rms, rms2, second = ctx.kinds
        skip, branch, scale, scale2 = ctx.factors
        rows, n = f.shape
        dout = torch.zeros_like(f) if dout is None else rows_of(dout)
        if second:
            dh = torch.zeros_like(f) if dh is None else rows_of(dh)
        programs, block = programs_of(f, rows), block_of(n)
        df = torch.empty_like(f)
        # Without a second norm and a factor, x's gradient is the sum's.
        dx = torch.empty_like(f) if second or skip != 1.0 else dout
        dw, db, dw2, db2 = (partials(programs, one) for one in (w, b, w2, b2))
        _norm_add_backward[(programs,)](
            dout, dh, f, out, w, w2, mean, rstd, mean2, rstd2, dx, df, dw, db, dw2, db2,
            rows, triton.cdiv(rows, programs), n, skip, branch, scale, scale2,
            RMS=rms, HAS_W=w is not None, HAS_B=b is not None, SECOND=second, RMS2=rms2, HAS_W2=w2 is not None,
            HAS_B2=b2 is not None, HAS_DX=dx is not dout, BLOCK=block, num_warps=warps_of(block),
        )  # fmt: skip
        grads = (summed(dw, w), summed(db, b), summed(dw2, w2), summed(db2, b2))
        return dx.view(ctx.shape), df.view(ctx.shape), *grads, *(None for _ in range(6))


def add_norm(rms: bool, x: Tensor, f: Tensor, p: Params, args: NormArgs, skip: float, branch: float,
             keep_sum: bool) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    y, s = AddNorm.apply(x, f, dense(p.get("weight")), dense(p.get("bias")), rms, args, skip, branch)
    return (y, s) if keep_sum else y


def norm_add(rms: bool, x: Tensor, f: Tensor, p: Params, args: NormArgs, skip: float, branch: float) -> Tensor:
    w, b = dense(p.get("weight")), dense(p.get("bias"))
    out: Tensor = NormAdd.apply(x, f, w, b, None, None, rms, args, None, None, skip, branch)[0]
    return out


def norm_add_norm(rms: bool, rms2: bool, x: Tensor, f: Tensor, one: tuple[Params, NormArgs],
                  two: tuple[Params, NormArgs], skip: float, branch: float) -> tuple[Tensor, Tensor]:  # fmt: skip
    (p, args), (p2, args2) = one, two
    weights = [dense(params.get(name)) for params in (p, p2) for name in ("weight", "bias")]
    stream, h = NormAdd.apply(x, f, *weights, rms, args, rms2, args2, skip, branch)
    return stream, h
