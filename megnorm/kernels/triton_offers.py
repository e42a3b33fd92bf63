"""megnorm's own Triton kernels as offers. triton itself is imported when one of them is made."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from megnorm.kernels import libraries
from megnorm.kernels.registry import Need, NormForm, Refusal, offer

BACKEND = "triton"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
KINDS = ("layernorm", "rmsnorm")
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "relu_squared", "silu")
LARGEST_ROW = 65536  # bytes of a row that one program holds


def _refuse(need: Need) -> Refusal:
    if need.dtype not in DTYPES:
        return f"computes in fp32, so it takes no {str(need.dtype).removeprefix('torch.')}"
    if need.device != "cuda":
        return "runs on CUDA devices"
    return libraries.missing("triton")


def refuse_norms(need: Need) -> Refusal:
    """What the kernels cannot do, whatever is installed."""
    forms = [form for form in need.norms if form is not None]
    for form in forms:
        if form.kind not in KINDS:
            return f"has no kernel for {form.kind}"
        if form.gain == "per_head":
            return "has no gain per head"
        if form.width * need.dtype.itemsize > LARGEST_ROW:
            return f"rows of {form.width} features are too long for one program"
    return _refuse(need)


def _rms(form: NormForm | None) -> bool:
    return form is None or form.kind == "rmsnorm"


@offer("norm", BACKEND, 25, refuse_norms)
@offer("sharded_norm", BACKEND, 25, refuse_norms)
def make_norm(need: Need) -> Callable[..., Any]:
    from megnorm.kernels import triton_stats

    return partial(triton_stats.norm, _rms(need.norm), need.sharded)


@offer("add_norm", BACKEND, 40, refuse_norms)
def make_add_norm(need: Need) -> Callable[..., Any]:
    from megnorm.kernels import triton_norm

    return partial(triton_norm.add_norm, _rms(need.norm))


@offer("norm_add", BACKEND, 40, refuse_norms)
def make_norm_add(need: Need) -> Callable[..., Any]:
    from megnorm.kernels import triton_norm

    return partial(triton_norm.norm_add, _rms(need.norm))


@offer("norm_add_norm", BACKEND, 40, refuse_norms)
def make_norm_add_norm(need: Need) -> Callable[..., Any]:
    from megnorm.kernels import triton_norm

    first, second = need.norms
    return partial(triton_norm.norm_add_norm, _rms(first), _rms(second))


def _refuse_heads(need: Need) -> Refusal:
    forms = {form.kind for form in need.norms if form is not None}
    if len(forms) > 1:
        return f"q, k and v have norms of {len(forms)} kinds"
    return refuse_norms(need)


@offer("qkv_norm_rope", BACKEND, 40, _refuse_heads)
def make_qkv_norm_rope(need: Need) -> Callable[..., Any]:
    from megnorm.kernels import triton_heads

    return partial(triton_heads.qkv_norm_rope, all(_rms(form) for form in need.norms))


@offer("rope", BACKEND, 20, _refuse)
def make_rope(need: Need) -> Callable[..., Any]:
    from megnorm.kernels import triton_heads

    return triton_heads.rope


@offer("head_scale", BACKEND, 20, _refuse)
def make_head_scale(need: Need) -> Callable[..., Any]:
    from megnorm.kernels import triton_heads

    return triton_heads.head_scale


def _refuse_act(need: Need) -> Refusal:
    if need.kind not in ACTIVATIONS:
        return f"has no kernel for {need.kind}"
    return refuse_norms(need)


@offer("act_stats", BACKEND, 40, _refuse_act)
def make_act_stats(need: Need) -> Callable[..., Any]:
    from megnorm.kernels import triton_stats

    return partial(triton_stats.act_stats, need.kind, _rms(need.norm), need.sharded)
