"""The reference of every operation in plain PyTorch: it defines the meaning, and runs on every device."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megnorm.kernels.registry import Need, offer

Reduce = Callable[[Tensor], Tensor]
Params = Mapping[str, Tensor]


@dataclass(frozen=True)
class NormArgs:
    """What a norm is told beside its parameters.

    n: features it normalizes over, on all ranks. reduce: sums a statistic over the ranks that share them, and is
    differentiable (its gradient is the same sum). share: what this rank's sum counts (1 / replicas of its features).
    cast_first: an RMSNorm casts to the input's dtype before its gain, not after.
    """

    eps: float
    n: int
    cast_first: bool
    share: float
    reduce: Reduce


def _serves_all(need: Need) -> None:
    return None


def wide(x: Tensor) -> torch.dtype:
    """The dtype of statistics: fp32 for low precision, else the tensor's own."""
    return torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype


class _RMSNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, statistics in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, args: NormArgs) -> Tensor:
        x32 = x.to(wide(x))
        squares = args.reduce(torch.linalg.vector_norm(x32, dim=-1, keepdim=True).square_().mul_(args.share))
        rstd = squares.div_(args.n).add_(args.eps).rsqrt_()
        ctx.save_for_backward(x, weight, rstd)
        ctx.args = args
        if weight is None:
            return (x32 * rstd).to(x.dtype)
        if args.cast_first:
            return (x32 * rstd).to(x.dtype) * weight.to(x.dtype)
        return (x32 * rstd * weight.to(x32.dtype)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        xh = x.to(rstd.dtype) * rstd
        g = grad.to(rstd.dtype)
        dweight = None
        if weight is not None:
            dweight = (g * xh).flatten(0, -1 - weight.dim()).sum(0).to(weight.dtype)
            g = g * weight.to(rstd.dtype)
        mean = ctx.args.reduce((g * xh).sum(-1, keepdim=True)).mul_(ctx.args.share / ctx.args.n)
        dx = torch.addcmul(g, xh, mean, value=-1.0).mul_(rstd)
        return dx.to(x.dtype), dweight, None


class _ShardedLayerNorm(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) * weight + bias, the last axis spread over ranks. Two passes, never E[x^2] - m^2."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, args: NormArgs) -> Tensor:
        x32 = x.to(wide(x))
        mean = args.reduce(x32.sum(-1, keepdim=True).mul_(args.share)).div_(args.n)
        centred = x32 - mean
        var = args.reduce(centred.square().sum(-1, keepdim=True).mul_(args.share)).div_(args.n)
        rstd = var.add_(args.eps).rsqrt_()
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.args = args
        y = centred.mul_(rstd)
        if weight is not None:
            y = y * weight.to(y.dtype)
        if bias is not None:
            y = y + bias.to(y.dtype)
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        xh = (x.to(rstd.dtype) - mean) * rstd
        g = grad.to(rstd.dtype)
        dweight = dbias = None
        if bias is not None:
            dbias = g.flatten(0, -1 - bias.dim()).sum(0).to(bias.dtype)
        if weight is not None:
            dweight = (g * xh).flatten(0, -1 - weight.dim()).sum(0).to(weight.dtype)
            g = g * weight.to(rstd.dtype)
        sums = torch.cat([g.sum(-1, keepdim=True), (g * xh).sum(-1, keepdim=True)], -1)
        means = ctx.args.reduce(sums).mul_(ctx.args.share / ctx.args.n)
        dx = (g - means[..., :1] - xh * means[..., 1:]) * rstd
        return dx.to(x.dtype), dweight, dbias, None


def _length(x: Tensor, args: NormArgs) -> Tensor:
    """Euclidean length over the last axis, on all ranks; clamped so that a zero vector has gradient zero."""
    return args.reduce(x.square().sum(-1, keepdim=True) * args.share).clamp_min(1e-30).sqrt()


@offer("norm", "torch", 0, _serves_all)
def make_norm(need: Need) -> Callable[[Tensor, Params, NormArgs], Tensor]:
    """fn(x, params, args) -> like x, for a norm kind.

    x [..., n / ranks] (or [..., heads, hd]); params: weight, bias, alpha, shift, beta by name, those the kind has.
    """

    def layernorm(x: Tensor, p: Params, args: NormArgs) -> Tensor:
        weight, bias = p.get("weight"), p.get("bias")
        if need.sharded or (weight is not None and weight.dim() > 1):
            return _ShardedLayerNorm.apply(x, weight, bias, args)
        if weight is None and bias is not None:
            return F.layer_norm(x, (args.n,), None, None, args.eps) + bias
        if weight is not None and weight.dtype != x.dtype:  # 1 + w is kept in fp32
            wide_bias = None if bias is None else bias.to(weight.dtype)
            return F.layer_norm(x.to(weight.dtype), (args.n,), weight, wide_bias, args.eps).to(x.dtype)
        return F.layer_norm(x, (args.n,), weight, bias, args.eps)

    def rmsnorm(x: Tensor, p: Params, args: NormArgs) -> Tensor:
        y: Tensor = _RMSNorm.apply(x, p.get("weight"), args)
        return y if "bias" not in p else y + p["bias"]

    def unit(x: Tensor, p: Params, args: NormArgs) -> Tensor:
        x32 = x.to(wide(x))
        factor = float(args.n) ** 0.5 if need.kind == "scalenorm" else 1.0
        return _affine((x32 * (factor / _length(x32, args))).to(x.dtype), p)

    def pointwise(x: Tensor, p: Params, args: NormArgs) -> Tensor:
        inside = p["alpha"] * x
        return _affine(torch.tanh(inside) if need.kind == "dyt" else torch.erf(inside + p["shift"]), p)

    def seednorm(x: Tensor, p: Params, args: NormArgs) -> Tensor:
        x32 = x.to(wide(x))
        rms = (args.reduce(x32.square().sum(-1, keepdim=True) * args.share) / args.n + args.eps).rsqrt()
        gate = torch.tanh(args.reduce((x32 * p["beta"]).sum(-1, keepdim=True) * args.share))
        return ((p["alpha"] * gate + p["weight"]) * (x32 * rms)).to(x.dtype)

    made = {"layernorm": layernorm, "rmsnorm": rmsnorm, "l2": unit, "scalenorm": unit, "dyt": pointwise}
    return {**made, "derf": pointwise, "seednorm": seednorm}[need.kind]


def _affine(y: Tensor, p: Params) -> Tensor:
    out = y * p["weight"] if "weight" in p else y
    return (out + p["bias"] if "bias" in p else out).to(y.dtype)


@offer("attention", "torch", 0, _serves_all)
def make_attention(need: Need) -> Callable[..., Tensor]:
    """fn(q [s, b, h, hd], k, v [s', b, kv, hd], *, mask, documents, dropout, causal, bias) -> [s, b, h, hd].

    mask [b, 1, s|1, s']: True may look (causality included); None: causal, or everywhere. documents: lengths of packed
    documents, b = 1. bias [1, h, s, s']: added to the scores, which must then have a mask or be no causal ones.
    """

    def attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Tensor | None,
        documents: tuple[int, ...] | None,
        dropout: float,
        causal: bool = True,
        bias: Tensor | None = None,
    ) -> Tensor:
        if documents is not None:
            parts = zip(q.split(documents), k.split(documents), v.split(documents), strict=True)
            return torch.cat([_softmax_attention(*part, None, dropout, causal) for part in parts])
        if bias is not None:
            mask = bias if mask is None else bias.masked_fill(~mask, -torch.inf)
        return _softmax_attention(q, k, v, mask, dropout, causal)

    return attention


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, causal: bool) -> Tensor:
    out = F.scaled_dot_product_attention(
        q.permute(1, 2, 0, 3),
        k.permute(1, 2, 0, 3),
        v.permute(1, 2, 0, 3),
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=causal and mask is None,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.permute(2, 0, 1, 3)


@offer("activation", "torch", 0, _serves_all)
def make_activation(need: Need) -> Callable[[Tensor], Tensor]:
    """fn(x) -> like x, by name."""
    return {
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "relu": F.relu,
        "relu_squared": lambda x: F.relu(x).square(),
        "silu": F.silu,
    }[need.kind]


@offer("rope", "torch", 0, _serves_all)
def make_rope(need: Need) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """fn(x [s, b, h, hd], cos, sin [s, 1|b, 1, hd/2]) -> like x; halves are turned against each other (Llama's form)."""

    def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    return rope


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


@offer("grouped_gemm", "torch", 0, _serves_all)
def make_grouped_gemm(need: Need) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """fn(x [n, k], weight [e, rows, k], counts [e] int64, their sum n) -> [n, rows]: counts[i] rows of x by matrix i."""

    def grouped_gemm(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        y: Tensor = _GroupedLinear.apply(x, weight, counts.tolist())
        return y

    return grouped_gemm
