"""Position tables: rotary angles and fairseq's sinusoids."""

import math

import torch
from torch import Tensor


def rope_table(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of positions [s] or [s, b] -> each [s, 1, 1, hd/2] or [s, b, 1, hd/2] (arXiv:2104.09864).

    Angles are computed in fp32 as Hugging Face's models do (fp64 for fp64 models) and rounded to ``dtype``.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    exponent = torch.arange(0, head_dim, 2, dtype=wide, device=positions.device) / head_dim
    angles = positions.to(wide)[..., None] * (1.0 / theta**exponent)
    shape = (positions.shape[0], positions.shape[1] if positions.dim() == 2 else 1, 1, head_dim // 2)
    return angles.cos().view(shape).to(dtype), angles.sin().view(shape).to(dtype)


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
