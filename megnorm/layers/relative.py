"""T5's relative position bias: one learned number a head for every bucket of distances (arXiv:1910.10683, section 2.1)."""

import math

import torch
from torch import Tensor, nn

from megnorm.layers.env import Env
from megnorm.layers.linear import Share
from megnorm.models.config import ModelConfig
from megnorm.parallel.layout import Layout, Matrix, parameter


class RelativeBias(nn.Module):
    """s -> [1, h/tp, s, s], added to the scores of every self-attention of a stack.

    bidirectional: half of the buckets are for what lies to the right. tie: the mesh's name of the stages that hold it, if
    there are several; copy: this is not the first one's.
    """

    def __init__(
        self, cfg: ModelConfig, env: Env, *, bidirectional: bool, tie: str | None = None, copy: bool = False
    ) -> None:
        super().__init__()
        assert cfg.relative_buckets is not None
        self.buckets, self.distance, self.bidirectional = cfg.relative_buckets, cfg.relative_distance, bidirectional
        share, shape = Share.of(cfg.heads, env.mesh), (cfg.relative_buckets, cfg.heads)
        local = (shape[0], share.count)
        matrix = Matrix("", "position", shape, (0, share.first), local, grad_sum=tie, owner=not copy, copy=copy)
        self.weight = parameter(env.empty(*local), Layout((matrix,)))

    def forward(self, s: int) -> Tensor:
        place = torch.arange(s, device=self.weight.device)
        found = buckets_of(place[None, :] - place[:, None], self.buckets, self.distance, self.bidirectional)
        return self.weight[found].permute(2, 0, 1)[None]


def buckets_of(distance: Tensor, buckets: int, farthest: int, bidirectional: bool) -> Tensor:
    """The bucket of each distance (key's place minus query's), int64 -> int64.

    The nearer half of the buckets hold one distance each, the others grow logarithmically up to ``farthest``.
    """
    start = torch.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        start, distance = (distance > 0).long() * buckets, distance.abs()
    else:
        distance = (-distance).clamp_min(0)
    near = buckets // 2
    grown = torch.log(distance.clamp_min(1).float() / near) / math.log(farthest / near) * (buckets - near)
    far = (near + grown.long()).clamp_max(buckets - 1)
    return start + torch.where(distance < near, distance, far)
