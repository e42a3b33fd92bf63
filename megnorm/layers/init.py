"""Initial weights: a base distribution times the scheme's gain by role, on full logical matrices.

Each matrix is drawn in blocks of rows by generators seeded with (seed, name, block), so that every layout starts from the
same numbers and a rank draws only the blocks it holds.
"""

import math
import re

import torch
from torch import Tensor, nn

from megnorm.models.config import ModelConfig
from megnorm.norms.resolve import Resolved
from megnorm.norms.scheme import BLOCK_ROLES
from megnorm.parallel.layout import Matrix, named_matrices
from megnorm.parallel.rng import derive

ROWS = 1024


def initialize(model: nn.Module, cfg: ModelConfig, resolved: Resolved, seed: int) -> None:
    """Fill every matrix of ``model`` whose role has a distribution; vectors keep the values they were built with."""
    for named in named_matrices(model):
        matrix = named.matrix
        law = law_of(named.name, matrix.role, matrix.shape, cfg, resolved)
        if law is not None:
            _fill(named.view(), matrix, *law, derive(seed, "init", named.name))
            if matrix.role == "embed" and cfg.padding_id is not None:
                row = cfg.padding_id - matrix.offset[0]
                if 0 <= row < matrix.local[0]:
                    named.view()[row] = 0.0


def law_of(
    name: str, role: str, shape: tuple[int, ...], cfg: ModelConfig, resolved: Resolved
) -> tuple[str, float] | None:
    """(distribution, std) of a logical matrix, or None where initial values are fixed (norms, biases, scales)."""
    base = 0.02 if cfg.init.std is None else cfg.init.std
    if role in ("embed", "position", "head"):
        own = {"embed": cfg.init.embedding_std, "position": cfg.init.position_std, "head": cfg.init.head_std}[role]
        shape_of = "truncated_normal" if cfg.init.distribution == "truncated_normal" else "normal"
        return shape_of, base if own is None else own
    if role not in BLOCK_ROLES:
        return None
    stack, layer = _place(name, resolved)
    distribution = resolved.distribution or cfg.init.distribution
    gains = stack.gains[layer]
    gain = gains.get(role, 1.0)
    if ".cross_attention." in name:
        gain = gains.get(f"cross.{role}", gain)
    if cfg.init.depth_scaled and role in ("o", "down"):
        gain /= math.sqrt(2 * len(stack.layers))
    return distribution, gain * _base_std(distribution, shape, base)


def _place(name: str, resolved: Resolved) -> tuple[Resolved, int]:
    """The stack that a hidden matrix is in, and the layer there; what closes a stack counts to the last."""
    found = re.match(r"(encoder\.)?(?:(?:.*\.)?blocks\.(\d+)|.*joined)\.", name)
    assert found is not None, f"{name} is no matrix of a block"
    stack = (resolved.encoder or resolved) if found[1] else resolved
    return stack, len(stack.layers) - 1 if found[2] is None else int(found[2])


def _base_std(distribution: str, shape: tuple[int, ...], std: float) -> float:
    fan_out, fan_in = shape[-2], shape[-1]
    if distribution.startswith("xavier"):
        return math.sqrt(2.0 / (fan_in + fan_out))
    if distribution == "uniform_fan_in":
        return math.sqrt(1.0 / (3.0 * fan_in))
    return std


def _fill(view: Tensor, matrix: Matrix, distribution: str, std: float, seed: int) -> None:
    rows, columns = matrix.shape
    first, last = matrix.offset[0], matrix.offset[0] + matrix.local[0]
    left = matrix.offset[1]
    for block in range(first // ROWS, -(-last // ROWS) if last > first else 0):
        top, bottom = block * ROWS, min((block + 1) * ROWS, rows)
        drawn = _draw((bottom - top, columns), distribution, std, derive(seed, block))
        low, high = max(top, first), min(bottom, last)
        view[low - first : high - first] = drawn[low - top : high - top, left : left + matrix.local[1]]


def _draw(shape: tuple[int, int], distribution: str, std: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.empty(shape, dtype=torch.float32)
    if distribution in ("xavier_uniform", "uniform_fan_in"):
        bound = math.sqrt(3.0) * std
        return x.uniform_(-bound, bound, generator=generator)
    if distribution == "truncated_normal":
        return nn.init.trunc_normal_(x, 0.0, std, -3.0 * std, 3.0 * std, generator=generator)
    return x.normal_(0.0, std, generator=generator)
