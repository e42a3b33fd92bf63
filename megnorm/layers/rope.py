"""Position tables: rotary angles and fairseq's sinusoids."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from megnorm.models.config import ModelConfig, RopeScaling

Table = tuple[Tensor, Tensor]
"""cos and sin, each [s, 1|b, 1, hd/2]."""


def rotations(cfg: ModelConfig, positions: Tensor, dtype: torch.dtype) -> tuple[Table | None, Table | None]:
    """The tables of full layers and of layers with a window, for positions [s] or [s, b] (below 0: padding)."""
    if cfg.positions != "rotary":
        return None, None
    where, local = positions.clamp_min(0), cfg.attention.window_rope_theta
    turned, still = cfg.rotary_dim, (cfg.hd - cfg.rotary_dim) // 2
    full = _with_still(rope_table(where, turned, cfg.rope_theta, dtype, cfg.rope_scaling, cfg.max_positions), still)
    return full, full if local is None else _with_still(rope_table(where, turned, local, dtype), still)


def _with_still(table: Table, pairs: int) -> Table:
    """With so many more pairs of features that do not turn: the angle 0."""
    return (F.pad(table[0], (0, pairs), value=1.0), F.pad(table[1], (0, pairs))) if pairs else table


def rope_table(
    positions: Tensor,
    head_dim: int,
    theta: float,
    dtype: torch.dtype,
    scaling: RopeScaling | None = None,
    longest: int = 0,
) -> Table:
    """cos and sin of positions [s] or [s, b] -> each [s, 1, 1, hd/2] or [s, b, 1, hd/2] (arXiv:2104.09864).

    Angles are computed in fp32 as Hugging Face's models do (fp64 for fp64 models) and rounded to ``dtype``.
    longest: of the positions that the model takes, which scaling starts from if it names none.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    exponent = torch.arange(0, head_dim, 2, dtype=wide, device=positions.device) / head_dim
    if scaling is None or scaling.kind == "none":
        steps, factor = 1.0 / theta**exponent, 1.0
    else:
        steps, factor = _scaled(exponent, head_dim, theta, scaling, scaling.original or longest, positions)
    angles = positions.to(wide)[..., None] * steps
    shape = (positions.shape[0], positions.shape[1] if positions.dim() == 2 else 1, 1, head_dim // 2)
    cos, sin = angles.cos().view(shape), angles.sin().view(shape)
    return (cos * factor).to(dtype), (sin * factor).to(dtype)


def _scaled(
    exponent: Tensor, head_dim: int, theta: float, scaling: RopeScaling, original: int, positions: Tensor
) -> tuple[Tensor, float]:
    """The angle that each pair of features turns by in one position, [hd/2], and the factor on cos and sin."""
    steps = 1.0 / theta**exponent
    if scaling.kind == "linear":
        return steps / scaling.factor, 1.0
    if scaling.kind == "dynamic":
        length = (positions.max() + 1).clamp_min(original).to(exponent.dtype)  # as a tensor: a device is not waited for
        stretch = scaling.factor * length / original - (scaling.factor - 1.0)
        return 1.0 / (theta * stretch ** (head_dim / (head_dim - 2))) ** exponent, 1.0
    if scaling.kind == "llama3":
        turns = original * steps / (2.0 * math.pi)
        kept = ((turns - scaling.low_freq) / (scaling.high_freq - scaling.low_freq)).clamp(0.0, 1.0)
        return steps / scaling.factor * (1.0 - kept) + steps * kept, 1.0
    low, high = (_feature(turns, head_dim, theta, original) for turns in (scaling.beta_fast, scaling.beta_slow))
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    pairs = torch.arange(head_dim // 2, dtype=exponent.dtype, device=exponent.device)
    kept = 1.0 - ((pairs - low) / (high - low if high != low else 0.001)).clamp(0.0, 1.0)
    factor = scaling.attention_factor
    return steps / scaling.factor * (1.0 - kept) + steps * kept, (
        0.1 * math.log(scaling.factor) + 1.0 if factor is None else factor
    )


def _feature(turns: float, head_dim: int, theta: float, length: int) -> float:
    """The pair of features that turns this often over ``length`` positions."""
    return head_dim * math.log(length / (turns * 2.0 * math.pi)) / (2.0 * math.log(theta))


def alibi_slopes(heads: int) -> tuple[float, ...]:
    """The slope of each head (arXiv:2108.12409): 2^(-8 i / n), and for n no power of two, every second of the next power's."""

    def powers(n: int) -> list[float]:
        return [2.0 ** (-8.0 * i / n) for i in range(1, n + 1)]

    below = 1 << (heads.bit_length() - 1)
    return tuple((powers(below) + powers(2 * below)[::2])[:heads])


def sinusoid_table(rows: int, width: int, first: int = 2) -> Tensor:
    """[rows, width] in fp32: row p is [sin(q w), cos(q w)] with q = p + first, w_i = 10000^(-i / (width/2 - 1)).

    fairseq's table, to the bit, whose first token stands at padding_id + 1 = 2; an odd width ends with a zero column.
    """
    half = width // 2
    w = torch.exp(torch.arange(half, dtype=torch.float32) * -(math.log(10000.0) / max(half - 1, 1)))
    angles = (torch.arange(rows, dtype=torch.float32) + first)[:, None] * w
    return torch.cat([angles.sin(), angles.cos(), angles.new_zeros(rows, width % 2)], dim=1)


def token_positions(tokens: Tensor, padding_id: int | None) -> Tensor:
    """Positions of tokens [s, b] -> [s] (no padding token) or [s, b]: real tokens are counted from 0, padding is -1."""
    if padding_id is None:
        return torch.arange(tokens.shape[0], device=tokens.device)
    real = tokens != padding_id
    return torch.where(real, real.cumsum(0) - 1, -1)
