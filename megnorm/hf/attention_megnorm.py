"""Attention of a megnorm model in transformers: rotary positions, biases, and scores as they are written in a formula.

Needs torch, transformers and the two files it imports; shipped beside modeling_megnorm.py.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_megnorm import MegnormConfig
from .norms_megnorm import Spec, wide


def rotary_angles(
    config: MegnormConfig, layer_type: str, positions: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor] | None:
    """cos and sin [b, s, 1, head_dim] of rotary positions, for layers of a type; None for other positions."""
    if config.positions != "rotary":
        return None
    rope = config.rope_parameters.get(layer_type, config.rope_parameters)
    step, factor = rotary_step(config, rope, positions, wide(dtype))
    angles = positions[..., None, None].to(step.dtype) * step
    still = config.head_dim // 2 - angles.shape[-1]  # pairs of features that do not turn
    cos, sin = F.pad(angles.cos() * factor, (0, still), value=1.0), F.pad(angles.sin() * factor, (0, still))
    return torch.cat([cos, cos], -1).to(dtype), torch.cat([sin, sin], -1).to(dtype)


def rotary_step(config: MegnormConfig, rope: Spec, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, float]:
    """The angle of each pair of features at position 1, and the factor on cos and sin."""
    n = int(config.head_dim * rope.get("partial_rotary_factor", 1.0))
    theta, kind, factor = rope["rope_theta"], rope["rope_type"], rope.get("factor", 1.0)
    first = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    pairs = torch.arange(0, n, 2, device=positions.device, dtype=dtype) / n
    step = 1.0 / theta**pairs
    if kind == "linear":
        return step / factor, 1.0
    if kind == "dynamic":
        longer = (positions.max() + 1).clamp_min(first).to(dtype) / first
        return 1.0 / (theta * (factor * longer - factor + 1) ** (n / (n - 2))) ** pairs, 1.0
    if kind == "llama3":
        wave, low, high = 2 * math.pi / step, first / rope["low_freq_factor"], first / rope["high_freq_factor"]
        smooth = (first / wave - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
        middle = (1 - smooth) * step / factor + smooth * step
        return torch.where(wave > low, step / factor, torch.where(wave < high, step, middle)), 1.0
    if kind == "yarn":
        bounds = [n * math.log(first / (turns * 2 * math.pi)) / (2 * math.log(theta))
                  for turns in (rope["beta_fast"], rope["beta_slow"])]  # fmt: skip
        if rope.get("truncate", True):
            bounds = [math.floor(bounds[0]), math.ceil(bounds[1])]
        low, high = max(bounds[0], 0), min(bounds[1], n - 1)
        slow = ((pairs * n / 2 - low) / (high - low or 0.001)).clamp(0, 1)
        scale = rope.get("attention_factor")
        return step / factor * slow + step * (1 - slow), 0.1 * math.log(factor) + 1 if scale is None else scale
    if kind != "default":
        raise ValueError(f"config.json: rope_type '{kind}' is unknown to this modeling file; export again")
    return step, 1.0


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the halves of each head [b, s, heads, head_dim] against each other."""
    a, b = x.chunk(2, -1)
    return x * angles[0] + torch.cat([-b, a], -1) * angles[1]


def eager_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """query [b, h, s, hd], key and value [b, kv, t, hd] -> context [b, s, h, hd] and weights [b, h, s, t]."""
    key = key.repeat_interleave(module.num_key_value_groups, 1)
    value = value.repeat_interleave(module.num_key_value_groups, 1)
    scores = query @ key.transpose(2, 3) * kwargs["scaling"]
    if kwargs.get("softcap") is not None:
        scores = kwargs["softcap"] * torch.tanh(scores / kwargs["softcap"])
    if kwargs.get("bias") is not None:
        scores = scores + kwargs["bias"].to(scores.dtype)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1, dtype=wide(scores.dtype)).to(query.dtype)
    weights = F.dropout(weights, kwargs.get("dropout", 0.0), module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def alibi(heads: int, queries: Tensor, keys: Tensor) -> Tensor:
    """-slope * distance, [heads, s, t], of queries at places [s] and keys at places [t] of a row."""
    below = 2 ** int(math.log2(heads))
    powers = [2.0 ** (-8 * (i + 1) / below) for i in range(below)]
    powers += [2.0 ** (-4 * (2 * i + 1) / below) for i in range(heads - below)]
    slopes = torch.tensor(powers, dtype=torch.float64, device=keys.device)
    return slopes[:, None, None] * (keys - queries[:, None])


def relative_buckets(buckets: int, longest: int, queries: Tensor, keys: Tensor, *, causal: bool) -> Tensor:
    """The bucket of the distance of each key [t] from each query [s], [s, t]: the nearer half of the buckets hold one
    distance each, the others grow logarithmically up to ``longest`` (T5)."""
    distance = keys - queries[:, None]
    start = torch.zeros_like(distance)
    if causal:
        distance = (-distance).clamp_min(0)
    else:
        buckets //= 2
        start, distance = (distance > 0).long() * buckets, distance.abs()
    near = buckets // 2
    grown = torch.log(distance.clamp_min(1).float() / near) / math.log(longest / near)
    far = (near + (grown * (buckets - near)).long()).clamp_max(buckets - 1)
    return start + torch.where(distance < near, distance, far)
