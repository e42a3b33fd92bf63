"""What a loader hands to a training step."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Batch:
    """One micro-batch of one data-parallel rank; s: sequence, b: rows.

    tokens, labels: [s, b] int64; labels[t] is the token to predict at t, already shifted.
    loss_mask: [s, b] float32, the weight of each position in the loss. positions: [s, b] int64, None: 0 .. s-1.
    Packed rows: b = 1 and s = rows x sequence_length; cu_seqlens [documents + 1] int32 says where each document piece
    begins, max_seqlen the longest piece. Attention must not cross these borders.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    positions: Tensor | None = None
    cu_seqlens: Tensor | None = None
    max_seqlen: int | None = None

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""

        def move(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.to(device, non_blocking=True)

        return Batch(
            self.tokens.to(device, non_blocking=True),
            self.labels.to(device, non_blocking=True),
            self.loss_mask.to(device, non_blocking=True),
            move(self.positions),
            move(self.cu_seqlens),
            self.max_seqlen,
        )


@dataclass
class MaskedBatch(Batch):
    """Rows with some tokens corrupted, for a masked language model: labels stand at their own places."""


@dataclass
class PairBatch:
    """Source and target sequences of an encoder-decoder; s: source, t: target length, b: rows.

    source: [s, b] int64; source_mask: [s, b] float32, 1 where there is a token. tokens, labels: [t, b] int64, the
    decoder's input (start token first) and what it is to say; loss_mask: [t, b] float32.
    """

    source: Tensor
    source_mask: Tensor
    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor


@dataclass
class ClassBatch:
    """Sequences with a class each. tokens: [s, b] int64; mask: [s, b] float32; segments: [s, b] int64; classes: [b] int64, or
    float32 for regression."""

    tokens: Tensor
    mask: Tensor
    segments: Tensor
    classes: Tensor
