"""What every layer is built with, and what every layer is called with."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megnorm.kernels import backends, registry
from megnorm.layers.cache import Cache
from megnorm.layers.dispatch import Routing
from megnorm.layers.recompute import Recompute
from megnorm.parallel.mesh import Mesh
from megnorm.parallel.rng import DropoutRng

assert backends.REFERENCE  # imported for its offers


@dataclass(frozen=True)
class Env:
    """Where and of what a layer is built: mesh, dtype of parameters, preferred kernels, dropout's masks, recompute.

    compute: dtype of activations, for which kernels are chosen; None: dtype. (Weights start in fp32 and are lowered later.)
    """

    mesh: Mesh = field(default_factory=Mesh)
    dtype: torch.dtype = torch.float32
    prefer: Mapping[str, str] = field(default_factory=dict)
    rng: DropoutRng = field(default_factory=lambda: DropoutRng(torch.device("cpu")))
    compute: torch.dtype | None = None
    recompute: Recompute = field(default_factory=Recompute)

    @property
    def device(self) -> torch.device:
        return self.mesh.device

    def kernel(self, op: str, **detail: Any) -> Callable[..., Any]:
        """The implementation of ``op`` chosen for this device and the dtype of activations."""
        return registry.choose(registry.Need(op, self.device.type, self.compute or self.dtype, **detail), self.prefer)

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def full(self, shape: tuple[int, ...], value: float) -> Tensor:
        return torch.full(shape, value, dtype=self.dtype, device=self.device)


@dataclass(frozen=True)
class Context:
    """What one forward pass of the blocks shares.

    rope: cos and sin, [s, 1, 1, hd/2] or [s, b, 1, hd/2]. mask: [b, 1, s, s] or [b, 1, 1, s] bool, True may look (to its
    left too, where causal); None: everywhere, or to its left. causal: nobody looks to its right.
    documents: lengths of packed documents (b = 1) that do not see each other.
    bias: [1, h/tp, s, s], added to the scores of self-attention. memory: the encoder's output [s', b, d] ([s'/tp, b, d]),
    which cross-attention reads; memory_mask: [b, 1, 1, s'], as mask. cache: of the tokens before, where one token is decoded
    at a time. routing: for sparse layers; None: there are none, or their losses are not asked for.
    """

    rope: tuple[Tensor, Tensor] | None = None
    mask: Tensor | None = None
    documents: tuple[int, ...] | None = None
    causal: bool = True
    bias: Tensor | None = None
    memory: Tensor | None = None
    memory_mask: Tensor | None = None
    cache: Cache | None = None
    routing: Routing | None = None
