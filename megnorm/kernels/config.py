"""Options of kernels: which backend serves which operation."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class KernelConfig:
    """prefer: operation -> backend, e.g. ``{attention: torch}``; an operation not named takes the best offer."""

    prefer: Mapping[str, str] = field(default_factory=dict)
