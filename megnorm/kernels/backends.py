"""Importing this module registers every backend's offers. An optional library is imported by its own file only."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from megnorm.kernels import (
    apex,
    check,
    compiled,
    flash_attn,
    liger,
    registry,
    te_delayed,
    te_experts,
    te_products,
    torch_experts,
    torch_fused,
    torch_ref,
    transformer_engine,
    triton_offers,
)
from megnorm.kernels.config import KernelConfig
from megnorm.kernels.registry import Need

REFERENCE = torch_ref.__name__
FILES = (
    torch_ref,
    torch_fused,
    torch_experts,
    transformer_engine,
    te_products,
    te_delayed,
    te_experts,
    flash_attn,
    triton_offers,
    apex,
    liger,
    compiled,
)


def chosen(need: Need, config: KernelConfig) -> tuple[str, Callable[..., Any]]:
    """The backend that serves ``need``, and its implementation."""
    found = registry.choose(need, config.prefer, check.verify if config.check else lambda offer, need: None)
    return found.backend, found.make(need)


def delayed_region(group: Any) -> Callable[[], AbstractContextManager[None]]:
    """What the forward pass of a stage runs in with kernels.fp8=delayed; group: all ranks of the stage (None: one)."""
    return partial(te_delayed.region, group)
