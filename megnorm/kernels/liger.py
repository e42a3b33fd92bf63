"""Liger-Kernel: Triton norms (RMSNorm, LayerNorm, DyT) and residual add with RMSNorm."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megnorm.kernels.libraries import Library, library, low_precision
from megnorm.kernels.registry import Need, Refusal, offer
from megnorm.kernels.torch_ref import NormArgs, Params

LIGER = library(
    Library(
        "liger_kernel",
        "liger-kernel",
        (
            (
                ("liger_kernel.transformers.functional",),
                ("liger_rms_norm", "liger_layer_norm", "liger_dyt", "liger_fused_add_rms_norm"),
            ),
        ),
        "pip install liger-kernel (megnorm[liger])",
        capability=(7, 0),
    )
)
LONGEST_ROW = 65536  # features


def _refuse(need: Need) -> Refusal:
    if need.norm.width > LONGEST_ROW:
        return f"rows of {need.norm.width} features are too long for it"
    if need.dtype == torch.float64:
        return "computes in fp32"
    return "runs on CUDA devices" if need.device != "cuda" else LIGER.missing()


def refuse_norm(need: Need) -> Refusal:
    form = need.norm
    if form.kind not in ("layernorm", "rmsnorm", "dyt"):
        return f"has no {form.kind}"
    if form.gain != "vector":
        return f"takes a gain for each feature in the dtype of activations, not {form.gain}"
    if form.bias != (form.kind != "rmsnorm"):
        return "takes a bias with LayerNorm and DyT, and none with RMSNorm (model.norm.bias)"
    return _refuse(need)


def casting(need: Need) -> str:
    """Its word for where a row is rounded: before the gain ("llama"), or once, after it ("gemma")."""
    return "llama" if need.norm.cast_first or not low_precision(need) else "gemma"


@offer("norm", "liger", 10, refuse_norm)
def make_norm(need: Need) -> Callable[[Tensor, Params, NormArgs], Tensor]:
    kind, mode = need.norm.kind, casting(need)

    def norm(x: Tensor, p: Params, args: NormArgs) -> Tensor:
        liger, weight = LIGER.module(), p["weight"].contiguous()
        y: Tensor
        if kind == "rmsnorm":  # not in place: the gradient that it would overwrite belongs to the residual too
            y = liger.liger_rms_norm(x, weight, args.eps, casting_mode=mode, in_place=False)
        elif kind == "layernorm":
            y = liger.liger_layer_norm(x, weight, p["bias"], args.eps)
        else:
            y = liger.liger_dyt(x, p["alpha"], weight, p["bias"])
        return y

    return norm


def refuse_add_norm(need: Need) -> Refusal:
    if need.norm.kind != "rmsnorm":
        return f"adds before RMSNorm, not before {need.norm.kind}"
    return refuse_norm(need)


@offer("add_norm", "liger", 10, refuse_add_norm)
def make_add_norm(need: Need) -> Callable[..., Any]:
    mode = casting(need)

    def add_norm(x: Tensor, f: Tensor, p: Params, args: NormArgs, skip: float, branch: float, keep_sum: bool) -> Any:
        x, f = (x if skip == 1.0 else x * skip), (f if branch == 1.0 else f * branch)
        y, s = LIGER.module().liger_fused_add_rms_norm(
            x, f, p["weight"].contiguous(), args.eps, casting_mode=mode, in_place=False
        )
        y = y if args.scale == 1.0 else y * args.scale
        return (y, s) if keep_sum else y

    return add_norm
