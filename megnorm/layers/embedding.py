"""Token and position embedding, and the output head, over a vocabulary split across tp ranks."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megnorm.layers.env import Env
from megnorm.layers.loss import cross_entropy, token_loss
from megnorm.layers.norm import norm_or_identity
from megnorm.layers.rope import sinusoid_table
from megnorm.layers.sublayer import Dropout
from megnorm.models.config import ModelConfig
from megnorm.norms.scheme import Norm
from megnorm.parallel.collectives import (
    all_gather,
    copy_to,
    gather_sequence,
    scatter_sequence,
    slice_sequence,
    sum_from,
)
from megnorm.parallel.layout import Layout, Matrix, parameter
from megnorm.parallel.mesh import Axis


def vocabulary_matrix(role: str, cfg: ModelConfig, padded: int, tp: Axis, *, width: int | None) -> tuple[Matrix, int]:
    """This rank's rows of a [v, width] (or [v]) matrix stored with ``padded`` rows; also the rows it stores."""
    rows = padded // tp.size
    first = min(tp.rank * rows, cfg.vocab_size)
    held = min(rows, cfg.vocab_size - first)
    tail = () if width is None else (width,)
    return Matrix("", role, (cfg.vocab_size, *tail), (first, *(0 for _ in tail)), (held, *tail)), rows


class TokenEmbedding(nn.Module):
    """tokens [s, b] -> [s, b, d] ([s/tp, b, d] with sequence parallelism); rows of the vocabulary split over tp.

    shared: several stages of a pipeline hold it: the first and the last for a tied head, or those of another tie of the
    mesh. copy: this is not the first one's.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        padded_vocab: int,
        env: Env,
        *,
        shared: bool = False,
        copy: bool = False,
        tie: str = "ends",
    ) -> None:
        super().__init__()
        self.mesh = env.mesh
        matrix, rows = vocabulary_matrix("embed", cfg, padded_vocab, env.mesh.tp, width=cfg.width)
        matrix = replace(matrix, grad_sum=tie if shared else None, owner=not copy, copy=copy)
        self.first, self.rows = env.mesh.tp.rank * rows, rows
        # The lookup of padding sends no gradient to its row (fairseq); the row lies on one rank.
        padding = -1 if cfg.padding_id is None else cfg.padding_id - self.first
        self.padding = padding if 0 <= padding < rows else None
        self.weight = parameter(env.full((rows, cfg.width), 0.0), Layout((matrix,)))

    def forward(self, tokens: Tensor) -> Tensor:
        if self.mesh.tp.size == 1:
            return F.embedding(tokens, self.weight, padding_idx=self.padding)
        local = tokens - self.first
        mine = (local >= 0) & (local < self.rows)
        x = F.embedding(local.clamp(0, self.rows - 1), self.weight, padding_idx=self.padding) * mine[..., None].to(
            self.weight.dtype
        )
        return scatter_sequence(x, self.mesh.tp) if self.mesh.sequence_parallel else sum_from(x, self.mesh.tp)


class PositionEmbedding(nn.Module):
    """A learned table [max_positions, d] or fairseq's sinusoids, for positions [s] or [s, b]; padding (-1) gets zero."""

    def __init__(self, cfg: ModelConfig, env: Env) -> None:
        super().__init__()
        self.mesh, self.padded = env.mesh, cfg.padding_id is not None
        self.table: Tensor | None
        if cfg.positions == "learned":
            partial = "tp" if env.mesh.sequence_parallel else None
            shape = (cfg.max_positions, cfg.width)
            layout = Layout.whole(shape, "position", grad_sum=partial, owner=env.mesh.tp.rank == 0)
            self.weight = parameter(env.empty(*shape), layout)
            self.table = None
        else:
            first = 1 if cfg.padding_id is None else cfg.padding_id + 1
            table = sinusoid_table(cfg.max_positions, cfg.width, first).to(env.device)
            self.register_buffer("table", table, persistent=False)

    def forward(self, positions: Tensor) -> Tensor:
        """-> [s, 1, d] or [s, b, d], sliced to this rank's rows with sequence parallelism."""
        positions = slice_sequence(positions, self.mesh.sp)
        if positions.dim() == 1:
            positions = positions[:, None]
        rows = F.embedding(positions.clamp_min(0), self.weight if self.table is None else self.table)
        return rows * (positions >= 0)[..., None].to(rows.dtype) if self.padded else rows


class SegmentEmbedding(nn.Module):
    """Token types [s, b] -> [s, b, d], sliced to this rank's rows with sequence parallelism."""

    def __init__(self, cfg: ModelConfig, env: Env) -> None:
        super().__init__()
        self.sp = env.mesh.sp
        shape = (cfg.segments, cfg.width)
        grad_sum = "tp" if env.mesh.sequence_parallel else None
        layout = Layout.whole(shape, "position", grad_sum=grad_sum, owner=env.mesh.tp.rank == 0)
        self.weight = parameter(env.empty(*shape), layout)

    def forward(self, segments: Tensor) -> Tensor:
        return F.embedding(slice_sequence(segments, self.sp), self.weight)


class Embedding(nn.Module):
    """tokens [s, b], positions -> the residual stream: token * scale + position (+ segment), embedding norm, dropout.

    token: a table that another stack has too; None: an own one. stack: "" or the stack's path with a dot.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        norm: Norm | None,
        padded_vocab: int,
        env: Env,
        *,
        shared: bool = False,
        token: TokenEmbedding | None = None,
        stack: str = "",
    ) -> None:
        super().__init__()
        self.token = TokenEmbedding(cfg, padded_vocab, env, shared=shared) if token is None else token
        self.segment = SegmentEmbedding(cfg, env) if cfg.segments else None
        self.position = PositionEmbedding(cfg, env) if cfg.positions in ("learned", "sinusoidal") else None
        self.norm = norm_or_identity(norm, "embedding", 1, cfg.width, env)
        self.dropout = Dropout(cfg.dropout, env, f"{stack}embed", local=env.mesh.sequence_parallel)
        self.scale = cfg.width**0.5 if cfg.embedding_scale == "sqrt_width" else float(cfg.embedding_scale)

    def forward(self, tokens: Tensor, positions: Tensor, segments: Tensor | None = None) -> Tensor:
        """segments: token types [s, b]; None: all 0."""
        x = self.token(tokens)
        if self.scale != 1.0:
            x = x * self.scale
        if self.position is not None:
            x = x + self.position(positions).to(x.dtype)
        if self.segment is not None:
            x = x + self.segment(torch.zeros_like(tokens) if segments is None else segments)
        return self.dropout(self.norm(x))


class Head(nn.Module):
    """[s, b, d] -> this rank's logits [s, b, padded v / tp], scaled and capped. tied: the token embedding's weight, or None."""

    def __init__(self, cfg: ModelConfig, padded_vocab: int, env: Env, tied: nn.Parameter | None) -> None:
        super().__init__()
        self.mesh, self.scale, self.cap = env.mesh, cfg.logit_scale, cfg.logit_softcap
        self.vocab_size, self.token_loss = cfg.vocab_size, token_loss(env)
        matrix, rows = vocabulary_matrix("head", cfg, padded_vocab, env.mesh.tp, width=cfg.width)
        self.first, self.logical = matrix.offset[0], matrix.local[0]
        self.weight = parameter(env.full((rows, cfg.width), 0.0), Layout((matrix,))) if tied is None else tied
        self.bias: nn.Parameter | None = None
        if cfg.head_bias:
            held, _ = vocabulary_matrix("bias", cfg, padded_vocab, env.mesh.tp, width=None)
            self.bias = parameter(env.full((rows,), 0.0), Layout((held,)))

    def forward(self, x: Tensor, where: Tensor | None = None) -> Tensor:
        """where: [n] int64, the places of s * b that are asked for, so that the result is [n, 1, v / tp]; None: all."""
        tp = self.mesh.tp
        x = gather_sequence(x, tp) if self.mesh.sequence_parallel else copy_to(x, tp)
        x = x if where is None else x.flatten(0, 1).index_select(0, where).unsqueeze(1)
        z = F.linear(x, self.weight, self.bias)
        z = z if self.scale == 1.0 else z * self.scale
        return z if self.cap is None else self.cap * torch.tanh(z / self.cap)

    def token_losses(self, x: Tensor, labels: Tensor, smoothing: float, where: Tensor | None = None) -> Tensor:
        """[s, b, d] and labels [s, b] -> [s, b] in fp32 (fp64 for fp64). where: as in ``forward``; the result is [n, 1]."""
        tp, v = self.mesh.tp, self.vocab_size
        logits = self(x, where)  # not by forward: hooks wait for the weights
        labels = labels if where is None else labels.flatten()[where].unsqueeze(1)
        if smoothing == 0.0:
            return self.token_loss(logits, labels, self.first, self.logical, tp)
        return cross_entropy(logits, labels, self.first, self.logical, tp, smoothing=smoothing, vocab_size=v)


def full_logits(local: Tensor, head: Head, vocab_size: int) -> Tensor:
    """Local logits of every rank -> [s, b, v] without padding, on every rank; no gradient. For evaluation and tests."""
    tp = head.mesh.tp
    gathered = all_gather(local.movedim(-1, 0).contiguous(), tp).movedim(0, -1)
    return gathered[..., :vocab_size]
