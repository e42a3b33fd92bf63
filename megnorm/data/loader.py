"""From sample ids to batches: the only state is the number of samples consumed."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from megnorm.data.batch import Batch
from megnorm.data.config import DataConfig
from megnorm.data.errors import DataError
from megnorm.data.indexed import IndexedDataset
from megnorm.data.megatron_order import MegatronOrder
from megnorm.data.samples import DefaultOrder, Source, key, resume_mixture, shares, split_tokens
from megnorm.data.sidecar import read_sidecar, verify
from megnorm.data.tasks import fill_in_the_middle
from megnorm.data.tokenizer import fingerprint

SCAN = 1 << 24  # elements of a file without a sidecar that are looked at before the first batch


class Order(Protocol):
    """Rows by sample id."""

    @property
    def samples(self) -> int: ...
    def rows(self, ids: NDArray[np.int64]) -> NDArray[np.int64]: ...
    def borders(self, ids: NDArray[np.int64]) -> list[NDArray[np.int64]]: ...
    def state(self, consumed: int) -> dict[str, Any]: ...


class Loader:
    """Batches of one split for causal language models.

    split: train, valid or test. samples: how many will be asked for in all; only order "megatron" needs it.
    state: what ``state()`` of an earlier run returned, where a run goes on.
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
        self.config, self.split, self.vocab_size, self.length = config, split, vocab_size, sequence_length
        paths = config.paths(split)
        if not paths:
            raise DataError("data.path is empty: give the prefix of a .bin/.idx pair, as megnorm preprocess writes it.")
        if len(set(paths)) != len(paths):
            raise DataError("data.path names the same prefix twice: name it once and give it a larger weight.")
        self.records = {path: read_sidecar(path) for path in paths}
        if config.tokenizer is not None and not Path(config.tokenizer).exists():
            raise DataError(
                f"data.tokenizer: there is no '{config.tokenizer}'; give the tokenizer.json, or its folder, with which the "
                "token files were written."
            )
        if config.verify:
            for path in paths:
                verify(path)
        self.data = [IndexedDataset(path) for path in paths]
        for data in self.data:
            self._check_ids(data)
        self.eod, self.seed = self._find_eod() if config.mask_end else None, seed
        if config.fim_rate and len(config.fim_tokens) != 3:
            raise DataError("data.fim_tokens: give three ids, of the marks before prefix, middle and suffix.")
        if state is not None:
            self._check_state(state)
        self.order: Order = (
            MegatronOrder(config, split, self.data, sequence_length, seed, samples)
            if config.order == "megatron"
            else self._default_order(seed, state)
        )

    def _default_order(self, seed: int, state: Mapping[str, Any] | None) -> DefaultOrder:
        config, sources = self.config, []
        for path, data in zip(config.paths(self.split), self.data, strict=True):
            first, last = split_tokens(data, config.fractions(self.split))
            source = Source(path, data, first, last - first, self.length, seed)
            if source.samples < 1:
                raise DataError(
                    f"{path}: its {self.split} part has {last - first} tokens, one sample of train.sequence_length="
                    f"{self.length} needs {self.length + 1}: change data.split, use more data or shorter sequences."
                )
            sources.append(source)
        paths = [source.path for source in sources]
        return DefaultOrder(sources, resume_mixture(shares(self._weights(sources), paths), paths, state))

    def _weights(self, sources: list[Source]) -> list[float]:
        config, tokens = self.config, [float(source.tokens) for source in sources]
        given = config.weights or config.epochs
        if config.weights and config.epochs:
            raise DataError("data.weights and data.epochs are both given: give one of them.")
        if not given or (self.split != "train" and len(given) != len(sources)):
            return tokens
        if len(given) != len(sources):
            name = "weights" if config.weights else "epochs"
            raise DataError(f"data.{name} has {len(given)} numbers for {len(sources)} paths: give one for each path.")
        if min(given) < 0 or max(given) <= 0:
            raise DataError("data.weights and data.epochs must not be negative, nor all zero.")
        return list(config.weights) or [e * n for e, n in zip(config.epochs, tokens, strict=True)]

    def _check_ids(self, data: IndexedDataset) -> None:
        """Ids must be below the vocabulary, and come from the tokenizer of the config."""
        if data.dtype.kind not in "iu":
            raise DataError(f"{data.idx}: holds {data.dtype} numbers, token ids must be integers.")
        record = self.records[data.prefix] if data.prefix in self.records else read_sidecar(data.prefix)
        sizes = {"bin": data.bin.stat().st_size, "idx": data.idx.stat().st_size}
        if record is not None and any(record["files"][name]["bytes"] != size for name, size in sizes.items()):
            raise DataError(
                f"{data.prefix}: the sizes of its files are not those recorded in its .meta.json; copy all three again."
            )
        if record is not None and record.get("max_id") is not None:
            largest = int(record["max_id"])
        else:
            largest = int(data.read(0, min(SCAN, data.total)).max(initial=0))
        self._require(largest, data.prefix)
        written = (record or {}).get("tokenizer")
        if written and self.config.tokenizer:
            given = fingerprint(self.config.tokenizer)
            if given["sha256"] != written["sha256"]:
                raise DataError(
                    f"{data.prefix} was written with tokenizer {written['name']}, data.tokenizer="
                    f"{self.config.tokenizer} is another one: name the tokenizer of the data, or preprocess "
                    "the text again with this one."
                )

    def _require(self, largest: int, where: str) -> None:
        if largest >= self.vocab_size:
            raise DataError(
                f"{where}: holds token id {largest}, model.vocab_size is {self.vocab_size}: the data were written with "
                "another tokenizer; set model.vocab_size to that of the tokenizer, or preprocess again."
            )

    def _find_eod(self) -> int:
        known = {record["eod"] for record in self.records.values() if record and record.get("eod") is not None}
        if self.config.eod is not None:
            return self.config.eod
        if len(known) != 1:
            raise DataError(
                "data.eod is needed for data.mask_end: the files do not record one id of the end of a document."
            )
        return int(known.pop())

    def _check_state(self, state: Mapping[str, Any]) -> None:
        for name, now in (("order", self.config.order), ("sequence_length", self.length)):
            if state[name] != now:
                raise DataError(
                    f"the checkpoint's data state has {name} {state[name]}, the config {now}: samples would repeat "
                    "or be skipped; keep it, or start a new run from the weights alone."
                )

    def samples(self) -> int:
        """Samples in one epoch of this split (order "megatron": in its whole index)."""
        return self.order.samples

    def batch(self, first_sample: int, count: int, dp_rank: int = 0, dp_size: int = 1) -> Batch:
        """Rows of one data-parallel rank: count/dp_size ids from first_sample + dp_rank x count/dp_size on."""
        if count % dp_size:
            raise DataError(
                f"a batch of {count} sequences cannot be dealt to {dp_size} data-parallel ranks: make it a multiple."
            )
        rows = count // dp_size
        ids = first_sample + dp_rank * rows + np.arange(rows, dtype=np.int64)
        tokens = self.order.rows(ids)
        if self.config.fim_rate:
            self._fill_in_the_middle(tokens, ids)
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.vocab_size:
            self._require(high, f"{self.split} samples {ids[0]} to {ids[-1]}")
            raise DataError(
                f"{self.split} samples {ids[0]} to {ids[-1]}: token id {low} is negative; run megnorm data verify."
            )
        mask = np.ones((rows, self.length), np.float32)
        if self.eod is not None:
            mask[tokens[:, :-1] == self.eod] = 0.0
        if self.config.separate_documents:
            return self._packed(tokens, mask, self.order.borders(ids))
        positions = None
        if self.config.reset_positions:
            places = _positions(self.order.borders(ids), self.length)
            positions = torch.from_numpy(places).t()
        whole = torch.from_numpy(tokens).t()
        return Batch(whole[:-1], whole[1:], torch.from_numpy(mask).t(), positions)

    def _fill_in_the_middle(self, tokens: NDArray[np.int64], ids: NDArray[np.int64]) -> None:
        """Rearrange pieces of documents, each row by the seed and its id."""
        for row, number, inside in zip(tokens, ids.tolist(), self.order.borders(ids), strict=True):
            random = np.random.RandomState(key(self.seed, "fim", number) % 2**32)
            for piece in np.split(row, inside):
                if random.random_sample() < self.config.fim_rate:
                    piece[:] = fill_in_the_middle(piece, random, self.config.fim_tokens, self.config.fim_spm)

    def _packed(self, tokens: NDArray[np.int64], mask: NDArray[np.float32], borders: list[NDArray[np.int64]]) -> Batch:
        """All rows in one: documents never predict, nor see, the next one."""
        starts = [np.zeros(0, np.int64)]
        for row, inside in enumerate(borders):
            mask[row, inside - 1] = 0.0
            starts.append(row * self.length + np.concatenate([[0], inside[inside < self.length]]))
        ends = np.append(np.concatenate(starts), len(tokens) * self.length)
        flat = torch.from_numpy(_positions(borders, self.length).reshape(-1, 1))
        return Batch(
            torch.from_numpy(tokens[:, :-1].reshape(-1, 1)),
            torch.from_numpy(tokens[:, 1:].reshape(-1, 1)),
            torch.from_numpy(mask.reshape(-1, 1)),
            flat,
            torch.from_numpy(ends.astype(np.int32)),
            int(np.diff(ends).max()),
        )

    def state(self, consumed_samples: int) -> dict[str, Any]:
        """JSON for a checkpoint: what each source has given once ``consumed_samples`` samples are used."""
        state = self.order.state(consumed_samples)
        json.dumps(state)
        return state


def _positions(borders: list[NDArray[np.int64]], length: int) -> NDArray[np.int64]:
    """Positions [rows, length] that start again at every document."""
    out = np.tile(np.arange(length, dtype=np.int64), (len(borders), 1))
    for row, inside in enumerate(borders):
        for begin in inside[inside < length]:
            out[row, begin:] = np.arange(length - begin)
    return out
