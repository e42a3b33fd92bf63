"""Where a bad step went bad: which module of which layer, which parameter, on which rank, with which samples.

A step that was found bad is run again with hooks on every module, which costs a step and nothing before. Every rank takes
part, since the passes communicate; what each finds is gathered, and the first in the order of computation is named.
"""

import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from megnorm.metrics.observe import main_grad, square
from megnorm.parallel.collectives import all_reduce
from megnorm.parallel.layout import Named
from megnorm.parallel.mesh import Mesh
from megnorm.train.agree import gathered
from megnorm.train.guard import Trouble

Mark = Callable[[int, int], None]  # told the micro-batch and the stage whose pass begins
Again = Callable[[Mark], object]  # repeats the forward and backward passes of this rank's micro-batches


def explain(
    trouble: Trouble,
    stages: Sequence[nn.Module],
    named: Sequence[Named],
    mesh: Mesh,
    *,
    local_loss: float,
    samples: Callable[[int], tuple[int, int]],
    again: Again,
) -> str:
    """One line on the origin of the trouble; collective. local_loss: this rank's part of the loss.
    samples: of this rank's micro-batch, the first and last id. Gradients are overwritten."""
    if trouble.spike:
        return _largest(named, mesh)
    bad = [n.name for n in named if not finite(n.view(main_grad(n.param)))]
    first = _first_module(stages, named, mesh, samples, again)
    facts = gathered([first, bad, math.isfinite(local_loss)], mesh)
    return f"{_origin(facts)}; {_gradients(facts)}"


# Modules


def _first_module(
    stages: Sequence[nn.Module],
    named: Sequence[Named],
    mesh: Mesh,
    samples: Callable[[int], tuple[int, int]],
    again: Again,
) -> tuple[list[int], str] | None:
    """(place in the order of computation, words) of the first output, or gradient of one, that is not finite here."""
    watch = _Watch(stages)
    try:
        again(watch.mark)
    finally:
        watch.release()
    if watch.found is None:
        return None
    place, path, what = watch.found
    first, last = samples(place[1])
    weights = [n for n in named if _holds(stages, path, n)]
    spoilt = next((n.name for n in weights if not finite(n.view())), None)
    where = f"{what} {path}"
    if spoilt is not None:
        where += f", whose {spoilt} is not finite"
    elif weights:
        where += f" ({', '.join(n.name for n in weights[:3])}{', ...' if len(weights) > 3 else ''})"
    at = f"rank {mesh.rank} (dp {mesh.dp.rank}, tp {mesh.tp.rank}, pp {mesh.pp.rank})"
    direction = "backward" if place[0] else "forward"
    return place, f"{where}, in the {direction} pass on {at}, micro-batch {place[1]}, samples {first} to {last}"


def _holds(stages: Sequence[nn.Module], path: str, n: Named) -> bool:
    """Whether the parameter is the module's at ``path``, or one's inside it; a fused one has other names than its module."""
    modules = [dict(stage.named_modules()).get(path) for stage in stages]
    return any(param is n.param for module in modules if module is not None for param in module.parameters())


class _Watch:
    """Hooks on all modules that keep the first output, and gradient of an output, with Inf or NaN.

    found: ([backward, micro-batch, stage, place in the pass], path, what of it). The place counts modules as they end,
    inner before outer, equally on all ranks that hold the same stage.
    """

    def __init__(self, stages: Sequence[nn.Module]) -> None:
        self.found: tuple[list[int], str, str] | None = None
        self.micro_batch = self.stage = self.count = 0
        self._handles: list[RemovableHandle] = []
        for stage in stages:
            for path, module in stage.named_modules():
                if path and not isinstance(module, nn.Identity):
                    self._handles.append(module.register_forward_hook(partial(self._see, path)))

    def mark(self, micro_batch: int, stage: int) -> None:
        self.micro_batch, self.stage, self.count = micro_batch, stage, 0

    def release(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _see(self, path: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self.count += 1
        place = [0, self.micro_batch, self.stage, self.count]
        for x in output if isinstance(output, tuple) else (output,):
            if not isinstance(x, Tensor):
                continue
            if self.found is None and not finite(x):
                parent, _, name = path.rpartition(".")
                if any(isinstance(i, Tensor) and not finite(i) for i in inputs):
                    self.found = place, parent or path, f"before the {name} of"
                else:
                    self.found = place, path, "the output of"
            if x.requires_grad:
                x.register_hook(partial(self._see_grad, path, [1, self.micro_batch, -self.stage, -self.count]))

    def _see_grad(self, path: str, place: list[int], grad: Tensor) -> None:
        if self.found is None and not finite(grad):
            self.found = place, path, "the gradient of the output of"


def finite(x: Tensor) -> bool:
    return not x.is_floating_point() or bool(torch.isfinite(x).all())


# What the ranks found


def _origin(facts: list[Any]) -> str:
    found = [fact[0] for fact in facts if fact[0] is not None]
    if found:
        _, words = min(found)
        return f"first not finite: {words}"
    lost = [str(rank) for rank, fact in enumerate(facts) if not fact[2]]
    told = f" (the loss was not finite on rank {', '.join(lost)})" if lost else ""
    return f"the same passes, run again, are finite: the fault has passed{told}; suspect hardware if it returns"


def _gradients(facts: list[Any]) -> str:
    """How many gradients are not finite, and the first in the order of the model."""
    places = {name: (depth(name), i) for fact in facts for i, name in enumerate(fact[1])}
    if not places:
        return "all gradients are finite"
    bad = sorted(places, key=places.__getitem__)
    return f"{len(bad)} gradients are not finite, in the order of the model from {bad[0]} to {bad[-1]}"


def depth(name: str) -> int:
    """Where a logical name stands in the order of the model: -1 before the blocks, then the block, then behind all of its
    stack; the decoder's behind the encoder's."""
    block = re.match(r"(?:.*\.)?blocks\.(\d+)\.", name)
    place = int(block[1]) if block else -1 if re.match(r"(?:\w+\.)?embed\.", name) else 1 << 20
    return place + ((1 << 21) if name.startswith(("decoder.", "head.")) else 0)


def _largest(named: Sequence[Named], mesh: Mesh) -> str:
    """The parameter with the largest gradient, and its share of the square of the norm."""
    squares = torch.zeros(len(named), dtype=torch.float64, device=mesh.device)
    for i, n in enumerate(named):
        grad = main_grad(n.param)
        if grad is not None and n.matrix.owner:
            squares[i] = square(n.view(grad))
    all_reduce(squares, mesh.tp)
    top = int(squares.argmax())
    # Of experts there are fewer copies among the ranks than of all else, by which the sum is divided below.
    copies = torch.tensor([mesh.ep.size if n.matrix.replicas == "edp" else 1 for n in named], device=mesh.device)
    facts = gathered([float(squares[top]), float((squares * copies).sum()), named[top].name], mesh)
    total = sum(fact[1] for fact in facts) / (mesh.dp.size * mesh.tp.size)
    share, _, name = max(facts)
    return f"the largest gradient is that of {name}, {100 * share / max(total, 1e-300):.0f}% of the square of the norm"
