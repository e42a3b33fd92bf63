"""apex (NVIDIA's, built from its repository; the package index has another package of that name): fused norms, Adam."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megnorm.kernels.libraries import Library, library, low_precision
from megnorm.kernels.registry import Need, Refusal, offer
from megnorm.kernels.torch_ref import NormArgs, Params

APEX = library(
    Library(
        "apex",
        "apex",
        (
            (("fused_layer_norm_cuda",), ("forward_affine", "rms_forward_affine")),  # the extension; imports before use
            (
                ("apex.normalization.fused_layer_norm",),
                ("fused_layer_norm", "fused_layer_norm_affine", "fused_rms_norm", "fused_rms_norm_affine"),
            ),
        ),
        "in a clone of NVIDIA/apex: APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-build-isolation .",
        capability=(7, 0),
    )
)


ADAM = library(
    Library(
        "apex optimizers",
        "apex",
        ((("amp_C",), ("multi_tensor_adam",)), (("apex.optimizers",), ("FusedAdam",))),
        APEX.remedy,
        capability=(7, 0),
    )
)


def refuse(need: Need) -> Refusal:
    form = need.norm
    if form.kind not in ("layernorm", "rmsnorm"):
        return f"has no {form.kind}"
    if form.gain not in ("vector", "none"):
        return f"takes a gain for each feature in the dtype of activations, not {form.gain}"
    if form.bias != (form.kind == "layernorm" and form.gain == "vector"):
        return "takes gain and bias together for LayerNorm, and no bias for RMSNorm (model.norm.bias)"
    if form.cast_first and form.kind == "rmsnorm" and low_precision(need):
        return "rounds after the gain; set model.norm.cast to after_gain"
    if need.dtype == torch.float64:
        return "is compared with the reference in fp32 and below"
    return "runs on CUDA devices" if need.device != "cuda" else APEX.missing()


@offer("norm", "apex", 20, refuse)
def make_norm(need: Need) -> Callable[[Tensor, Params, NormArgs], Tensor]:
    """Its functions: the modules fall back to torch unasked."""

    def norm(x: Tensor, p: Params, args: NormArgs) -> Tensor:
        functions, shape, x = APEX.module(1), (args.n,), x.contiguous()
        y: Tensor
        if need.norm.kind == "layernorm":
            y = (
                functions.fused_layer_norm_affine(x, p["weight"].contiguous(), p["bias"], shape, args.eps)
                if "weight" in p
                else functions.fused_layer_norm(x, shape, args.eps)
            )
        else:
            y = (
                functions.fused_rms_norm_affine(x, p["weight"].contiguous(), shape, args.eps)
                if "weight" in p
                else functions.fused_rms_norm(x, shape, args.eps)
            )
        return y

    return norm


def refuse_adam(need: Need) -> Refusal:
    if need.dtype != torch.float32:
        return "updates fp32 masters"
    return "runs on CUDA devices" if need.device != "cuda" else ADAM.missing()


# torch's own is one kernel a group too: it serves who asks for it.
@offer("adamw", "apex", -2, refuse_adam)
def make_adam(need: Need) -> Callable[..., torch.optim.Optimizer]:
    def adam(groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float) -> Any:
        return ADAM.module(1).FusedAdam(groups, lr=lr, betas=betas, eps=eps, adam_w_mode=True, bias_correction=True)

    return adam
