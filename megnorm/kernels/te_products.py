"""Transformer Engine's products, in the working precision or in FP8: Linear, and LayerNormLinear where a norm comes before.

As in transformer_engine.py a module is built on ``meta`` and lent our parameters. Linear multiplies what a rank holds: its
collectives are ours. LayerNormLinear gathers between its norm and its product, so there they are its own, over our group.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from megnorm.kernels.libraries import Library, library, low_precision
from megnorm.kernels.registry import Need, Refusal, offer
from megnorm.kernels.torch_ref import NormArgs, Params
from megnorm.kernels.transformer_engine import BACKEND, on_cuda, refuse_norm

FP8 = library(
    Library(
        "transformer_engine FP8",
        "transformer-engine",
        (
            (("transformer_engine.pytorch",), ("Linear", "LayerNormLinear", "autocast")),
            (
                ("transformer_engine.common.recipe",),
                ("Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling", "DelayedScaling"),
            ),
        ),
        "transformer-engine 2.9 or newer has it",
        capability=(8, 9),
    )
)
# recipe: its class, the function that says whether the device has it, and what sizes must be multiples of
RECIPES = {
    "current": ("Float8CurrentScaling", "is_fp8_available", 16),
    "block": ("Float8BlockScaling", "is_fp8_block_scaling_available", 16),
    "mxfp8": ("MXFP8BlockScaling", "is_mxfp8_available", 32),
    "delayed": ("DelayedScaling", "is_fp8_available", 16),
}


def refuse_product(need: Need) -> Refusal:
    if not need.quantize:
        return on_cuda(need, FP8)
    if not low_precision(need):
        return "quantizes bf16 and fp16 (train.precision)"
    _, available, step = RECIPES[need.quantize]
    if any(size % step for size in need.features):
        sizes = f"{need.features[0]} by {need.features[1]}"
        return f"{need.quantize} needs multiples of {step} on each rank, and a product here is {sizes}"
    if need.tokens % (step * (need.ranks if need.split_tokens else 1)):
        each = f" on each of {need.ranks} ranks" if need.split_tokens else ""
        return (
            f"{need.quantize} needs a multiple of {step} tokens in a micro-batch{each}, not {need.tokens} in all: "
            "train.micro_batch * train.sequence_length"
        )
    reason = on_cuda(need, FP8)
    if reason is not None:
        return reason
    has, why = getattr(FP8.module(), available)(return_reason=True)
    return None if has else str(why)


def refuse_linear(need: Need) -> Refusal:
    if need.quantize == "delayed":
        return "keeps no history"
    return refuse_product(need)


def autocast_of(need: Need) -> Callable[[], Any]:
    """What a product runs in. No first micro-batch is ever named: weights are quantized anew in each, and gradients added."""
    recipe = getattr(FP8.module(1), RECIPES[need.quantize][0])() if need.quantize else None
    return lambda: FP8.module().autocast(enabled=recipe is not None, recipe=recipe)


# Without quantization it is one more way to call cuBLAS: it serves who asks for it.
@offer("linear", BACKEND, -1, refuse_linear)
def make_linear(need: Need) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    autocast, built = autocast_of(need), list[Any]()

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not built:
            out_features, in_features = weight.shape
            made = FP8.module().Linear(
                in_features, out_features, bias=bias is not None, params_dtype=need.dtype, device="meta"
            )
            built.append(made.requires_grad_(False))
        lend(built[0], weight=weight, bias=bias)
        with autocast():
            y: Tensor = built[0](x)
        return y

    return linear


def lend(module: Any, **parameters: Tensor | None) -> None:
    for name, parameter in parameters.items():
        if parameter is not None:
            module._parameters[name] = parameter.contiguous()


def refuse_norm_linear(need: Need) -> Refusal:
    return refuse_norm(need) or refuse_linear(need)


def refuse_quantized(need: Need) -> Refusal:
    return refuse_norm_linear(need) if need.quantize else "joins nothing unless it quantizes; it serves who asks for it"


# In the working precision it is a norm and a product, one after the other; a norm joined with the sum before it saves more.
@offer("norm_linear", BACKEND, 40, refuse_quantized)
@offer("norm_linear", BACKEND, -1, refuse_norm_linear)
def make_norm_linear(need: Need) -> Callable[..., Any]:
    autocast, built = autocast_of(need), dict[float, Any]()
    inside, outside = need.features

    def module(eps: float, axis: Any) -> Any:
        if eps not in built:
            made = FP8.module().LayerNormLinear(
                inside,
                outside * need.ranks,
                eps=eps,
                bias=need.biased,
                normalization="LayerNorm" if need.norm.kind == "layernorm" else "RMSNorm",
                params_dtype=need.dtype,
                parallel_mode="column" if need.ranks > 1 else None,
                tp_group=axis.group if need.ranks > 1 else None,
                tp_size=need.ranks,
                sequence_parallel=need.split_tokens,
                return_layernorm_output=need.keep,
                device="meta",
            )
            built[eps] = made.requires_grad_(False)
        return built[eps]

    def norm_linear(x: Tensor, p: Params, args: NormArgs, weight: Tensor, bias: Tensor | None, axis: Any) -> Any:
        """kernels/torch_fused.py says what it means; over several ranks x is [s/tp, b, d] with ``need.split_tokens``."""
        assert args.scale == 1.0, "layers ask for no other"
        made = module(args.eps, axis)
        lend(made, weight=weight, bias=bias, layer_norm_weight=p["weight"], layer_norm_bias=p.get("bias"))
        with autocast():
            return made(x.contiguous())

    return norm_linear
