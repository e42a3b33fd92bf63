"""What a decoder keeps from one token to the next: keys and values of its own tokens, and of the encoder's output."""

from collections.abc import Callable

import torch
from torch import Tensor


class Cache:
    """By attention's name: keys and values [s, b, heads, hd] so far; projections of the memory [s', b, rows], made once."""

    def __init__(self) -> None:
        self.grown: dict[str, tuple[Tensor, Tensor]] = {}
        self.fixed: dict[str, tuple[Tensor, ...]] = {}

    def extend(self, name: str, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of new tokens behind those of the tokens before."""
        if name in self.grown:
            before = self.grown[name]
            k, v = torch.cat([before[0], k]), torch.cat([before[1], v])
        self.grown[name] = k, v
        return k, v

    def once(self, name: str, make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        if name not in self.fixed:
            self.fixed[name] = make()
        return self.fixed[name]

    def select(self, rows: Tensor, *, fewer: bool = False) -> None:
        """Go on with these rows [b] of the batch. Unless there are fewer of them than before, each must read the same memory
        as the row whose place it takes.
        """
        self.grown = {name: (k.index_select(1, rows), v.index_select(1, rows)) for name, (k, v) in self.grown.items()}
        if fewer:
            self.fixed = {name: tuple(x.index_select(1, rows) for x in found) for name, found in self.fixed.items()}
