"""The encoder-decoder: two stacks, the second of which reads the first's output in cross-attention (translation, T5)."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from megnorm.layers.attention import padding_mask
from megnorm.layers.cache import Cache
from megnorm.layers.embedding import Embedding, Head, TokenEmbedding, full_logits
from megnorm.layers.env import Context, Env
from megnorm.layers.rope import token_positions
from megnorm.layers.streams import shape_of
from megnorm.models.config import ModelConfig
from megnorm.models.stack import Stack
from megnorm.norms.resolve import Resolved


@dataclass(frozen=True)
class Pairs:
    """Input of one micro-batch. source [s, b] int64; real: [s, b] bool, False at its padding, None: it has none.

    tokens, labels [t, b] int64: the decoder's input and what it is to say; loss_mask [t, b] float. Padding of the decoder
    stands at the end of a row, where no real token sees it.
    """

    source: Tensor
    real: Tensor | None
    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor


class EncoderDecoder(nn.Module):
    """An encoder-decoder, or the stage of one: the layers [first, last), the encoder's counted before the decoder's.

    Stages of the encoder hand on the stream [s, b, d], the last of them the encoder's output; stages of the decoder hand
    on that output and their stream, one behind the other: [s + t, b, d], with n streams [s + n t, b, d].
    """

    def __init__(
        self, cfg: ModelConfig, resolved: Resolved, padded_vocab: int, env: Env, layers: tuple[int, int] | None = None
    ) -> None:
        super().__init__()
        assert resolved.encoder is not None, "the scheme of an encoder-decoder is resolved for both stacks"
        n = cfg.source_layers
        self.cfg, self.env, self.streams = cfg, env, resolved.streams
        self.begin, self.end = layers or (0, n + cfg.layers)
        self.first, self.last = self.begin == 0, self.end == n + cfg.layers
        self.has_encoder, self.starts, self.has_decoder = self.begin < n, self.begin <= n < self.end, self.end > n
        tokens = self._shared_tokens(padded_vocab)
        if self.has_encoder:
            own = replace(cfg, max_positions=cfg.source_positions)
            embed = None
            if self.first:
                token = tokens if cfg.shared_embedding else None
                embed = Embedding(own, resolved.encoder.embedding, padded_vocab, env, token=token, stack="encoder.")
            span = self.begin, min(self.end, n)
            self.encoder = Stack(own, resolved.encoder, env, span, embed, name="encoder.")
        if self.has_decoder:
            embed = None
            if self.starts:
                embed = Embedding(cfg, resolved.embedding, padded_vocab, env, token=tokens, stack="decoder.")
            span = max(self.begin - n, 0), self.end - n
            self.decoder = Stack(cfg, resolved, env, span, embed, name="decoder.", causal=True, cross=True)
        if self.last:
            tied = tokens.weight if cfg.tied_head and tokens is not None else None
            self.head = Head(cfg, padded_vocab, env, tied)

    def _shared_tokens(self, padded_vocab: int) -> TokenEmbedding | None:
        """The token table that this stage has in common with others, or uses twice; its name is the same everywhere."""
        cfg = self.cfg
        users = [*([self.first] if cfg.shared_embedding else []), self.starts, *([self.last] if cfg.tied_head else [])]
        if len(users) == 1 or not any(users):
            return None
        token = TokenEmbedding(cfg, padded_vocab, self.env, shared=not all(users), copy=not users[0], tie="embed")
        self.embed = nn.ModuleDict({"token": token})
        return token

    def units(self) -> list[nn.Module]:
        """The parts that forward calls, in order."""
        return [
            *(self.encoder.units() if self.has_encoder else []),
            *(self.decoder.units() if self.has_decoder else []),
            *([self.head] if self.last else []),
        ]

    def edge(self, batch: Pairs, *, into: bool) -> tuple[tuple[int, ...], torch.dtype]:
        """What stages exchange for a micro-batch: see the class; lengths are divided by tp with sequence parallelism."""
        s, b = batch.source.shape
        border, n, dtype = self.begin if into else self.end, self.cfg.source_layers, self.env.compute or self.env.dtype
        if border < n:
            return shape_of(s // self.env.mesh.sp.size, b, self.cfg.width, self.streams), dtype
        length = s if border == n else s + len(batch.tokens) * (1 if self.streams is None else self.streams.count)
        return (length // self.env.mesh.sp.size, b, self.cfg.width), dtype

    def states(self, batch: Pairs, carry: Tensor | None = None) -> Tensor:
        """What this stage hands on; behind the last one what the head reads."""
        x, memory = None, carry
        if self.has_encoder:
            memory = self.encode(batch.source, batch.real, carry)
        elif carry is not None and self.begin > self.cfg.source_layers:
            length = len(batch.source) // self.env.mesh.sp.size
            memory, x = carry[:length], carry[length:]
            x = x if self.streams is None else x.unflatten(0, (self.streams.count, -1))
        assert memory is not None
        if not self.has_decoder:
            return memory
        x = self.decode(batch.tokens, memory, batch.real, x)
        if self.last:
            return x
        return torch.cat([memory, x if self.streams is None else x.flatten(0, 1)])

    def encode(self, source: Tensor, real: Tensor | None, carry: Tensor | None = None) -> Tensor:
        """source [s, b] -> the encoder's stream behind this stage. carry: of the stage before."""
        where = token_positions(source, None)
        x = self.encoder.start(source, where, real) if carry is None else carry
        return self.encoder.run(x, where, real)

    def decode(self, tokens: Tensor, memory: Tensor, real: Tensor | None, carry: Tensor | None = None) -> Tensor:
        """tokens [t, b] and the encoder's output -> the decoder's stream behind this stage."""
        where = token_positions(tokens, None)
        x = self.decoder.start(tokens, where, None) if carry is None else carry
        return self.decoder.run(x, where, None, Context(memory=memory, memory_mask=padding_mask(real)))

    def scores(self, tokens: Tensor, memory: Tensor, real: Tensor | None) -> Tensor:
        """Scores [t, b, v] for what follows each of tokens [t, b]."""
        return full_logits(self.head(self.decode(tokens, memory, real)), self.head, self.cfg.vocab_size)

    def step(self, token: Tensor, at: int, memory: Tensor, real: Tensor | None, cache: Cache) -> Tensor:
        """Scores [b, v] for what follows token [b], the one at place ``at``; those before it are in the cache."""
        where = torch.tensor([at], device=token.device)
        x = self.decoder.start(token[None], where, None)
        context = Context(memory=memory, memory_mask=padding_mask(real), cache=cache)
        x = self.decoder.run(x, where, None, context)
        return full_logits(self.head(x), self.head, self.cfg.vocab_size)[0]

    def forward(self, batch: Pairs, carry: Tensor | None = None) -> Tensor:
        """The last stage: sum of the masked token losses, a scalar in fp32 (fp64 for fp64); others: what they hand on."""
        x = self.states(batch, carry)
        if not self.last:
            return x
        losses = self.head.token_losses(x, batch.labels, self.cfg.label_smoothing if self.training else 0.0)
        return (losses * batch.loss_mask).sum()

    @torch.no_grad()
    def logits(self, batch: Pairs) -> Tensor:
        """[t, b, v] on every rank, without padding rows; no gradient."""
        return full_logits(self.head(self.states(batch)), self.head, self.cfg.vocab_size)
