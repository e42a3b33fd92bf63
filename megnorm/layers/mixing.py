"""Streams that each token reads, mixes and writes to with weights of its own (hyper-connections)."""

import torch
from torch import Tensor, nn

from megnorm.layers.env import Env
from megnorm.layers.norm import norm_or_identity
from megnorm.layers.residual import learned
from megnorm.layers.wide import WideLinear
from megnorm.norms.scheme import Mix
from megnorm.parallel.layout import Layout, parameter


class Mixing(nn.Module):
    """A resolved Mix (norms/parts.py) of n streams [n, s, b, d], the first dimension of them all.

    ``forward`` gives the weights [s, b, n, n + 2] of stream s as columns: its share in what is read, its shares in each new
    stream, and how much of the branch it gets; with ``exits`` [s, b, n, 1], of what is read alone. They are computed in fp32
    (fp64 for fp64) and rounded to the streams' precision where they multiply.

    Parameters: ``map`` and ``bias`` (of each weight before it is bounded), ``scale`` (of each kind of weight).
    """

    kind: Tensor

    def __init__(self, mix: Mix, width: int, env: Env, *, exits: bool = False) -> None:
        super().__init__()
        n = mix.streams
        self.mix, self.streams, self.exits = mix, n, exits
        self.recompute = env.recompute
        alone = mix.rule == "tanh"  # a stream's weights are of its own features
        self.norm = norm_or_identity(mix.norm, "mix", 1 if alone else n, width, env)
        kinds = mix.kinds(exits=exits)
        self.register_buffer("kind", torch.tensor(kinds, device=env.device), persistent=False)
        partial = "tp" if env.mesh.sequence_parallel else None
        shape = (len(kinds), width * (1 if alone else n))
        layout = Layout.whole(shape, "mix", grad_sum=partial, owner=env.mesh.tp.rank == 0)
        self.map = parameter(env.empty(*shape), layout)
        self.scale = learned((max(kinds) + 1,), mix.scale, env)
        self.bias = learned((n, n + 2) if alone else (len(kinds),), 0.0, env)
        if alone:
            with torch.no_grad():
                self.bias.copy_(first_bias(mix))

    def forward(self, streams: Tensor) -> Tensor:
        return self.recompute("norms", self._weights, streams)

    def read(self, streams: Tensor, weights: Tensor) -> Tensor:
        """[n, s, b, d] -> what the branch reads, [s, b, d]."""
        return torch.einsum("sbn,nsbd->sbd", weights[..., 0].to(streams.dtype), streams)

    def join(self, streams: Tensor, weights: Tensor, branch: Tensor) -> Tensor:
        """The streams and the branch's output [s, b, d] -> the new streams."""
        weights = weights.to(streams.dtype)
        mixed = torch.einsum("sbnt,nsbd->tsbd", weights[..., 1:-1], streams)
        return torch.addcmul(mixed, weights[..., -1].permute(2, 0, 1).unsqueeze(-1), branch)

    def _weights(self, streams: Tensor) -> Tensor:
        if self.mix.rule == "tanh":
            raw = WideLinear.apply(self.norm(streams), self.map).permute(1, 2, 0, 3)
            return torch.tanh(raw) * self.scale.to(raw.dtype)[self.kind] + self.bias.to(raw.dtype)
        raw = WideLinear.apply(self.norm(streams.permute(1, 2, 0, 3).flatten(2)), self.map)
        raw = raw * self.scale.to(raw.dtype)[self.kind] + self.bias.to(raw.dtype)
        n = self.streams
        read = (raw[..., :n].sigmoid() + self.mix.eps).unsqueeze(-1)
        if self.exits:
            return read
        write = 2.0 * raw[..., n : 2 * n].sigmoid()
        mixed = doubly_stochastic(raw[..., 2 * n :].unflatten(-1, (n, n)), self.mix.rounds, self.mix.eps)
        return torch.cat([read, mixed, write.unsqueeze(-1)], -1)


def first_bias(mix: Mix) -> Tensor:
    """Rule "tanh": [n, n + 2], before training one stream is read, each stays what it is, and all are written to."""
    read = torch.zeros(mix.streams, 1)
    read[int(mix.first)] = 1.0  # type: ignore[arg-type]
    return torch.cat([read, torch.eye(mix.streams), torch.ones(mix.streams, 1)], 1)


def doubly_stochastic(logits: Tensor, rounds: int, eps: float) -> Tensor:
    """[..., n, n] -> positive matrices whose columns add up to 1, and whose rows nearly do (Sinkhorn and Knopp's iteration)."""
    found = logits.softmax(-1) + eps
    found = found / (found.sum(-2, keepdim=True) + eps)
    for _ in range(rounds - 1):
        found = found / (found.sum(-1, keepdim=True) + eps)
        found = found / (found.sum(-2, keepdim=True) + eps)
    return found
