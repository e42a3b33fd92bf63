"""Pairs of sequences, such as translations: bucketed by length to a number of tokens a batch."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from megnorm.data.batch import PairBatch
from megnorm.data.errors import DataError
from megnorm.data.indexed import IndexedDataset
from megnorm.data.samples import key

POOL = 100  # batches that are sorted by length together
MULTIPLE = 8  # padded lengths are multiples of it


def collate(
    sources: Sequence[NDArray[np.int64]], targets: Sequence[NDArray[np.int64]], *, start: int, pad: int
) -> PairBatch:
    """Pad to the longest; the decoder reads start and then its labels up to the last but one."""

    def pack(rows: Sequence[NDArray[np.int64]]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        longest = -(-max(len(row) for row in rows) // MULTIPLE) * MULTIPLE
        out, mask = np.full((longest, len(rows)), pad, np.int64), np.zeros((longest, len(rows)), np.float32)
        for column, row in enumerate(rows):
            out[: len(row), column], mask[: len(row), column] = row, 1.0
        return out, mask

    (source, source_mask), (labels, loss_mask) = pack(sources), pack(targets)
    tokens = np.where(loss_mask > 0, np.vstack([np.full((1, labels.shape[1]), start), labels[:-1]]), pad)
    return PairBatch(*(torch.from_numpy(array) for array in (source, source_mask, tokens, labels, loss_mask)))


class PairLoader:
    """Pairs out of two data sets with the same documents, as ``preprocess --keys`` writes them.

    tokens_per_batch: most padded tokens of a batch, counted on its longer side, over all data-parallel ranks.
    multiple: batches hold a multiple of so many pairs (make it a multiple of the data-parallel size). longest: pairs with
    a longer side are left out, and counted in ``dropped`` with those that have an empty side.
    """

    def __init__(
        self,
        source: str,
        target: str,
        *,
        tokens_per_batch: int,
        seed: int,
        vocab_size: int,
        start: int,
        pad: int,
        longest: int = 512,
        multiple: int = 1,
    ) -> None:
        self.source, self.target = IndexedDataset(source), IndexedDataset(target)
        if self.source.document_count != self.target.document_count:
            raise DataError(
                f"{source} has {self.source.document_count} documents, {target} {self.target.document_count}: write both with "
                "one run of megnorm preprocess, so that they stay side by side."
            )
        for data in (self.source, self.target):
            if data.total and int(data.tokens.max()) >= vocab_size:
                raise DataError(f"{data.prefix}: holds token id {data.tokens.max()}, model.vocab_size is {vocab_size}.")
        if tokens_per_batch < multiple * longest:
            raise DataError(
                f"tokens_per_batch={tokens_per_batch} cannot hold {multiple} pairs of {longest} tokens: raise it."
            )
        self.tokens_per_batch, self.seed, self.start, self.pad, self.multiple = (
            tokens_per_batch,
            seed,
            start,
            pad,
            multiple,
        )
        sizes = [np.diff(data.document_starts()) for data in (self.source, self.target)]
        self.sizes = np.maximum(*sizes)
        self.kept = np.flatnonzero((np.minimum(*sizes) > 0) & (self.sizes <= longest))
        self.dropped = self.source.document_count - len(self.kept)
        if len(self.kept) < multiple:
            raise DataError(f"{source}: {len(self.kept)} usable pairs, a batch needs {multiple}.")
        self._epoch: tuple[int, list[NDArray[np.int64]]] | None = None

    def batches(self, epoch: int) -> list[NDArray[np.int64]]:
        """Document numbers of every batch of an epoch: shuffled, sorted by length in pools, cut, shuffled again."""
        if self._epoch is None or self._epoch[0] != epoch:
            random = np.random.RandomState(key(self.seed, "pairs", epoch) % 2**32)
            order = random.permutation(self.kept)
            pool = max(self.multiple, POOL * self.tokens_per_batch // int(self.sizes[self.kept].mean() + 1))
            found: list[NDArray[np.int64]] = []
            for first in range(0, len(order), pool):
                part = order[first : first + pool]
                found += self._cut(part[np.argsort(self.sizes[part], kind="stable")])
            self._epoch = epoch, [found[i] for i in random.permutation(len(found))]
        return self._epoch[1]

    def _cut(self, ordered: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        found, first = [], 0
        while first < len(ordered):
            count = 0
            while first + count + self.multiple <= len(ordered):
                longest = -(-int(self.sizes[ordered[first + count + self.multiple - 1]]) // MULTIPLE) * MULTIPLE
                if count and (count + self.multiple) * longest > self.tokens_per_batch:
                    break
                count += self.multiple
            if count == 0:  # fewer than `multiple` are left over: they wait for another epoch's order
                break
            found.append(ordered[first : first + count])
            first += count
        return found

    def batch(self, epoch: int, number: int, dp_rank: int = 0, dp_size: int = 1) -> PairBatch:
        """Rows of one data-parallel rank of batch ``number`` of an epoch."""
        documents = self.batches(epoch)[number]
        if len(documents) % dp_size:
            raise DataError(
                f"batches of {self.multiple} pairs cannot be dealt to {dp_size} ranks: set multiple={dp_size}."
            )
        mine = documents[dp_rank * len(documents) // dp_size : (dp_rank + 1) * len(documents) // dp_size].tolist()
        sides = [
            [np.concatenate(data.document(i)).astype(np.int64) for i in mine] for data in (self.source, self.target)
        ]
        return collate(sides[0], sides[1], start=self.start, pad=self.pad)
