"""Recompute: what the graph of a forward pass leaves out, and how backward gets it again.

A layer declares a unit by calling it through ``Env.recompute``, under the mode that a run asks for it by:

    y = self.recompute("norms", self._normalize, x)

While ``recording`` is on, the graph saves a stand-in wherever it would save the unit's output, whoever the consumer is, or
anything between the unit's inputs and its output. The first stand-in that backward asks for runs the unit once more from
its inputs and serves all others that are waiting. An input may be a stand-in itself, so units that follow each other form a
chain which begins at a tensor that is kept: activation -> inner norm, post norm -> input norm.

Nothing is ever freed by force: a tensor lives as long as somebody refers to it, and saving is decided consumer by consumer.
So an output with several readers is safe whoever they are: the residual that adds the input norm's output, a learned skip
that multiplies it, a stream that is itself a post norm's output and goes on to the next layer. What is saved outside
``recording`` (the final norm's input, what the next pipeline stage receives) is saved in full.

The graph itself is the same with and without recompute, so gradients are equal bit for bit. Every rank of a tp group runs
the same units at the same point of backward, so their collectives meet.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from megnorm.parallel.rng import DropoutRng

Function = Callable[..., Tensor]
_running: list["_Unit"] = []  # innermost last

# A unit of these modes is not run again for the sake of its statistics: tensors this many times smaller than its input.
STATISTICS = {"norms": 8, "projections": 8}


def running() -> object | None:
    """The unit that runs now, for the first time or again: the same object both times."""
    return _running[-1] if _running else None


class Recompute:
    """What a run recomputes (train/config.py). blocks: of the first n blocks of a stage; None: of all."""

    def __init__(self, modes: Collection[str] = (), blocks: int | None = None) -> None:
        self.modes, self.blocks = frozenset(modes), blocks
        self._tape: _Tape | None = None

    @contextmanager
    def recording(self, rng: DropoutRng) -> Iterator[None]:
        """Leave out what the units inside would save. No effect without gradients, or where nothing is asked for."""
        if not self.modes or not torch.is_grad_enabled():
            yield
            return
        self._tape = _Tape(rng)
        try:
            with saved_tensors_hooks(self._tape.pack, _unpack):
                yield
        finally:
            self._tape = None

    def __call__(self, mode: str, fn: Function, *inputs: Tensor) -> Tensor:
        """``fn(*inputs)``, as a unit of ``mode``.

        fn must be a function of its inputs, of parameters and of the place of dropout alone, and what needs a gradient
        beside parameters must be among the inputs.
        """
        if self._tape is None or mode not in self.modes:
            return fn(*inputs)
        return self._tape.run(mode, fn, inputs)


class _Geometry(NamedTuple):
    """A view of an output's storage."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class _StandIn:
    """In the graph in place of a tensor of ``unit``. value: there from the unit's second run until backward takes it.

    index: which of the tensors that the unit saves inside; None: a view of its output.
    """

    __slots__ = ("__weakref__", "geometry", "index", "unit", "value")

    def __init__(self, unit: "_Unit", tensor: Tensor, index: int | None) -> None:
        self.unit, self.index = unit, index
        self.geometry = _Geometry(tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))
        self.value: Tensor | None = None

    def take(self) -> Tensor:
        if self.value is None:
            self.unit.run_again()
        value, self.value = self.value, None
        assert value is not None
        return value


class _Unit:
    """One run of a unit, as it is repeated: inputs (tensors or stand-ins), the place of dropout, who waits for what."""

    def __init__(self, fn: Function, inputs: list[Any], needs: list[bool], rng: DropoutRng) -> None:
        self.fn, self.inputs, self.needs = fn, inputs, needs
        self.rng, self.place = rng, rng.place
        self.waiting: WeakSet[_StandIn] = WeakSet()  # weak: a consumer that is done, or dropped, wants nothing

    def leave_out(self, tensor: Tensor, index: int | None = None) -> _StandIn:
        stand_in = _StandIn(self, tensor, index)
        self.waiting.add(stand_in)
        return stand_in

    def run_again(self) -> None:
        """Fill every stand-in that waits."""
        waiting = [one for one in self.waiting if one.value is None]
        inside = {one.index: one for one in waiting if one.index is not None}
        views = [one for one in waiting if one.index is None]
        taken = [_unpack(x) for x in self.inputs]
        inputs = [x.detach().requires_grad_(needs) for x, needs in zip(taken, self.needs, strict=True)]
        # What lies inside is seen as a second graph saves it; that graph is then dropped.
        hooks = saved_tensors_hooks(_Collector(inside, stop=not views), _never)
        with self.rng.at(self.place), torch.set_grad_enabled(bool(inside)), hooks:
            _running.append(self)
            try:
                out = self.fn(*inputs)
            except _AllThere:
                return
            finally:
                _running.pop()
        if any(one.value is None for one in inside.values()):
            raise RuntimeError(DIFFERS)
        for one in views:
            one.value = out.detach().as_strided(*one.geometry)


class _Collector:
    """Takes the tensors that a second run saves, counted as in the first. stop: end the run when all are there.

    Ending early spares what comes behind the last saved tensor: for a block, its last GEMM and collective.
    """

    def __init__(self, inside: dict[int, _StandIn], *, stop: bool) -> None:
        self.inside, self.last, self.count = inside, max(inside, default=-1) if stop else -1, -1

    def __call__(self, tensor: Tensor) -> None:
        self.count += 1
        wanted = self.inside.get(self.count)
        if wanted is not None:
            if tuple(tensor.shape) != wanted.geometry.shape:
                raise RuntimeError(DIFFERS)
            wanted.value = tensor.detach()
        if self.count == self.last:
            raise _AllThere


class _AllThere(Exception):
    """The second run has nothing more to give."""


DIFFERS = (
    "a recomputed unit saved other tensors than in its forward pass; call train() or eval() only when no backward pass "
    "is outstanding"
)


class _Output(NamedTuple):
    """A unit's output. alive: keeps the storage's address from being given to another one, even when its memory is freed."""

    unit: _Unit
    dtype: torch.dtype
    alive: StorageWeakRef


class _Tape:
    """What a forward pass leaves out: the outputs of its units by storage, and the unit that runs at the moment."""

    def __init__(self, rng: DropoutRng) -> None:
        self.rng = rng
        self.outputs: dict[int, _Output] = {}
        self.unit: _Unit | None = None
        self.kept: set[int] = set()  # storages of the running unit's inputs
        self.count = -1  # tensors that it has saved, less one
        self.small = -1  # elements up to which it keeps what it saves

    def run(self, mode: str, fn: Function, inputs: tuple[Tensor, ...]) -> Tensor:
        if self.unit is not None:  # part of a larger unit
            return fn(*inputs)
        unit = _Unit(fn, [self.pack(x) for x in inputs], [x.requires_grad for x in inputs], self.rng)
        self.kept, self.count = {_address(x) for x in inputs}, -1
        # Elsewhere not even what is empty: where a second run ends must not depend on whether this rank's experts had rows.
        self.small = inputs[0].numel() // STATISTICS[mode] if mode in STATISTICS else -1
        self.unit = unit
        _running.append(unit)
        try:
            out = fn(*inputs)
        finally:
            self.unit = None
            _running.pop()
        # A block's output is kept: else every block would be computed again from the first one's input.
        if mode != "block" and _address(out) not in self.kept:
            self.outputs[_address(out)] = _Output(unit, out.dtype, StorageWeakRef(out.untyped_storage()))
        return out

    def pack(self, tensor: Tensor) -> Tensor | _StandIn:
        """What the graph keeps for a tensor that it wants to save."""
        self.count += 1
        address = _address(tensor)
        known = self.outputs.get(address)
        if known is not None and tensor.dtype == known.dtype:
            return known.unit.leave_out(tensor)
        if self.unit is None or address in self.kept or tensor.numel() <= self.small or _is_parameter(tensor):
            return tensor.detach()
        return self.unit.leave_out(tensor, self.count)


def _unpack(saved: Tensor | _StandIn) -> Tensor:
    return saved.take() if isinstance(saved, _StandIn) else saved


def _never(saved: None) -> Tensor:
    raise AssertionError("nobody runs backward through the graph of a second run")


def _address(tensor: Tensor) -> int:
    """Of the storage, unique while it exists."""
    return int(tensor.untyped_storage()._cdata)


def _is_parameter(tensor: Tensor) -> bool:
    """Whether it is a parameter or a view of one (a transposed weight)."""
    base = tensor if tensor._base is None else tensor._base
    return base.is_leaf and base.requires_grad
