"""The reference as the compiler of PyTorch joins it (kernels.compile): norms that nobody has a kernel for, activations."""

from collections.abc import Callable
from typing import Any

import torch

from megnorm.kernels import libraries
from megnorm.kernels.registry import Need, Refusal, offer
from megnorm.kernels.torch_fused import (
    make_act_stats,
    make_add_norm,
    make_head_scale,
    make_norm_add,
    make_norm_add_norm,
)
from megnorm.kernels.torch_ref import make_activation, make_norm, make_rope

BACKEND = "compiled"
OPS: dict[str, Callable[[Need], Callable[..., Any]]] = {
    "norm": make_norm,
    "add_norm": make_add_norm,
    "norm_add": make_norm_add,
    "norm_add_norm": make_norm_add_norm,
    "act_stats": make_act_stats,
    "activation": make_activation,
    "head_scale": make_head_scale,
    "rope": make_rope,
}


def refuse(need: Need) -> Refusal:
    if not need.compiled:
        return "kernels.compile is off"
    if need.sharded:
        return "compiles nothing that communicates"
    if need.device != "cuda":
        return "is meant for CUDA devices: a CPU's numbers do not depend on a compiler"
    return libraries.missing("triton")


def compile_whole(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Every shape for itself, and no break: what cannot be compiled as a whole does not serve (kernels.check finds it)."""
    compiled: Callable[..., Any] = torch.compile(fn, fullgraph=True, dynamic=False)
    return compiled


def _offer(op: str, make: Callable[[Need], Callable[..., Any]]) -> None:
    @offer(op, BACKEND, 5, refuse)
    def made(need: Need) -> Callable[..., Any]:
        return compile_whole(make(need))


for _op, _make in OPS.items():
    _offer(_op, _make)
