"""Pairs of sequences, such as translations: bucketed by length to a number of tokens a batch."""

import bisect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megnorm.data.batch import PairBatch
from megnorm.data.config import MULTIPLE, DataConfig, padded_length
from megnorm.data.errors import DataError, require_same
from megnorm.data.languages import drawn, open_directions
from megnorm.data.samples import key, own_samples

POOL = 100  # buckets that are sorted by length together


def collate(
    sources: Sequence[NDArray[np.int64]],
    targets: Sequence[NDArray[np.int64]],
    *,
    start: int | Sequence[int],
    pad: int,
) -> PairBatch:
    """Pad to the longest; the decoder reads start (of all, or of each) and then its labels up to the last but one."""

    def pack(rows: Sequence[NDArray[np.int64]]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        longest = padded_length(max(len(row) for row in rows))
        out, mask = np.full((longest, len(rows)), pad, np.int64), np.zeros((longest, len(rows)), np.float32)
        for column, row in enumerate(rows):
            out[: len(row), column], mask[: len(row), column] = row, 1.0
        return out, mask

    (source, source_mask), (labels, loss_mask) = pack(sources), pack(targets)
    tokens = np.where(loss_mask > 0, np.vstack([np.full((1, labels.shape[1]), start), labels[:-1]]), pad)
    return PairBatch(*(torch.from_numpy(array) for array in (source, source_mask, tokens, labels, loss_mask)))


class PairLoader:
    """Pairs out of two data sets with the same documents, as ``preprocess --keys`` writes them, for one language or several.

    A sample is one bucket: pairs of like length, of at most data.pairs.tokens_per_batch padded tokens. ``dropped`` counts
    pairs that were left out: longer than data.pairs.longest, or with an empty side. Pairs are numbered over all directions.
    """

    def __init__(
        self,
        config: DataConfig,
        split: str,
        *,
        sequence_length: int,
        seed: int,
        vocab_size: int,
        samples: int | None = None,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        options = config.pairs
        self.seed, self.options = seed, options
        self.pad, self.start = config.pad, config.pad if config.start is None else config.start
        if options.tokens_per_batch < padded_length(options.longest):
            raise DataError(
                f"data.pairs.tokens_per_batch={options.tokens_per_batch} cannot hold a pair of data.pairs.longest="
                f"{options.longest} tokens, padded to a multiple of {MULTIPLE}: raise the one or lower the other."
            )
        if not 0 <= max(self.pad, self.start) < vocab_size:
            raise DataError(
                f"data.pad={self.pad} and data.start={self.start} must be below {vocab_size}, model.vocab_size."
            )
        self.directions = open_directions(config, own_paths(config, split), vocab_size)
        largest = max(-1 if one.tag is None else one.tag for one in self.directions)
        if largest >= vocab_size:
            raise DataError(f"data.pairs.tag is token id {largest}, model.vocab_size is {vocab_size}: make it larger.")
        self.firsts = np.array([one.first for one in self.directions])
        self.sizes = np.concatenate([one.sizes for one in self.directions])
        self.kept = np.concatenate([one.first + one.kept for one in self.directions])
        self.dropped = sum(one.dropped for one in self.directions)
        self._epoch: tuple[int, list[NDArray[np.int64]]] | None = None
        self._ends: list[int] = []  # buckets in all epochs up to each
        if state is not None:
            require_same(state, self._fixed())

    def _fixed(self) -> dict[str, Any]:
        options, tags = self.options, [one.tag for one in self.directions]
        return {
            "task": "pairs",
            "seed": self.seed,
            "tokens_per_batch": options.tokens_per_batch,
            "longest": options.longest,
            "content": [side.identity() for one in self.directions for side in (one.source, one.target)],
            # A single direction without a tag has the state that it always had.
            "mixture": None if tags == [None] else [options.temperature, options.tag_on, tags],
        }

    def buckets(self, epoch: int) -> list[NDArray[np.int64]]:
        """Numbers of the pairs in every bucket of an epoch: shuffled, sorted by length in pools, cut, shuffled again."""
        kept = self._epoch
        if kept is None or kept[0] != epoch:
            random = np.random.RandomState(key(self.seed, "pairs", epoch) % 2**32)
            order = random.permutation(drawn(self.directions, self.options.temperature, self.seed, epoch))
            pool = max(1, POOL * self.options.tokens_per_batch // int(self.sizes[self.kept].mean() + 1))
            found: list[NDArray[np.int64]] = []
            for first in range(0, len(order), pool):
                part = order[first : first + pool]
                found += self._cut(part[np.argsort(self.sizes[part], kind="stable")])
            kept = self._epoch = epoch, [found[i] for i in random.permutation(len(found))]
        return kept[1]

    def _cut(self, ordered: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Buckets out of documents in order of their length."""
        padded = -(-self.sizes[ordered] // MULTIPLE) * MULTIPLE
        found, first = [], 0
        while first < len(ordered):
            fits = np.arange(1, len(ordered) - first + 1) * padded[first:] <= self.options.tokens_per_batch
            count = len(fits) if fits.all() else int(np.argmin(fits))
            found.append(ordered[first : first + count])
            first += count
        return found

    def samples(self) -> int:
        """Buckets in the first epoch; their number varies a little between epochs."""
        return len(self.buckets(0))

    def _bucket(self, sample: int) -> NDArray[np.int64]:
        """The pairs of a bucket, counted over all epochs."""
        while not self._ends or sample >= self._ends[-1]:
            self._ends.append((self._ends[-1] if self._ends else 0) + len(self.buckets(len(self._ends))))
        epoch = bisect.bisect_right(self._ends, sample)
        return self.buckets(epoch)[sample - (self._ends[epoch - 1] if epoch else 0)]

    def batch(self, first_sample: int, count: int, dp_rank: int = 0, dp_size: int = 1) -> list[PairBatch]:
        """The buckets of one data-parallel rank."""
        return [self._pairs(sample) for sample in own_samples(first_sample, count, dp_rank, dp_size).tolist()]

    def _pairs(self, sample: int) -> PairBatch:
        """A bucket; its pairs may be of several directions."""
        bucket = self._bucket(sample)
        sources, targets, starts = [], [], []
        places = np.searchsorted(self.firsts, bucket, side="right") - 1
        for number, place in zip(bucket.tolist(), places.tolist(), strict=True):
            one = self.directions[place]
            source, target = (
                np.concatenate(side.document(number - one.first)).astype(np.int64) for side in (one.source, one.target)
            )
            start = self.start
            if one.tag is not None and self.options.tag_on == "target":
                start = one.tag
            elif one.tag is not None:
                source = np.concatenate([[one.tag], source])
            sources.append(source)
            targets.append(target)
            starts.append(start)
        return collate(sources, targets, start=starts, pad=self.pad)

    def state(self, consumed_samples: int) -> dict[str, Any]:
        """JSON for a checkpoint."""
        return {**self._fixed(), "samples": consumed_samples}


def own_path(config: DataConfig, split: str) -> str:
    """The one path of a split, for tasks whose splits are files of their own."""
    paths = own_paths(config, split)
    if len(paths) > 1:
        name = "path" if split == "train" else split
        raise DataError(
            f"data.{name} has {len(paths)} entries, data.task={config.task} takes one: join them (megnorm data merge)."
        )
    return paths[0]


def own_paths(config: DataConfig, split: str) -> tuple[str, ...]:
    """The paths of a split that is not cut out of another."""
    given = {"train": config.path, "valid": config.valid, "test": config.test}[split]
    paths = (given,) if isinstance(given, str) else tuple(given)
    if not paths:
        name = "path" if split == "train" else split
        remedy = ", or set train.eval_batches=0 to train without evaluation" if split == "valid" else ""
        raise DataError(
            f"data.{name} is empty: data.task={config.task} takes each split from a path of its own{remedy}."
        )
    return paths
