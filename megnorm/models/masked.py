"""The masked language model: an encoder that sees both sides, and a head over the vocabulary (BERT, RoBERTa)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megnorm.layers.embedding import Embedding, Head, TokenEmbedding, full_logits
from megnorm.layers.env import Env
from megnorm.layers.rope import token_positions
from megnorm.layers.streams import shape_of
from megnorm.layers.transform import HeadTransform
from megnorm.models.causal import Tokens
from megnorm.models.config import ModelConfig
from megnorm.models.stack import Stack
from megnorm.norms.resolve import Resolved


@dataclass(frozen=True)
class MaskedTokens(Tokens):
    """labels: the true tokens. real: [s, b] bool, False at padding; None: tokens other than ``padding_id``, if that is set.
    segments: token types [s, b]; None: all 0. Rows are not packed."""

    real: Tensor | None = None
    segments: Tensor | None = None


def stream_edge(stack: Stack, batch: Tokens) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of an encoder's residual stream."""
    s, b = batch.tokens.shape
    shape = shape_of(s // stack.env.mesh.sp.size, b, stack.cfg.width, stack.streams)
    return shape, stack.env.compute or stack.env.dtype


def encode(stack: Stack, batch: MaskedTokens, carry: Tensor | None) -> Tensor:
    """The stream behind this stage of an encoder, [s, b, d] ([s/tp, b, d])."""
    padding = stack.cfg.padding_id
    real = batch.tokens != padding if batch.real is None and padding is not None else batch.real
    where = token_positions(batch.tokens, padding) if batch.positions is None else batch.positions
    x = stack.start(batch.tokens, where, real, batch.segments) if carry is None else carry
    return stack.run(x, where, real)


class MaskedLM(Stack):
    """An encoder with a masked-LM head, or the stage of one: the layers [first, last), and what lies at its ends."""

    def __init__(
        self, cfg: ModelConfig, resolved: Resolved, padded_vocab: int, env: Env, layers: tuple[int, int] | None = None
    ) -> None:
        begin, end = layers or (0, cfg.layers)
        shared = cfg.tied_head and end - begin < cfg.layers
        embed = Embedding(cfg, resolved.embedding, padded_vocab, env, shared=shared) if begin == 0 else None
        super().__init__(cfg, resolved, env, (begin, end), embed)
        self.first, self.last = self.begins, self.ends
        if not self.last:
            return
        token = None if embed is None else embed.token
        if token is None and cfg.tied_head:
            token = TokenEmbedding(cfg, padded_vocab, env, shared=True, copy=True)
            self.add_module("embed", nn.ModuleDict({"token": token}))  # under the name of the first stage's
        self.transform = HeadTransform(cfg, env) if cfg.head_transform else None
        self.head = Head(cfg, padded_vocab, env, token.weight if cfg.tied_head and token is not None else None)

    def units(self) -> list[nn.Module]:
        """The parts that forward calls, in order."""
        if not self.last:
            return super().units()
        return [*super().units(), *([self.transform] if self.transform is not None else []), self.head]

    def edge(self, batch: MaskedTokens, *, into: bool) -> tuple[tuple[int, ...], torch.dtype]:
        """What stages exchange for a micro-batch: the residual stream [s, b, d] ([s/tp, b, d])."""
        return stream_edge(self, batch)

    def states(self, batch: MaskedTokens, carry: Tensor | None = None) -> Tensor:
        """The stream behind this stage, [s, b, d] ([s/tp, b, d]); behind the last one what the head reads."""
        x = encode(self, batch, carry)
        return self.transform(x) if self.last and self.transform is not None else x

    def forward(self, batch: MaskedTokens, carry: Tensor | None = None) -> Tensor:
        """The last stage: sum of the losses of masked tokens, a scalar in fp32 (fp64 for fp64); others: the stream.

        The head reads masked tokens alone, a seventh of them all, as fairseq's RoBERTa does.
        """
        x = self.states(batch, carry)
        if not self.last:
            return x
        weights = batch.loss_mask.flatten()
        where = weights.nonzero().flatten()
        where = where if len(where) else where.new_zeros(1)  # one place of weight 0, so that there is a graph
        smoothing = self.cfg.label_smoothing if self.training else 0.0
        losses = self.head.token_losses(x, batch.labels, smoothing, where)
        return (losses.flatten() * weights[where]).sum()

    @torch.no_grad()
    def logits(self, batch: MaskedTokens) -> Tensor:
        """[s, b, v] on every rank, without padding rows; no gradient."""
        return full_logits(self.head(self.states(batch)), self.head, self.cfg.vocab_size)
