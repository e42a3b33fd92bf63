"""Packed documents as attention kernels want them."""

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=4)  # every layer of a micro-batch asks for the same
def boundaries(documents: tuple[int, ...], device: torch.device) -> tuple[Tensor, int]:
    """Lengths of documents -> where each begins, and the end: [documents + 1] int32; and the longest."""
    ends = torch.tensor((0, *documents), dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return ends.to(device), max(documents)
