"""Transformer Engine's delayed scaling: a product's scales follow from the largest values that it has seen.

The library updates all scales and histories where an outermost autocast region ends, with maxima over one group of ranks; those
of gradients in the backward pass of the region's first product. So the forward pass of a stage is one region, and histories are
the same on all ranks of the stage. A product that runs outside a region (computed again in backward, an evaluation, the check
before a run) leaves no trace; computed again, it takes the scales that it had.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from megnorm.kernels.registry import Need, Refusal, offer
from megnorm.kernels.te_products import FP8, lend, refuse_product
from megnorm.kernels.transformer_engine import BACKEND

RECIPE = "delayed"
DIRECTIONS = {"forward": "scaling_fwd", "backward": "scaling_bwd"}
_open: list[Any] = []  # the recipe and group of the region that we are in


@contextmanager
def region(group: Any) -> Iterator[None]:
    """The forward pass of a stage; group: all ranks that hold the stage, None for one rank. No effect without gradients."""
    if not torch.is_grad_enabled():
        yield
        return
    now = (_recipe(reduce=group is not None), group)
    with FP8.module().autocast(enabled=True, recipe=now[0], amax_reduction_group=group):
        _open.append(now)
        try:
            yield
        finally:
            _open.pop()


def _recipe(*, reduce: bool) -> Any:
    return FP8.module(1).DelayedScaling(reduce_amax=reduce)


class Delayed:
    """A product and its history. unit: what is being computed, or computed again, by recompute (layers/recompute.py)."""

    def __init__(self, need: Need) -> None:
        self.need = need
        self.unit: Callable[[], object | None] = lambda: None
        self._scales: WeakKeyDictionary[Any, Tensor | None] = WeakKeyDictionary()
        self._module: Any = None

    @property
    def module(self) -> Any:
        if self._module is None:
            need = self.need
            made = FP8.module().Linear(*need.features, bias=need.biased, params_dtype=need.dtype, device="meta")
            self._module = made.requires_grad_(False)
        return self._module

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        lend(self.module, weight=weight, bias=bias)
        unit, meta = self.unit(), self.module.fp8_meta
        y: Tensor
        if _open:
            if unit is not None:
                state = meta.get(DIRECTIONS["forward"])
                self._scales[unit] = None if state is None else state.scale.clone()
            y = self.module(x)
            return y
        with self._restored(unit):
            # A region inside another one updates nothing when it ends.
            recipe = meta.get("recipe") or _recipe(reduce=False)
            te = FP8.module()
            with (
                te.autocast(enabled=False),
                te.autocast(enabled=True, recipe=recipe, amax_reduction_group=meta.get("fp8_group")),
            ):
                y = self.module(x)
        return y

    @contextmanager
    def _restored(self, unit: object | None) -> Iterator[None]:
        """Run with the scales of ``unit``'s first run, if it had one, and leave scales and history as they are."""
        state = self.module.fp8_meta.get(DIRECTIONS["forward"])
        if state is None:  # nothing ran yet
            yield
            return
        scale, history = state.scale.clone(), state.amax_history.clone()
        if unit is not None and unit in self._scales:
            first = self._scales[unit]
            state.scale.copy_(torch.ones_like(scale) if first is None else first)  # it begins with ones
        try:
            yield
        finally:
            state.scale.copy_(scale)
            state.amax_history.copy_(history)

    def state(self) -> dict[str, Tensor]:
        """Scales and histories themselves: what is written into them continues exactly."""
        module = self.module
        if not module.fp8_meta_tensors_initialized:  # as the library does before it loads
            recipe = _recipe(reduce=False)
            module.fp8_meta.update(num_gemms=1, recipe=recipe)
            module.init_fp8_meta_tensors(recipe)
        found = {}
        for direction, key in DIRECTIONS.items():
            found[f"{direction}.scale"] = module.fp8_meta[key].scale
            found[f"{direction}.history"] = module.fp8_meta[key].amax_history
        return found


def refuse(need: Need) -> Refusal:
    if need.quantize != RECIPE:
        return "serves delayed scaling alone"
    if need.capture:
        return "keeps what a graph would not see (kernels.graphs)"
    return refuse_product(need)


@offer("linear", BACKEND, 40, refuse)
def make_linear(need: Need) -> Delayed:
    return Delayed(need)
