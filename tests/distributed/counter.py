"""What crosses the wire, counted where it leaves: every collective that torch dispatches, its kind, tensor and bytes.

Shares nothing with the code under test and nothing with any formula: it reads the operators' own arguments.
"""

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

KINDS = {
    "allgather_": "all-gather",
    "_allgather_base_": "all-gather",
    "allgather_into_tensor_coalesced_": "all-gather",
    "reduce_scatter_": "reduce-scatter",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_tensor_coalesced_": "reduce-scatter",
    "allreduce_": "all-reduce",
    "allreduce_coalesced_": "all-reduce",
    "broadcast_": "broadcast",
    "alltoall_": "all-to-all",
    "alltoall_base_": "all-to-all",
    "gather_": "gather",
    "scatter_": "scatter",
    "reduce_": "reduce",
    "send": "send",
    "recv_": "recv",
}
QUIET = {"barrier", "monitored_barrier_"}


@dataclass(frozen=True)
class Message:
    """A collective as one rank calls it. elements: of the full tensor (all ranks' shards together), of this dtype."""

    kind: str
    elements: int
    itemsize: int

    @property
    def bytes(self) -> int:
        return self.elements * self.itemsize


@dataclass
class Wire:
    """Messages counted while a ``counting`` block is active."""

    messages: Counter[Message] = field(default_factory=Counter)

    def total(self, kind: str) -> int:
        """Bytes of one kind."""
        return sum(message.bytes * times for message, times in self.messages.items() if message.kind == kind)


class counting(TorchDispatchMode):
    """``with counting() as wire``: every c10d operator that runs inside, backward passes included."""

    def __init__(self) -> None:
        super().__init__()
        self.wire = Wire()

    def __enter__(self) -> Wire:  # type: ignore[override]
        super().__enter__()
        return self.wire

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self._add(func._schema.name.split("::")[1], [x for x in tree_leaves((args, kwargs)) if _is_tensor(x)])
        return func(*args, **(kwargs or {}))

    def _add(self, name: str, tensors: list[Tensor]) -> None:
        if name in QUIET:
            return
        assert name in KINDS, f"a collective that the counter does not know: {name}"
        largest = max(tensors, key=lambda x: math.prod(x.shape))  # the gathered output, or the input to scatter
        self.wire.messages[Message(KINDS[name], largest.numel(), largest.element_size())] += 1


def _is_tensor(x: Any) -> bool:
    return isinstance(x, torch.Tensor)
