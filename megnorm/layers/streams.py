"""Residual streams as one tensor [n, s, b, d]: how they begin and end, and what a sub-layer does with two, X and Y."""

import torch
from torch import Tensor, nn

from megnorm.layers.env import Env
from megnorm.layers.mixing import Mixing
from megnorm.layers.norm import norm_or_identity
from megnorm.layers.residual import factor
from megnorm.norms.scheme import Scale, Second, Streams


class SecondStream(nn.Module):
    """A sub-layer's side of the second stream (norms/parts.py: Second)."""

    def __init__(self, second: Second, width: int, env: Env) -> None:
        super().__init__()
        self.start_norm = norm_or_identity(second.start, "start", 1, width, env)
        self.reads = second.read is not None
        self.read_norm = norm_or_identity(second.read, "read", 1, width, env)
        self.share: float | nn.Parameter = factor(second.share, width, env)  # type: ignore[assignment]  # it does not grow
        self.plain = second.share == Scale()
        self.write = float(second.write)  # type: ignore[arg-type]

    def forward(self, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[2, s, b, d] -> X normalized, Y, and what F reads, [s, b, d] each."""
        x, y = streams.unbind()
        x = self.start_norm(x)
        if not self.reads:
            return x, y, x
        return x, y, (x if self.plain else x * self.share) + self.read_norm(y)

    def join(self, x: Tensor, y: Tensor, branch: Tensor) -> Tensor:
        """X behind the residual, Y and the branch's output, [s, b, d] each -> [2, s, b, d]."""
        return torch.stack([x, torch.add(y, branch, alpha=self.write)])


class Ends(nn.Module):
    """Where two streams become one: [2, s, b, d] -> x(X) + y(Y) [s, b, d]."""

    def __init__(self, streams: Streams, width: int, env: Env) -> None:
        super().__init__()
        self.x_norm = norm_or_identity(streams.x, "x", 1, width, env)
        self.y_norm = norm_or_identity(streams.y, "y", 1, width, env)

    def forward(self, streams: Tensor) -> Tensor:
        x, y = streams.unbind()
        out: Tensor = self.x_norm(x) + self.y_norm(y)
        return out


class MixedEnds(nn.Module):
    """Where n streams become one: [n, s, b, d] -> [s, b, d], their sum times a constant, or by weights of each token."""

    def __init__(self, streams: Streams, width: int, env: Env) -> None:
        super().__init__()
        self.share = float(streams.share)  # type: ignore[arg-type]
        self.mix = None if streams.exit is None else Mixing(streams.exit, width, env, exits=True)

    def forward(self, streams: Tensor) -> Tensor:
        if self.mix is not None:
            return self.mix.read(streams, self.mix(streams))
        return streams.sum(0) * self.share


def begin(x: Tensor, streams: Streams | None) -> Tensor:
    """The embedding [s, b, d] as what layers take: itself, or [n, s, b, d]."""
    if streams is None:
        return x
    if streams.mixed:
        return torch.stack([x] * streams.mixed)
    return torch.stack([x, x * float(streams.entry)])  # type: ignore[arg-type]


def end(streams: Streams | None, width: int, env: Env) -> nn.Module:
    """What stands between the last layer and the final norm."""
    if streams is None:
        return nn.Identity()
    return (MixedEnds if streams.mixed else Ends)(streams, width, env)


def shape_of(length: int, batch: int, width: int, streams: Streams | None) -> tuple[int, ...]:
    """Of what one stage hands to the next."""
    return (length, batch, width) if streams is None else (streams.count, length, batch, width)
