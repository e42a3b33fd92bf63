"""Options of kernels: which backend serves which operation, and how strictly."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class KernelConfig:
    """prefer: operation -> backend, e.g. ``{attention: torch}``; an operation not named takes the best offer.

    deterministic: the same bits from every run on the same accelerators: a backend that cannot promise it refuses.
    check: before a backend other than PyTorch serves on an accelerator, compare it once with the reference, values and
    gradients, on a small example; one that differs, or does not run, refuses.
    compile: on accelerators let PyTorch's compiler join what nobody has a kernel for: norms of other kinds with the sums beside
    them, activations. Every shape is compiled when it is first met.
    graphs: capture every block as a CUDA graph before the first step, so that the host starts it with one call; docs/gpu.md
    says what this asks of a run.
    fp8: the recipe by which Transformer Engine's linear layers in the blocks quantize: "current" (a scale for a tensor, of its
    own largest value), "delayed" (of the largest values seen lately, which checkpoints hold), "block" (128 x 128 and 1 x 128)
    or "mxfp8". None: they multiply in the working precision.
    fp8_spare: how many blocks at the beginning and at the end of the model stay in the working precision.
    """

    prefer: Mapping[str, str] = field(default_factory=dict)
    deterministic: bool = False
    check: bool = True
    compile: bool = False
    graphs: bool = False
    fp8: Literal["current", "delayed", "block", "mxfp8"] | None = None
    fp8_spare: tuple[int, int] = (0, 0)
