"""Blocks as CUDA graphs (kernels.graphs): the host starts a block with one call instead of one for each of its kernels.

Each block is captured once, forward and backward, before the first step, by ``torch.cuda.make_graphed_callables``; its weights
are where they were, so an update is seen. A graph has one place for what its backward pass needs: a block's backward must run
before its next forward, and the plan refuses what would not (refuse.py). A block runs by itself, kernel by kernel,
without gradients (evaluation), where a probe watches what is inside, and for a batch of another shape.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from megnorm.layers.env import Context

Make = Callable[..., Any]


def tensors_of(context: Context) -> tuple[Tensor, ...]:
    """What a block reads of a context, one behind the other."""
    pairs = [pair for pair in (context.rope, context.window_rope) if pair is not None]
    return (*(x for pair in pairs for x in pair), *(x for x in (context.mask, context.bias) if x is not None))


def refilled(like: Context, tensors: Sequence[Tensor]) -> Context:
    """A context with these tensors in the places where ``like`` has some."""
    rest = iter(tensors)

    def pair(old: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
        return None if old is None else (next(rest), next(rest))

    def one(old: Tensor | None) -> Tensor | None:
        return None if old is None else next(rest)

    rope, window_rope = pair(like.rope), pair(like.window_rope)
    return replace(like, rope=rope, window_rope=window_rope, mask=one(like.mask), bias=one(like.bias))


def _alike(context: Context) -> tuple[Any, ...]:
    """What must be the same from call to call, beside the tensors' shapes."""
    held = (context.rope, context.window_rope, context.mask, context.bias)
    others = (context.documents, context.memory, context.memory_mask, context.cache, context.routing)
    return tuple(x is None for x in held), context.causal, all(x is None for x in others)


def _shape(x: Tensor) -> tuple[Any, ...]:
    return tuple(x.shape), x.dtype, x.requires_grad


class Body(nn.Module):
    """A block as a function of tensors alone, as graphs want it."""

    def __init__(self, block: nn.Module, like: Context) -> None:
        super().__init__()
        self.block, self.like = block, like

    def forward(self, x: Tensor, *tensors: Tensor) -> Tensor:
        y: Tensor = type(self.block).forward(self.block, x, refilled(self.like, tensors))
        return y


class Graphed:
    """In place of a block's ``forward``."""

    def __init__(self, body: Body, sample: tuple[Tensor, ...]) -> None:
        self.body = body
        self.inside = [module for module in body.block.modules() if module is not body.block]
        self.shapes, self.alike = tuple(map(_shape, sample)), _alike(body.like)

    def __call__(self, x: Tensor, context: Context) -> Tensor:
        given = (x, *tensors_of(context))
        if self._fits(given, context):
            y: Tensor = self.body(*given)
        else:
            y = type(self.body.block).forward(self.body.block, x, context)
        return y

    def _fits(self, given: tuple[Tensor, ...], context: Context) -> bool:
        if not (torch.is_grad_enabled() and self.body.block.training):
            return False
        if _alike(context) != self.alike or tuple(map(_shape, given)) != self.shapes:
            return False
        return not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in self.inside)


def capture(blocks: Sequence[nn.Module], run: Callable[[], object], make: Make | None = None) -> None:
    """Capture the blocks of a stage, in the order in which they run.

    run: a forward pass of the stage, by which the first block is shown what it is given. make: instead of torch's own.
    """
    x, context = _seen(blocks[0], run)
    samples = [(x.clone().requires_grad_(), *(t.clone() for t in tensors_of(context))) for _ in blocks]
    bodies = [Body(block, context) for block in blocks]
    made = (make or torch.cuda.make_graphed_callables)(tuple(bodies), tuple(samples), allow_unused_input=True)
    for body, sample in zip(made, samples, strict=True):
        body.block.forward = Graphed(body, sample)


@torch.no_grad()
def _seen(block: nn.Module, run: Callable[[], object]) -> tuple[Tensor, Context]:
    found: list[inspect.BoundArguments] = []
    takes = inspect.signature(block.forward)  # a context is given by name where a block may be computed again
    handle = block.register_forward_pre_hook(
        lambda _, args, kwargs: found.append(takes.bind(*args, **kwargs)), with_kwargs=True
    )
    try:
        run()
    finally:
        handle.remove()
    x, context = found[0].args
    return x.detach(), context


def blocks_of(stage: nn.Module) -> Iterator[nn.Module]:
    """The blocks of a stage of a causal model, in order."""
    held = stage.blocks
    assert isinstance(held, nn.ModuleDict)
    yield from held.values()
