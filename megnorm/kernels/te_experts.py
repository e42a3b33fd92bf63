"""Transformer Engine for mixtures of experts: products by expert, in FP8 too, and tokens brought to their experts and back."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megnorm.kernels.libraries import Library, library
from megnorm.kernels.registry import Need, Refusal, offer
from megnorm.kernels.te_products import RECIPES, autocast_of, lend, refuse_product
from megnorm.kernels.torch_experts import Permutation
from megnorm.kernels.transformer_engine import BACKEND, on_cuda

EXPERTS = library(
    Library(
        "transformer_engine experts",
        "transformer-engine",
        (
            (
                ("transformer_engine.pytorch",),
                ("GroupedLinear", "Fp8Padding", "Fp8Unpadding", "moe_permute", "moe_unpermute"),
            ),
        ),
        "transformer-engine 2.9 or newer has it",
    )
)


def refuse_grouped(need: Need) -> Refusal:
    if need.quantize == "delayed":
        return "keeps one history for all experts, of which some see no token; use another recipe of kernels.fp8"
    if need.capture:
        return "counts rows on the host (kernels.graphs)"
    if need.features == (0, 0):
        return "is not told the sizes of its products"
    return refuse_product(need) or EXPERTS.missing()


def refuse_unless_quantized(need: Need) -> Refusal:
    return refuse_grouped(need) if need.quantize else "serves who asks for it unless it quantizes"


@offer("grouped_gemm", BACKEND, 40, refuse_unless_quantized)
@offer("grouped_gemm", BACKEND, -2, refuse_grouped)
def make_grouped_gemm(need: Need) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """kernels/torch_experts.py says what it means. Rows of an expert are padded to what the recipe asks for."""
    autocast, built = autocast_of(need), dict[int, Any]()

    def modules(weight: Tensor) -> Any:
        experts, outside, inside = weight.shape
        if experts not in built:
            te = EXPERTS.module()
            made = te.GroupedLinear(experts, inside, outside, bias=False, params_dtype=need.dtype, device="meta")
            step = RECIPES[need.quantize][2] if need.quantize else 1
            built[experts] = (
                made.requires_grad_(False),
                te.Fp8Padding(experts, align_size=step),
                te.Fp8Unpadding(experts, align_size=step),
            )
        return built[experts]

    def grouped_gemm(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        splits = counts.tolist()
        if sum(splits) == 0:  # no kernel starts for nothing, and the weights still get their gradient: none
            return x @ weight[0].t()
        product, pad, unpad = modules(weight)
        lend(product, **{f"weight{i}": own for i, own in enumerate(weight)})
        y: Tensor
        with autocast():
            if not need.quantize:
                y = product(x, splits)
                return y
            padded, sizes = pad(x, splits)
            y = unpad(product(padded, sizes), splits)
        return y

    return grouped_gemm


def refuse_permutation(need: Need) -> Refusal:
    if need.capture:
        return "counts rows on the host (kernels.graphs)"
    if need.dtype == torch.float64:
        return "is compared with the reference in fp32 and below"
    return on_cuda(need, EXPERTS)


@offer("permute", BACKEND, 30, refuse_permutation)
def make_permutation(need: Need) -> Permutation:
    """By a mask, of which it wants int32."""

    def there(x: Tensor, routes: Tensor, total: int) -> tuple[Tensor, Any]:
        if total == 0:
            return x[:0], (None, x.shape)
        rows, where = EXPERTS.module().moe_permute(x, routes.to(torch.int32), num_out_tokens=total, map_type="mask")
        return rows, (where, x.shape)

    def back(y: Tensor, where: Any, weights: Tensor | None) -> Tensor:
        rows, shape = where
        if rows is None:
            return y.new_zeros(shape) + y.sum() * 0.0
        out: Tensor = EXPERTS.module().moe_unpermute(
            y, rows, merging_probs=weights, restore_shape=shape, map_type="mask"
        )
        return out

    return there, back
