"""The reference of every operation in plain PyTorch: it defines the meaning, and runs on every device."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.adamw import adamw

from megnorm.kernels.registry import FEATURES, Need, Scores, offer

Reduce = Callable[[Tensor], Tensor]
Params = Mapping[str, Tensor]
# Keys. Below it PyTorch's attention on a CPU is several times slower backward in bf16 and fp16 than in fp32.
SHORT = 512


@dataclass(frozen=True)
class NormArgs:
    """What a norm is told beside its parameters.

    n: features it normalizes over, on all ranks. reduce: sums a statistic over the ranks that share them, and is
    differentiable (its gradient is the same sum). share: what this rank's sum counts (1 / replicas of its features).
    cast_first: an RMSNorm casts to the input's dtype before its gain, not after. scale: a constant factor on the norm's
    output, which operations apply that hold more than the norm; after a plain norm its layer does.
    """

    eps: float
    n: int
    cast_first: bool
    share: float
    reduce: Reduce
    scale: float = 1.0


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
@offer("sharded_norm", "torch", 0, _serves_all)
def make_norm(need: Need) -> Callable[[Tensor, Params, NormArgs], Tensor]:
    """fn(x, params, args) -> like x, for a norm kind; ``need.sharded`` where statistics cross ranks.

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
        factor = float(args.n) ** 0.5 if need.norm.kind == "scalenorm" else 1.0
        return _affine((x32 * (factor / _length(x32, args))).to(x.dtype), p)

    def pointwise(x: Tensor, p: Params, args: NormArgs) -> Tensor:
        inside = p["alpha"] * x
        return _affine(torch.tanh(inside) if need.norm.kind == "dyt" else torch.erf(inside + p["shift"]), p)

    def seednorm(x: Tensor, p: Params, args: NormArgs) -> Tensor:
        x32 = x.to(wide(x))
        rms = (args.reduce(x32.square().sum(-1, keepdim=True) * args.share) / args.n + args.eps).rsqrt()
        gate = torch.tanh(args.reduce((x32 * p["beta"]).sum(-1, keepdim=True) * args.share))
        return ((p["alpha"] * gate + p["weight"]) * (x32 * rms)).to(x.dtype)

    made = {"layernorm": layernorm, "rmsnorm": rmsnorm, "l2": unit, "scalenorm": unit, "dyt": pointwise}
    return {**made, "derf": pointwise, "seednorm": seednorm}[need.norm.kind]


def _affine(y: Tensor, p: Params) -> Tensor:
    out = y * p["weight"] if "weight" in p else y
    return (out + p["bias"] if "bias" in p else out).to(y.dtype)


def _refuse_scores(need: Need) -> str | None:
    if not need.causal and (need.scores.window is not None or need.scores.alibi):
        return "looks back alone through a window and with linear biases (model.attention.window, model.positions)"
    return "adds no bias to scores of packed documents" if need.biased and need.packed else None


@offer("attention", "torch", 0, _refuse_scores, FEATURES)
def make_attention(need: Need) -> Callable[..., Tensor]:
    """fn(q [s, b, h, hd], k, v [s', b, kv, hd], *, mask, documents, dropout, causal, bias) -> [s, b, h, hd].

    mask [b, 1, s|1, s']: True may look (causality included); None: causal, or everywhere. documents: lengths of packed
    documents, b = 1. bias [1, h, s, s']: added to the scores, behind a cap.
    """
    slopes = torch.tensor(need.scores.alibi, dtype=torch.float64, device=need.device) if need.scores.alibi else None
    softmax = partial(_softmax_attention, need.scores, slopes)

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
        if documents is None:
            return softmax(q, k, v, mask, bias, dropout, causal)
        assert bias is None, "refused when the layer was built"
        parts = zip(q.split(documents), k.split(documents), v.split(documents), strict=True)
        return torch.cat([softmax(*part, None, None, dropout, causal) for part in parts])

    return attention


def _softmax_attention(
    scores: Scores,
    slopes: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    dropout: float,
    causal: bool,
) -> Tensor:
    s = len(q)
    if scores.window is not None and scores.window < s:
        mask = _within(scores.window, s, mask, q.device)
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    if slopes is not None:
        distances = _distances(slopes, s, wide(q))
        bias = distances if bias is None else bias + distances
    if causal and mask is None and (bias is not None or scores.softcap is not None):
        mask = _causal(s, q.device)
    if bias is not None:
        mask = bias if mask is None else bias.masked_fill(~mask, -torch.inf)
    if mask is not None and mask.is_floating_point() and mask.device.type != "cpu":
        mask = mask.to(q.dtype)  # PyTorch's kernels there refuse a bias in another dtype, or misread it
    if scores.softcap is not None:
        return _capped_attention(scores.softcap, scores.scale, q, k, v, mask, dropout).permute(2, 0, 1, 3)
    dtype = q.dtype
    if q.device.type == "cpu" and max(s, k.shape[2]) < SHORT:
        q, k, v = (x.to(wide(x)) for x in (q, k, v))
        mask = mask.to(q.dtype) if mask is not None and mask.is_floating_point() else mask
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=causal and mask is None,
        scale=scores.scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out.to(dtype).permute(2, 0, 1, 3)


def _capped_attention(
    cap: float, scale: float | None, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float
) -> Tensor:
    """q [b, h, s, hd], k, v [b, kv, s', hd] -> [b, h, s, hd]. mask: True may look, or what is added to capped scores."""
    scale, groups = q.shape[-1] ** -0.5 if scale is None else scale, q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (k, v))
    z = cap * torch.tanh(q @ k.transpose(-1, -2) * (scale / cap))
    if mask is not None:
        z = z.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else z + mask
    return F.dropout(z.softmax(-1, dtype=wide(q)).to(q.dtype), dropout) @ v


def _causal(s: int, device: torch.device) -> Tensor:
    return torch.ones(s, s, dtype=torch.bool, device=device).tril()


def _within(window: int, s: int, mask: Tensor | None, device: torch.device) -> Tensor:
    """The mask (None: causal) without what lies further back than a window; a row that sees nothing sees itself."""
    band = _causal(s, device).triu(1 - window)
    if mask is None:
        return band
    near = mask & band
    return near | (~near.any(-1, keepdim=True) & torch.eye(s, dtype=torch.bool, device=device))


def _distances(slopes: Tensor, s: int, dtype: torch.dtype) -> Tensor:
    """-slope * distance to the left: [1, h, s, s]."""
    place = torch.arange(s, dtype=slopes.dtype, device=slopes.device)
    return (slopes[:, None, None] * (place - place[:, None])).to(dtype)[None]


def _refuse_quantized(need: Need) -> str | None:
    return "multiplies in the dtype of activations" if need.quantize else None


@offer("linear", "torch", 0, _refuse_quantized)
def make_linear(need: Need) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """fn(x [..., in], weight [out, in], bias [out] or None) -> [..., out]."""
    return F.linear


class AdamW:
    """torch's fused AdamW by its function. The class of that name imports the compiler when it is made, a second of every
    start, which does nothing for what is not compiled."""

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float) -> None:
        self.param_groups = [{"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, **group} for group in groups]
        self.state: dict[Tensor, dict[str, Tensor]] = {}

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            if not params:
                continue
            for new in (param for param in params if param not in self.state):
                count = torch.zeros((), dtype=torch.float32, device=new.device)
                self.state[new] = {
                    "step": count, "exp_avg": torch.zeros_like(new), "exp_avg_sq": torch.zeros_like(new)
                }  # fmt: skip
            states = [self.state[param] for param in params]
            adamw(
                params,
                [param.grad for param in params],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [state["step"] for state in states],
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )


@offer("adamw", "torch", 0, _serves_all)
def make_adamw(need: Need) -> Callable[..., AdamW]:
    """fn(groups, *, lr, betas, eps) -> an optimizer with decoupled decay; state of a parameter: exp_avg, exp_avg_sq.

    How many updates the moments have seen is "step": a tensor in each parameter's state here, an int in each group elsewhere.
    """
    return AdamW


@offer("activation", "torch", 0, _serves_all)
def make_activation(need: Need) -> Callable[..., Tensor]:
    """fn(x) -> act(x) by name; gated: fn(gate, up) -> act(gate) * up."""
    act: Callable[[Tensor], Tensor] = {
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "relu": F.relu,
        "relu_squared": lambda x: F.relu(x).square(),
        "silu": F.silu,
    }[need.kind]
    return (lambda gate, up: act(gate) * up) if need.gated else act


@offer("rope", "torch", 0, _serves_all)
def make_rope(need: Need) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """fn(x [s, b, h, hd], cos, sin [s, 1|b, 1, hd/2]) -> like x; halves are turned against each other (Llama's form)."""

    def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    return rope
