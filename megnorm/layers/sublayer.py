"""The one place where norms, a branch and the residual stream meet."""

import torch
from torch import Tensor, nn

from megnorm.layers import fused
from megnorm.layers.env import Context, Env
from megnorm.layers.mixing import Mixing
from megnorm.layers.norm import norm_or_identity
from megnorm.layers.residual import residual_rule
from megnorm.layers.streams import SecondStream
from megnorm.norms import scheme


class Dropout(nn.Module):
    """Zero elements with probability p and scale the rest by 1 / (1 - p).

    The mask is a function of ``name`` and of the place of ``Env.rng``; local: it differs between tp ranks.
    """

    def __init__(self, p: float, env: Env, name: str, *, local: bool) -> None:
        super().__init__()
        self.p, self.rng, self.name, self.local = p, env.rng, name, local

    def forward(self, x: Tensor) -> Tensor:
        if self.p == 0.0 or not self.training:
            return x
        keep = torch.empty_like(x).bernoulli_(1.0 - self.p, generator=self.rng.enter(self.name, local=self.local))
        # By a Python number: in bf16 a mask of 1 / 0.9 would be rounded, and the mean with it.
        return (x * keep) * (1.0 / (1.0 - self.p))


class SubLayer(nn.Module):
    """A residual sub-layer: x' = post(skip * r + branch * output(F(input(x)))).

    stream [s, b, d] -> same ([s/tp, b, d] with sequence parallelism); n streams are [n, s, b, d]. Subclasses
    bring the branch F as ``body``.
    name: the sub-layer's path in the whole model, of which dropout masks are a function.
    """

    def __init__(self, spec: scheme.SubLayer, width: int, dropout: float, env: Env, name: str) -> None:
        super().__init__()
        self.input_norm = norm_or_identity(spec.input, "input", 1, width, env)
        self.output_norm = norm_or_identity(spec.output, "output", 1, width, env)
        self.post_norm = norm_or_identity(spec.post, "post", 1, width, env)
        self.residual = residual_rule(spec.residual, width, env)
        self.second = None if spec.second is None else SecondStream(spec.second, width, env)
        self.mix = None if spec.mix is None else Mixing(spec.mix, width, env)
        self.recompute = env.recompute
        self.dropout = Dropout(dropout, env, name, local=env.mesh.sequence_parallel)
        self.single = self.second is None and self.mix is None
        self.join = fused.join(self, dropout, env) if self.single else None
        self.entry: fused.Entry | None = None  # a sub-layer that begins with a product may have one

    def body(self, u: Tensor, context: Context, h: Tensor | None = None) -> Tensor:
        """The branch F: [s, b, d] -> [s, b, d]. Abstract: every kind of sub-layer has its own.

        h: the first product, of all its outputs, where it is there already (``entry``).
        """
        raise NotImplementedError

    def branch(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """x [s, b, d] -> u = input(x), as the residual may want it, and F(u)."""
        if self.entry is None or self.entry.watched():
            u = self.input_norm(x)
            return u, self.body(u, context)
        h, u = self.entry(x)
        return u, self.body(u, context, h)

    def _two(self, second: SecondStream, streams: Tensor, context: Context) -> Tensor:
        """The same with two streams, [2, s, b, d] -> same."""
        first, other, read = second(streams)
        u, y = self.branch(read, context)
        y = self.dropout(self.output_norm(y))
        return second.join(self.post_norm(self.residual(first, u, y, first)), other, y)

    def _mixed(self, mix: Mixing, streams: Tensor, context: Context) -> Tensor:
        """The same with streams mixed by token, [n, s, b, d] -> same."""
        weights = mix(streams)
        _, y = self.branch(mix.read(streams, weights), context)
        return mix.join(streams, weights, self.dropout(self.output_norm(y)))

    def forward(
        self,
        stream: Tensor,
        context: Context,
        *,
        layer_input: Tensor,
        read: Tensor | None = None,
        u: Tensor | None = None,
    ) -> Tensor:
        """layer_input: the stream at the start of the layer. read: what F reads; None: the stream itself.

        u: the input norm's output, where it is there already.
        """
        if self.second is not None:
            return self._two(self.second, stream, context)
        if self.mix is not None:
            return self._mixed(self.mix, stream, context)
        if u is None:
            u, y = self.branch(stream if read is None else read, context)
        else:
            y = self.body(u, context)
        if self.join is not None and not self.join.watched(self):
            return self.join(self, stream, u, y)
        y = self.dropout(self.output_norm(y))
        return self.post_norm(self.residual(stream, u, y, layer_input))
