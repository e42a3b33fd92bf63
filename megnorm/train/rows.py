"""A rank's rows of a global batch, counted and cut into micro-batches as the model's family takes them."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megnorm.data.batch import Batch, ClassBatch, MaskedBatch, PairBatch
from megnorm.models.build import Input
from megnorm.models.causal import Tokens
from megnorm.models.encdec import Pairs
from megnorm.models.masked import MaskedTokens
from megnorm.parallel.collectives import all_reduce
from megnorm.train.build import Run, Samples
from megnorm.train.config import TrainConfig

Rows = Batch | PairBatch | list[PairBatch] | ClassBatch


def own_rows(run: Run, data: Samples, first_sample: int, sequences: int) -> Rows:
    """This rank's rows of a global batch of ``sequences``; padding is never a label that counts."""
    padding, dp = run.plan.config.model.padding_id, run.mesh.dp
    batch = data.batch(first_sample, sequences, dp.rank, dp.size)
    if padding is None or not isinstance(batch, Batch):
        return batch
    return replace(batch, loss_mask=batch.loss_mask * (batch.labels != padding))


def label_count(rows: Rows) -> Tensor:
    """Labels of these rows that count, a float64 scalar."""
    if isinstance(rows, ClassBatch):
        return torch.tensor(len(rows.classes), dtype=torch.float64)
    parts = rows if isinstance(rows, list) else [rows]
    return torch.stack([part.loss_mask.sum(dtype=torch.float64) for part in parts]).sum()


def global_tokens(run: Run, rows: Rows) -> int:
    return max(round(float(all_reduce(label_count(rows).to(run.mesh.device), run.mesh.dp))), 1)


def micro_batches(rows: Rows, train: TrainConfig, device: torch.device) -> Iterator[Input]:
    """``micro_batch`` sequences at a time; a bucket of pairs is one by itself."""
    if isinstance(rows, list):
        for bucket in rows:
            yield _pairs(bucket, slice(None), device)
    elif isinstance(rows, PairBatch):
        for first in range(0, rows.source.shape[1], train.micro_batch):
            yield _pairs(rows, slice(first, first + train.micro_batch), device)
    elif isinstance(rows, ClassBatch):
        for first in range(0, len(rows.classes), train.micro_batch):
            yield _classes(rows, slice(first, first + train.micro_batch), device)
    else:
        for part in _sequences(rows, train, device):
            masked = isinstance(rows, MaskedBatch)
            yield MaskedTokens(part.tokens, part.labels, part.loss_mask) if masked else part


def _pairs(batch: PairBatch, columns: slice, device: torch.device) -> Pairs:
    parts: Sequence[Tensor] = (batch.source, batch.source_mask > 0, batch.tokens, batch.labels, batch.loss_mask)
    return Pairs(*(part[:, columns].to(device, non_blocking=True) for part in parts))


def _classes(batch: ClassBatch, columns: slice, device: torch.device) -> MaskedTokens:
    sequences: Sequence[Tensor] = (batch.tokens, batch.mask > 0, batch.segments)
    tokens, real, segments = (part[:, columns].to(device, non_blocking=True) for part in sequences)
    classes = batch.classes[columns].to(device, non_blocking=True)
    return MaskedTokens(tokens, classes, torch.ones(len(classes), device=device), real=real, segments=segments)


def _sequences(batch: Batch, train: TrainConfig, device: torch.device) -> Iterator[Tokens]:
    """Packed rows (b = 1) stand one behind the other."""
    ends = None if batch.cu_seqlens is None else batch.cu_seqlens[1:].cpu()
    dim, size = (1, train.micro_batch) if ends is None else (0, train.micro_batch * train.sequence_length)
    batch = batch.to(device)
    for first in range(0, batch.tokens.shape[dim], size):
        length = min(size, batch.tokens.shape[dim] - first)
        tokens, labels, mask = (x.narrow(dim, first, length) for x in (batch.tokens, batch.labels, batch.loss_mask))
        positions = None if batch.positions is None else batch.positions.narrow(dim, first, length)
        if ends is None:
            yield Tokens(tokens, labels, mask, positions)
            continue
        inside = ends[(ends > first) & (ends <= first + length)]  # every row ends a document piece
        yield Tokens(tokens, labels, mask, positions, tuple(inside.diff(prepend=inside.new_tensor([first])).tolist()))
