"""Probes: what the papers plot, per logical matrix, layer and role, on chosen steps.

Names are "quantity/where"; where is a logical matrix (``blocks.3.attention.q.weight``), ``layer.3``, ``role.q`` or a
module (``blocks.3.attention``).

    grad_norm     2-norm of the gradient, before clipping           matrix, layer, role
    weight_norm   2-norm of the weights before the update           matrix, layer, role
    update_norm   |dW|, what one update changed                     matrix, layer, role
    update_ratio  |dW| / |W|                                        matrix, layer, role
    norm_gain     root mean square of a norm's weights              matrix
    stream_rms    of the residual stream behind a sub-layer         embed, sub-layer
    branch_rms    of a branch: the output of W_o or W_down          sub-layer
    norm_rms      of a norm's input and output                      norm + .input, .output

The activations inside experts are not looked at.

Layers know nothing of this: activations are seen by forward hooks on modules found by path when the run is built, which
are attached for a probed step and removed after it.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from megnorm.metrics.config import Probe
from megnorm.parallel.layout import Matrix, Named, named_matrices

Reduce = Callable[[Tensor], Tensor]
Storage = Callable[[nn.Parameter], Tensor | None]
Sums = dict[str, tuple[float, float]]  # name -> (numerator, denominator) of the square of what is reported

SUBLAYER = r"(?:.*\.)?blocks\.\d+\.(?:attention|cross_attention|ffn)"
NOT_EXPERTS = r"(?!.*\.experts\.)"  # ranks may hold different ones, whose sums would meet
PLACES: tuple[tuple[Probe, str, str], ...] = (
    ("stream_rms", "output", rf"(?P<at>(?:\w+\.)?embed|{SUBLAYER})"),
    ("branch_rms", "output", rf"(?P<at>{SUBLAYER})\.(?:o|down)"),
    ("norm_rms", "input", rf"(?P<at>{NOT_EXPERTS}.*norm)"),
    ("norm_rms", "output", rf"(?P<at>{NOT_EXPERTS}.*norm)"),
)


def main_grad(param: nn.Parameter) -> Tensor | None:
    """The fp32 storage into which gradients are accumulated, or the ordinary gradient."""
    grad = getattr(param, "main_grad", None)
    return grad if isinstance(grad, Tensor) else param.grad


def _weights(param: nn.Parameter) -> Tensor:
    return param.detach()


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _alone(sums: Sums) -> list[Sums]:
    return [sums]


class Observer:
    """Measures the chosen probes of ``stages`` (all that this rank holds of the model) on every ``every``-th step (0: never).

    A step is begin(step), forward and backward, before_update(), the update, collect(); on a step that is not probed
    each returns at once. Every rank calls all of them: collect communicates.

    reduce_sum: sum of a vector over the ranks that share the weights' slices (tp); of gradients and weights only slices
    that a rank owns enter. reduce_activations: the same over all ranks of a stage (tp, cp, dp). gather: the stages'
    sums, for pipelines and ranks with other experts; what several of them hold, one ``counts``. weight, gradient: the storage
    of a parameter that is measured, e.g. its fp32 master.
    """

    def __init__(
        self,
        stages: Sequence[nn.Module],
        probes: Sequence[Probe],
        *,
        every: int,
        reduce_sum: Reduce = _itself,
        reduce_activations: Reduce = _itself,
        gather: Callable[[Sums], Iterable[Sums]] = _alone,
        counts: Callable[[Matrix], bool] = lambda matrix: True,
        weight: Storage = _weights,
        gradient: Storage = main_grad,
    ) -> None:
        self._probes, self._every = frozenset(probes), every
        self._reduce_sum, self._reduce_activations, self._gather = reduce_sum, reduce_activations, gather
        self._weight, self._gradient = weight, gradient
        self._matrices = [named for named in named_matrices(*stages) if counts(named.matrix)]
        self._device = next(stages[0].parameters()).device
        self._places = [place for stage in stages for place in find_places(stage, self._probes)]
        self._names = [f"{probe}/{at}" for probe, _, at, _ in self._places]
        self._handles: list[RemovableHandle] = []
        self._active = False
        self._squares: dict[int, list[tuple[Tensor, int]]] = defaultdict(list)  # by index in _places
        self._vectors: dict[str, list[Tensor]] = {}  # by quantity, in the order of _matrices
        self._before: dict[int, Tensor] = {}  # weights before the update, by id of the parameter

    @property
    def active(self) -> bool:
        """Whether the present step is probed: gradients and weights will be looked at whole."""
        return self._active

    def begin(self, step: int) -> bool:
        """Whether ``step`` is probed; if so, attach the hooks."""
        self._release()
        self._active = self._every > 0 and step % self._every == 0
        if self._active:
            self._squares, self._vectors, self._before = defaultdict(list), {}, {}
            for index, (_, side, _, module) in enumerate(self._places):
                self._handles.append(module.register_forward_hook(partial(self._see, index, side)))
        return self._active

    def before_update(self) -> None:
        """Measure gradients and weights: when gradients are summed over all ranks, before clipping."""
        if not self._active:
            return
        self._release()
        if "grad_norm" in self._probes:
            self._vectors["grad_norm"] = self._squares_of(self._gradient)
        if self._probes & {"weight_norm", "update_ratio", "norm_gain"}:
            self._vectors["weight_norm"] = self._squares_of(self._weight)
        if self._probes & {"update_norm", "update_ratio"}:
            for param in {id(named.param): named.param for named in self._matrices}.values():
                weight = self._weight(param)
                if weight is not None:
                    self._before[id(param)] = weight.clone()

    def collect(self) -> dict[str, float]:
        """The measured values by name; {} on a step that is not probed. Call it after the update."""
        if not self._active:
            return {}
        self._active = False
        if self._before:
            self._vectors["update_norm"] = self._squares_of(self._change)
            self._before = {}
        sums: Sums = self._activation_sums()
        sums.update(self._matrix_sums())
        merged: dict[str, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
        for part in self._gather(sums):
            for name, (top, bottom) in part.items():
                merged[name] = (merged[name][0] + top, merged[name][1] + bottom)
        # A norm is a sum (its denominator 0); a ratio or a root mean square has a denominator of its own.
        return {
            name: math.sqrt(top / bottom) if bottom else math.sqrt(top)
            for name, (top, bottom) in merged.items()
            if bottom or not name.startswith(("update_ratio/", "norm_gain/"))
        }

    # Activations

    def _see(self, index: int, side: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if torch._C._current_graph_task_id() != -1:  # a recompute in backward: seen in the forward pass
            return
        tensor = first_tensor(inputs if side == "input" else output)
        if tensor is not None:
            self._squares[index].append((square(tensor.detach()), tensor.numel()))

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _activation_sums(self) -> Sums:
        """Sum of squares and count by place; ranks that hold the same tokens count both equally often."""
        if not self._places:
            return {}
        device = self._device
        zero = torch.zeros((), dtype=torch.float64, device=device)
        tops = [sum((s for s, _ in self._squares[i]), zero) for i in range(len(self._places))]
        counts = [float(sum(n for _, n in self._squares[i])) for i in range(len(self._places))]
        pair = torch.stack([torch.stack(tops), torch.tensor(counts, dtype=torch.float64, device=device)])
        top, count = self._reduce_activations(pair).tolist()
        self._squares = defaultdict(list)
        return {name: (top[i], count[i]) for i, name in enumerate(self._names) if count[i]}

    # Gradients, weights, updates

    def _squares_of(self, storage: Storage) -> list[Tensor]:
        """For each logical matrix the sum of squares of this rank's slice, 0 where another rank owns it."""
        return [self._owned_square(named, storage(named.param)) for named in self._matrices]

    def _owned_square(self, named: Named, storage: Tensor | None) -> Tensor:
        if storage is None or not named.matrix.owner:
            return torch.zeros((), dtype=torch.float64, device=named.param.device)
        return square(named.view(storage))

    def _change(self, param: nn.Parameter) -> Tensor | None:
        before, now = self._before.get(id(param)), self._weight(param)
        return None if before is None or now is None else now - before

    def _matrix_sums(self) -> Sums:
        if not self._vectors or not self._matrices:
            return {}
        kinds = list(self._vectors)
        stacked = torch.stack([torch.stack(self._vectors[kind]) for kind in kinds])
        squares: Mapping[str, list[float]] = dict(zip(kinds, self._reduce_sum(stacked).tolist(), strict=True))
        self._vectors = {}
        sums: Sums = {}

        def add(quantity: str, named: Named, top: float, bottom: float) -> None:
            for where in places_of(named):
                old = sums.get(f"{quantity}/{where}", (0.0, 0.0))
                sums[f"{quantity}/{where}"] = (old[0] + top, old[1] + bottom)

        for i, named in enumerate(self._matrices):
            for kind in ("grad_norm", "weight_norm", "update_norm"):
                if kind in self._probes:
                    add(kind, named, squares[kind][i], 0.0)
            if "update_ratio" in self._probes:
                add("update_ratio", named, squares["update_norm"][i], squares["weight_norm"][i])
            if "norm_gain" in self._probes and named.matrix.role == "norm" and named.name.endswith("weight"):
                sums[f"norm_gain/{named.name}"] = (squares["weight_norm"][i], float(math.prod(named.matrix.shape)))
        return sums


def find_places(model: nn.Module, probes: Iterable[str]) -> list[tuple[Probe, str, str, nn.Module]]:
    """(probe, "input" or "output", where, module) for each activation that the probes look at."""
    wanted = set(probes)
    found = []
    for path, module in model.named_modules():
        if isinstance(module, nn.Identity):  # an empty slot
            continue
        for probe, side, pattern in PLACES:
            match = re.fullmatch(pattern, path) if probe in wanted else None
            if match:
                at = match["at"] + (f".{side}" if probe == "norm_rms" else "")
                found.append((probe, side, at, module))
    return found


def places_of(named: Named) -> list[str]:
    """Where a matrix counts: under its own name, its layer's (if it has one) and its role's."""
    layer = re.match(r"(.*?)blocks\.(\d+)\.", named.name)
    layers = [f"{layer[1]}layer.{layer[2]}"] if layer else []
    return [named.name, *layers, f"role.{named.matrix.role}"]


def square(tensor: Tensor) -> Tensor:
    """The sum of squares, accumulated in fp32 or better; squared in fp64, which small gradients need."""
    norm = torch.linalg.vector_norm(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))
    squared: Tensor = norm.double().square()
    return squared


def first_tensor(value: Any) -> Tensor | None:
    """The tensor a module takes or gives: the value, its first item, or the field ``h`` of a carry."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, tuple | list) and value:
        return first_tensor(value[0])
    carried = getattr(value, "h", None)
    return carried if isinstance(carried, Tensor) else None
