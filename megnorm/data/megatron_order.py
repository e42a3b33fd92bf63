"""Megatron's GPT sample order, for users who go on with a run begun there; sources and formats as in its documentation.

One numpy RandomState draws, in this order, the shuffle of the documents and the shuffle of the samples.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from megnorm.data.blending import Indices, blend_indices, blend_sizes
from megnorm.data.cache import cached
from megnorm.data.config import DataConfig
from megnorm.data.errors import DataError
from megnorm.data.indexed import IndexedDataset
from megnorm.data.samples import by_source, too_few
from megnorm.data.storage import is_remote

CHUNK = 1 << 14  # sequences whose samples are cut at a time
WIDE = 1 << 26  # up to so many, numbers are shuffled in 64 bits: numpy needs two thirds of the time for these
SEPARATE = 0.80  # a last epoch that is used by less than this is shuffled on its own


def split_sequences(data: IndexedDataset, fractions: tuple[float, float]) -> tuple[int, int]:
    """First and last sequence of a split."""
    return round(fractions[0] * float(len(data))), round(fractions[1] * float(len(data)))


def gpt_indices(
    lengths: NDArray[Any],
    first: int,
    last: int,
    *,
    length: int,
    seed: int,
    samples: int | None,
    drop_last: bool = True,
    extra: int = 1,
) -> Indices:
    """document_index [epochs x sequences], sample_index [N + 1, 2] (place in it, offset), shuffle_index [N].

    lengths: of all sequences; first, last: the split's. samples None: one epoch. extra: tokens by which consecutive
    samples overlap (0 or 1). drop_last False keeps a last sample that is shorter than the others.
    """
    tokens = int(lengths[first:last].sum(dtype=np.int64))
    if tokens <= extra or (drop_last and samples is None and tokens < length + extra):
        raise DataError(
            f"this split has {tokens} tokens, too few for one sample of {length}: change data.split, use more data or "
            "shorter sequences."
        )
    if last > np.iinfo(np.int32).max:
        raise DataError(f'order "megatron" counts sequences in 32 bits, here are {last}: use order "default".')
    epochs = 1 if samples is None else max(1, -(-(samples * length + extra) // tokens))
    before_last = ((epochs - 1) * tokens - extra) // length
    separate = (
        epochs > 1 and samples is not None and samples - before_last < int(SEPARATE * ((tokens - extra) // length))
    )
    random = np.random.RandomState(seed)
    order = []
    for part in (epochs - 1, 1) if separate else (epochs,):
        sequences = np.empty((part, last - first), np.int64 if part * (last - first) <= WIDE else np.int32)
        sequences[:] = np.arange(first, last, dtype=np.int32)
        random.shuffle(flat := sequences.reshape(-1))
        order.append(flat.astype(np.int32, copy=False))
    document_index = np.concatenate(order) if separate else order[0]
    elements = epochs * tokens - extra
    total = elements // length if drop_last else -(-elements // length)
    sample_index = _cut(lengths, document_index, min(total * length, elements), total, length, extra)
    shuffle_index = np.arange(total)
    head = before_last if separate else total
    random.shuffle(shuffle_index[:head])
    if head < total:
        random.shuffle(shuffle_index[head:])
    kind = np.uint32 if total < np.iinfo(np.uint32).max - 1 else np.int64
    return {
        "document_index": document_index,
        "sample_index": sample_index,
        "shuffle_index": shuffle_index.astype(kind, copy=False),
    }


def _cut(
    lengths: NDArray[Any], order: NDArray[np.int32], last: int, total: int, length: int, extra: int
) -> NDArray[Any]:
    """Where samples 0 .. total begin, from the cumulative lengths of the sequences in order; ``last`` is the last cut.

    CHUNK sequences at a time: what belongs to them stays in the processor's cache, which halves the time, and memory is
    that of the result.
    """
    out = np.empty((total + 1, 2), np.int32 if len(order) <= np.iinfo(np.int32).max else np.int64)
    # In the file they are not aligned, and take would copy them all in each turn.
    lengths = np.require(lengths, requirements="A")
    side: Literal["left", "right"] = "right" if extra else "left"
    tokens = found = 0
    for start in range(0, len(order), CHUNK):
        sizes = lengths.take(order[start : start + CHUNK])  # in half the time of lengths[...]
        ends = np.cumsum(sizes, dtype=np.int64)
        ends += tokens
        place = int(np.searchsorted(ends, last, side=side))
        if place < len(ends):
            out[total] = start + place, last - (ends[place] - sizes[place])
            last = np.iinfo(np.int64).max  # found: no later chunk may hold it again
        before = (ends + (length - extra - found * length)) // length  # cuts of this chunk up to each end
        stop = min(found + int(before[-1]), total)
        places = np.cumsum(np.bincount(before, minlength=stop - found)[: stop - found])
        out[found:stop, 0] = places + start
        out[found:stop, 1] = np.arange(found * length, stop * length, length) - (ends[places] - sizes[places])
        tokens, found = int(ends[-1]), stop
    out[0] = 0
    return out


class GPTSamples:
    """Samples of one data set. pad: what follows a last sample that is short, -1 as there."""

    def __init__(self, data: IndexedDataset, indices: Indices, length: int, *, extra: int = 1, pad: int = -1) -> None:
        self.data, self.length, self.extra, self.pad = data, length, extra, pad
        self.documents, self.cuts, self.shuffle = (
            indices[name] for name in ("document_index", "sample_index", "shuffle_index")
        )

    def __len__(self) -> int:
        return len(self.shuffle)

    def pieces(self, numbers: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Where samples lie, by their numbers in shuffled order: first element in .bin and count of every piece, and the
        place of each sample's first piece among them."""
        samples = self.shuffle[numbers].astype(np.int64)
        first, begin = self.cuts[samples].astype(np.int64).T
        last, end = self.cuts[samples + 1].astype(np.int64).T
        many = last - first + 1
        heads = np.cumsum(many) - many
        sequences = self.documents[np.arange(many.sum()) - np.repeat(heads - first, many)]
        starts = self.data.pointers[sequences] // self.data.dtype.itemsize
        counts = self.data.lengths[sequences].astype(np.int64)
        counts[heads + many - 1] = end + self.extra
        counts[heads] -= begin
        starts[heads] += begin
        return starts, counts, heads

    def read(self, numbers: NDArray[Any]) -> NDArray[np.int64]:
        """Tokens [len(numbers), L + extra], padded where a sample is shorter."""
        starts, counts, heads = self.pieces(numbers)
        flat = self.data.read_many(starts, counts)
        width = self.length + self.extra
        if len(flat) == len(heads) * width:
            return flat.reshape(-1, width).astype(np.int64)
        out = np.full((len(heads), width), self.pad, np.int64)
        out[np.arange(width) < np.add.reduceat(counts, heads)[:, None]] = flat
        return out

    def __getitem__(self, number: int) -> NDArray[np.int64]:
        row: NDArray[np.int64] = self.read(np.array([number]))[0]
        return row


class MegatronOrder:
    """Rows by sample id in Megatron's order, for one data set or a blend.

    samples: how many the whole run takes; it decides the order of all of them, so a run that goes on (state) keeps the
    number it began with.
    """

    def __init__(
        self,
        config: DataConfig,
        split: str,
        data: Sequence[IndexedDataset],
        length: int,
        seed: int,
        samples: int | None,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self.asked = samples if state is None else state["asked"]
        if self.asked is None and len(data) > 1:
            raise DataError(
                'order "megatron" needs to know how many samples a blend is asked for: give the loader samples=.'
            )
        self.length, weights = length, self._weights(config, split, data)
        asked = [self.asked] if len(data) == 1 else list(blend_sizes(weights, self.asked or 0))
        ranges = [split_sequences(one, config.fractions(split)) for one in data]
        self.sources = [[one.identity(), *map(int, ends)] for one, ends in zip(data, ranges, strict=True)]
        self.weights = weights
        if state is not None and (state["sources"], state["weights"]) != (self.sources, weights):
            raise DataError(
                'order "megatron" cannot change its data in the middle of a run: put data.path, data.weights and data.split '
                "back, or start a new run from the weights alone (checkpoint.init_from)."
            )
        self.parts = []
        for one, count, (first, last) in zip(data, asked, ranges, strict=True):
            what = {"length": length, "seed": seed, "samples": count, "first": first, "last": last}
            tokens = int(one.lengths[first:last].sum(dtype=np.int64))
            if tokens < 2 or (count is None and tokens < length + 1):
                raise too_few(one.prefix, split, tokens, length)
            self.parts.append(GPTSamples(one, cached_indices(config.cache, one, what), length))
        self.blend = None
        if len(data) > 1:
            self.blend = cached(
                config.cache,
                _name("blend", {"weights": weights, "samples": self.asked}),
                lambda: blend_indices(weights, self.asked or 0),
            )
        if samples is not None and samples > self.samples:
            raise DataError(
                f'order "megatron" was made for the {self.asked} samples with which this run began, its index holds '
                f"{self.samples}, now {samples} are asked for, which would change the order of all: keep train.steps x "
                'train.global_batch, or start a new run from the weights alone (checkpoint.init_from); order "default" '
                "has no such bound."
            )

    @staticmethod
    def _weights(config: DataConfig, split: str, data: Sequence[IndexedDataset]) -> list[float]:
        if config.epochs:
            raise DataError('data.epochs belongs to order "default": give data.weights with order "megatron".')
        given = list(config.weights) if len(config.weights) == len(data) else []
        if config.weights and not given:
            raise DataError(
                f"data.weights has {len(config.weights)} numbers for {len(data)} paths of {split}: give one for each."
            )
        return given or [float(one.total) for one in data]

    @property
    def samples(self) -> int:
        return len(self.blend["dataset_index"]) if self.blend else len(self.parts[0])

    def _find(self, ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Data set and number in it of each id."""
        low, high = int(ids.min(initial=0)), int(ids.max(initial=-1))
        if low < 0 or high >= self.samples:
            raise DataError(
                f'sample {low if low < 0 else high} asked for, the index of order "megatron" holds {self.samples}: it is '
                "sized by the steps of the run; set train.steps to all steps."
            )
        if self.blend is None:
            return np.zeros(len(ids), np.int64), ids
        return self.blend["dataset_index"][ids].astype(np.int64), self.blend["dataset_sample_index"][ids]

    def rows(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens [len(ids), L + 1]."""
        source, number = self._find(ids)
        out = np.empty((len(ids), self.length + 1), np.int64)
        for one, mine in by_source(source):
            out[mine] = self.parts[one].read(number[mine])
        return out

    def borders(self, ids: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """For each row, the positions 1 .. L at which a new sequence begins."""
        source, number = self._find(ids)
        found: list[NDArray[np.int64]] = [np.zeros(0, np.int64)] * len(ids)
        for one, mine in by_source(source):
            _, counts, heads = self.parts[one].pieces(number[mine])
            for row, own in zip(mine.tolist(), np.split(counts, heads[1:]), strict=True):
                found[row] = np.unique(np.cumsum(own[:-1]))
        return found

    def state(self, consumed: int) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"samples": consumed, "asked": self.asked, "sources": self.sources, "weights": self.weights}


def _name(kind: str, what: dict[str, Any]) -> str:
    return f"{kind}-{hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:24]}"


def cached_indices(folder: str | None, data: IndexedDataset, what: dict[str, Any]) -> Indices:
    """The indices of one data set, from the cache if there is one."""
    path = data.prefix if is_remote(data.prefix) else str(Path(data.prefix).resolve())
    identity = {**what, "path": path, "bytes": data.idx_file.size, "stamp": data.idx_file.stamp}

    def build() -> Indices:
        sizes = {name: what[name] for name in ("length", "seed", "samples")}
        return gpt_indices(data.lengths, what["first"], what["last"], **sizes)

    return cached(folder, _name("gpt", identity), build)
