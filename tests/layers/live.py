"""Memory that lives, counted where it is made: every storage that an operator returns while ``live`` is active.

Shares nothing with the code under test: it sees neither graphs nor saved tensors, only which storages still exist.
"""

import time
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class live(TorchDispatchMode):
    """``with live() as alive: ...``; alive.bytes() of storages made inside that still exist, views counted once."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}
        self._given: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in self._made:
                self._given[x.untyped_storage()._cdata] = StorageWeakRef(x.untyped_storage())
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in self._given:
                self._made[x.untyped_storage()._cdata] = (
                    StorageWeakRef(x.untyped_storage()),
                    x.untyped_storage().nbytes(),
                )
        return out

    def bytes(self) -> int:
        return sum(size for storage, size in self._made.values() if not storage.expired())

    def settled(self, samples: int = 20) -> int:
        """bytes() when it has not changed for 0.2 seconds: gloo's threads let go of a message's tensors when they like."""
        seen: list[int] = []
        while len(seen) < samples or len(set(seen[-samples:])) > 1:
            time.sleep(0.01)
            seen.append(self.bytes())
        return seen[-1]
