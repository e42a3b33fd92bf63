"""What every layer is built with, and what every layer is called with."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from megnorm.kernels import backends
from megnorm.kernels.config import KernelConfig
from megnorm.kernels.registry import Need
from megnorm.layers.cache import Cache
from megnorm.layers.dispatch import Routing
from megnorm.layers.recompute import Recompute
from megnorm.parallel.mesh import Mesh
from megnorm.parallel.rng import DropoutRng


@dataclass(frozen=True)
class Env:
    """Where and of what a layer is built: mesh, dtype of parameters, which kernels, dropout's masks, recompute.

    compute: dtype of activations, for which kernels are chosen; None: dtype. (Weights start in fp32 and are lowered later.)
    packed: rows will be packed documents. tokens: of a micro-batch; 0: not known. quantize: the recipe of FP8 products here.
    region: what the forward pass of a stage runs in.
    """

    mesh: Mesh = field(default_factory=Mesh)
    dtype: torch.dtype = torch.float32
    kernels: KernelConfig = field(default_factory=KernelConfig)
    rng: DropoutRng = field(default_factory=lambda: DropoutRng(torch.device("cpu")))
    compute: torch.dtype | None = None
    recompute: Recompute = field(default_factory=Recompute)
    packed: bool = False
    tokens: int = 0
    quantize: str = ""
    region: Callable[[], AbstractContextManager[None]] = nullcontext

    @property
    def device(self) -> torch.device:
        return self.mesh.device

    def kernel(self, op: str, **detail: Any) -> Callable[..., Any]:
        """The implementation of ``op`` chosen for this device and the dtype of activations."""
        return backends.chosen(self._need(op, detail), self.kernels)[1]

    def fused(self, op: str, **detail: Any) -> Callable[..., Any] | None:
        """The implementation of an op that joins several; None where the reference, the layer's own steps, serves it."""
        backend, fn = backends.chosen(self._need(op, detail), self.kernels)
        return None if backend == "torch" else fn

    def block(self, index: int, layers: int) -> "Env":
        """For block ``index`` of a model: those in the middle multiply in FP8 if the run asks for it."""
        first, last = self.kernels.fp8_spare
        if self.kernels.fp8 is None or not first <= index < layers - last:
            return self
        return replace(self, quantize=self.kernels.fp8)

    @property
    def working(self) -> torch.dtype:
        """The dtype of activations."""
        return self.compute or self.dtype

    def _need(self, op: str, detail: dict[str, Any]) -> Need:
        k = self.kernels
        given = {"deterministic": k.deterministic, "compiled": k.compile, "capture": k.graphs, **detail}
        return Need(op, self.device.type, self.working, **given)

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def full(self, shape: tuple[int, ...], value: float) -> Tensor:
        return torch.full(shape, value, dtype=self.dtype, device=self.device)


@dataclass(frozen=True)
class Context:
    """What one forward pass of the blocks shares.

    rope: cos and sin, [s, 1, 1, hd/2] or [s, b, 1, hd/2]. mask: [b, 1, s, s] or [b, 1, 1, s] bool, True may look (to its
    left too, where causal); None: everywhere, or to its left. causal: nobody looks to its right.
    documents: lengths of packed documents (b = 1) that do not see each other. window_rope: rope of layers with a window.
    bias: [1, h/tp, s, s], added to the scores of self-attention. memory: the encoder's output [s', b, d] ([s'/tp, b, d]),
    which cross-attention reads; memory_mask: [b, 1, 1, s'], as mask. cache: of the tokens before, where one token is decoded
    at a time. routing: for sparse layers; None: there are none, or their losses are not asked for.
    """

    rope: tuple[Tensor, Tensor] | None = None
    mask: Tensor | None = None
    documents: tuple[int, ...] | None = None
    window_rope: tuple[Tensor, Tensor] | None = None
    causal: bool = True
    bias: Tensor | None = None
    memory: Tensor | None = None
    memory_mask: Tensor | None = None
    cache: Cache | None = None
    routing: Routing | None = None
