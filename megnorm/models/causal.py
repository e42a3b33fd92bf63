"""The causal language model: embedding, blocks, final norm, head, as the slice that one pipeline stage holds."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from megnorm.layers import streams
from megnorm.layers.attention import attention_mask
from megnorm.layers.block import Block, run_blocks
from megnorm.layers.dispatch import Routing
from megnorm.layers.embedding import Embedding, Head, TokenEmbedding, full_logits
from megnorm.layers.env import Context, Env
from megnorm.layers.init import initialize
from megnorm.layers.norm import norm_or_identity
from megnorm.layers.rope import rotations, token_positions
from megnorm.layers.router import left_by
from megnorm.models.config import ModelConfig
from megnorm.models.count import padded_vocabulary
from megnorm.models.family import resolve_model
from megnorm.norms.resolve import Resolved

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Tokens:
    """Input of one micro-batch. tokens, labels [s, b] int64; loss_mask [s, b] float; positions [s, b] or None.

    documents: packed rows, b = 1: lengths of the documents that lie one behind the other and do not see each other.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    positions: Tensor | None = None
    documents: tuple[int, ...] | None = None


class CausalLM(nn.Module):
    """A decoder-only language model, or the stage of one: the layers [first, last), and what lies at its ends.

    The first stage (whose layers begin at 0) embeds tokens, the last one has the final norm, the head and the loss.
    """

    def __init__(
        self, cfg: ModelConfig, resolved: Resolved, padded_vocab: int, env: Env, layers: tuple[int, int] | None = None
    ) -> None:
        super().__init__()
        self.cfg, self.env, self.streams = cfg, env, resolved.streams
        begin, end = layers or (0, cfg.layers)
        self.first, self.last = begin == 0, end == cfg.layers
        shared = cfg.tied_head and not (self.first and self.last)
        token: TokenEmbedding | None = None
        if self.first:
            self.embed = Embedding(cfg, resolved.embedding, padded_vocab, env, shared=shared)
            token = self.embed.token
        elif self.last and cfg.tied_head:
            token = TokenEmbedding(cfg, padded_vocab, env, shared=True, copy=True)
            self.add_module("embed", nn.ModuleDict({"token": token}))  # under the name of the first stage's
        self.blocks = nn.ModuleDict(
            {str(i): Block(resolved.layers[i], cfg, env.block(i, cfg.layers), i) for i in range(begin, end)}
        )
        if self.last:
            self.joined = streams.end(resolved.streams, cfg.width, env)
            self.final_norm = norm_or_identity(resolved.final, "final", 1, cfg.width, env)
            self.head = Head(cfg, padded_vocab, env, token.weight if cfg.tied_head and token is not None else None)

    def units(self) -> list[nn.Module]:
        """The parts that forward calls, in order."""
        return [
            *([self.embed] if self.first else []),
            *self.blocks.values(),
            *([self.joined, self.final_norm, self.head] if self.last else []),
        ]

    def edge(self, batch: Tokens, *, into: bool) -> tuple[tuple[int, ...], torch.dtype]:
        """What stages exchange for a micro-batch: the residual stream [s, b, d] ([s/tp, b, d]), or n of them [n, s, b, d]."""
        s, b = batch.tokens.shape
        shape = streams.shape_of(s // self.env.mesh.sp.size, b, self.cfg.width, self.streams)
        return shape, self.env.compute or self.env.dtype

    def hidden(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        documents: tuple[int, ...] | None = None,
        carry: Tensor | None = None,
        routing: Routing | None = None,
    ) -> Tensor:
        """tokens [s, b] -> the stream behind this stage, [s, b, d] ([s/tp, b, d] with sequence parallelism).

        carry: the stream that the stage before gave. The last stage applies the final norm. routing: takes the losses of
        sparse layers; None: nobody asks for them.
        """
        where = token_positions(tokens, self.cfg.padding_id) if positions is None else positions
        x = streams.begin(self.embed(tokens, where), self.streams) if carry is None else carry
        rope, window_rope = rotations(self.cfg, where, x.dtype)
        if routing is None and self.cfg.moe.experts:
            routing = self._routing(tokens, documents)
        mask = attention_mask(tokens, self.cfg.padding_id)
        context = Context(rope, mask, documents, window_rope=window_rope, routing=routing)
        x = run_blocks(list(self.blocks.values()), x, context, self.env)
        return self.final_norm(self.joined(x)) if self.last else x

    def states(self, batch: Tokens, carry: Tensor | None = None) -> Tensor:
        """The stream behind this stage; behind the last one what the head reads."""
        return self.hidden(batch.tokens, batch.positions, batch.documents, carry)

    def forward(self, batch: Tokens, carry: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """The last stage: sum of the masked token losses, a scalar in fp32 (fp64 for fp64); others: the stream.

        In training sparse layers with losses of their own give the sum of those beside it.
        """
        routing = None
        if self.cfg.moe.experts:
            routing = self._routing(batch.tokens, batch.documents, batch.loss_mask)
        out = self.hidden(batch.tokens, batch.positions, batch.documents, carry, routing)
        if self.last:
            losses = self.head.token_losses(out, batch.labels, self.cfg.label_smoothing if self.training else 0.0)
            out = (losses * batch.loss_mask).sum()
        beside = None if routing is None else left_by(self.cfg.moe, routing)
        return out if beside is None else (out, beside)

    def _routing(self, tokens: Tensor, documents: tuple[int, ...] | None, loss_mask: Tensor | None = None) -> Routing:
        s, b = tokens.shape
        real = None if self.cfg.padding_id is None else tokens != self.cfg.padding_id
        return Routing.of((s, b), tokens.device, documents, real, loss_mask)

    @torch.no_grad()
    def logits(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """[s, b, v] on every rank, without padding rows; no gradient."""
        return full_logits(self.head(self.hidden(tokens, positions)), self.head, self.cfg.vocab_size)


def build_model(
    cfg: ModelConfig,
    env: Env | None = None,
    *,
    seed: int = 0,
    resolved: Resolved | None = None,
    vocab_multiple: int = 64,
    layers: tuple[int, int] | None = None,
) -> CausalLM:
    """A causal model with its initial weights, or the stage that holds ``layers`` [first, last). See ``initialized``."""
    return initialized(CausalLM, cfg, env, seed=seed, resolved=resolved, vocab_multiple=vocab_multiple, layers=layers)


def initialized(
    kind: Callable[[ModelConfig, Resolved, int, Env, tuple[int, int] | None], M],
    cfg: ModelConfig,
    env: Env | None = None,
    *,
    seed: int = 0,
    resolved: Resolved | None = None,
    vocab_multiple: int = 64,
    layers: tuple[int, int] | None = None,
) -> M:
    """A model of class ``kind`` with its initial weights, or the stage that holds ``layers`` [first, last).

    env None: one process, fp32, CPU. resolved None: resolve the config's scheme. The vocabulary is stored in the least
    multiple of vocab_multiple * tp rows that holds it.
    """
    env = env or Env()
    resolved = resolved or resolve_model(cfg)
    padded = padded_vocabulary(cfg.vocab_size, vocab_multiple, env.mesh.tp.size)
    model = kind(cfg, resolved, padded, env, layers)
    initialize(model, cfg, resolved, seed)
    return model
