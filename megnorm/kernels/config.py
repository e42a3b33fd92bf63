"""Options of kernels: which backend serves which operation, and how strictly."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class KernelConfig:
    """prefer: operation -> backend, e.g. ``{attention: torch}``; an operation not named takes the best offer.

    deterministic: the same bits from every run on the same accelerators: a backend that cannot promise it refuses.
    check: before a backend other than PyTorch serves on an accelerator, compare it once with the reference, values and
    gradients, on a small example; one that differs, or does not run, refuses.
    """

    prefer: Mapping[str, str] = field(default_factory=dict)
    deterministic: bool = False
    check: bool = True
