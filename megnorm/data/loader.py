"""From sample ids to batches: the only state is the number of samples consumed."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from megnorm.data.batch import Batch
from megnorm.data.config import DataConfig
from megnorm.data.errors import DataError, require_same
from megnorm.data.indexed import SCAN, IndexedDataset, strip_suffix
from megnorm.data.megatron_order import MegatronOrder
from megnorm.data.samples import DefaultOrder, Source, key, own_samples, resume_order, shares, split_tokens, too_few
from megnorm.data.sidecar import read_sidecar, verify
from megnorm.data.tasks import fill_in_the_middle
from megnorm.data.tokenizer import fingerprint, is_there


class Order(Protocol):
    """Rows by sample id."""

    @property
    def samples(self) -> int: ...
    def rows(self, ids: NDArray[np.int64]) -> NDArray[np.int64]: ...
    def borders(self, ids: NDArray[np.int64]) -> list[NDArray[np.int64]]: ...
    def state(self, consumed: int) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Tokens:
    """Token files that suit the model. record: their sidecar, empty where there is none."""

    data: IndexedDataset
    record: Mapping[str, Any]


def open_tokens(path: str, config: DataConfig, vocab_size: int) -> Tokens:
    """Open a prefix; its ids must be below the vocabulary, and come from the tokenizer of the config."""
    path = strip_suffix(path)
    record = read_sidecar(path) or {}
    if config.tokenizer is not None and not is_there(config.tokenizer):
        raise DataError(
            f"data.tokenizer: there is no '{config.tokenizer}'; give the tokenizer.json, or its folder, with which the "
            "token files were written."
        )
    if config.verify:
        verify(path)
    data = IndexedDataset(path, cache=config.cache)
    if data.dtype.kind not in "iu":
        raise DataError(f"{data.idx}: holds {data.dtype} numbers, token ids must be integers.")
    sizes = {"bin": data.bin_file.size, "idx": data.idx_file.size}
    if record and any(record["files"][name]["bytes"] != size for name, size in sizes.items()):
        raise DataError(
            f"{data.prefix}: the sizes of its files are not those recorded in its .meta.json; copy all three again."
        )
    known = record.get("max_id")
    _require(data.largest(SCAN) if known is None else int(known), vocab_size, data.prefix)
    written = record.get("tokenizer")
    if written and config.tokenizer and fingerprint(config.tokenizer)["sha256"] != written["sha256"]:
        raise DataError(
            f"{data.prefix} was written with tokenizer {written['name']}, data.tokenizer={config.tokenizer} is another one: "
            "name the tokenizer of the data, or preprocess the text again with this one."
        )
    return Tokens(data, record)


def _require(largest: int, vocab_size: int, where: str) -> None:
    if largest >= vocab_size:
        raise DataError(
            f"{where}: holds token id {largest}, model.vocab_size is {vocab_size}: the data were written with another "
            "tokenizer; set model.vocab_size to that of the tokenizer, or preprocess again."
        )


class Loader:
    """Batches of one split for causal language models.

    split: train, valid or test. samples: how many will be asked for in all; only order "megatron" needs it.
    state: what ``state()`` of an earlier run returned, where a run goes on. framing: tokens by which a task lengthens the
    rows itself, to sequence_length.
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
        framing: int = 0,
    ) -> None:
        self.config, self.split, self.vocab_size, self.seed = config, split, vocab_size, seed
        self.sequence_length, self.length = sequence_length, sequence_length - framing
        paths = config.paths(split)
        if not paths:
            raise DataError("data.path is empty: give the prefix of a .bin/.idx pair, as megnorm preprocess writes it.")
        if len(set(paths)) != len(paths):
            raise DataError("data.path names the same prefix twice: name it once and give it a larger weight.")
        self.opened = [open_tokens(path, config, vocab_size) for path in paths]
        self.eod = self.end_of_document() if config.mask_end or config.fim_rate else None
        self._check_fim()
        if state is not None:
            require_same(state, self._fixed())
        self.order: Order = (
            MegatronOrder(config, split, [one.data for one in self.opened], self.length, seed, samples, state)
            if config.order == "megatron"
            else self._default_order(seed, state)
        )

    def _default_order(self, seed: int, state: Mapping[str, Any] | None) -> DefaultOrder:
        config, sources = self.config, []
        for path, tokens in zip(config.paths(self.split), self.opened, strict=True):
            data = tokens.data
            first, last = split_tokens(data, config.fractions(self.split))
            source = Source(path, data.identity(), data, first, last - first, self.length, seed)
            if source.samples < 1:
                raise too_few(path, self.split, source.tokens, self.length)
            sources.append(source)
        self._check_twice(sources)
        parts = shares(self._weights(sources), [source.path for source in sources])
        return resume_order(parts, sources, state)

    @staticmethod
    def _check_twice(sources: list[Source]) -> None:
        seen: dict[str, str] = {}
        for source in sources:
            if other := seen.get(source.identity):
                raise DataError(
                    f"data.path: {other} and {source.path} hold the same data: name them once and give them a larger weight."
                )
            seen[source.identity] = source.path

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

    def _check_fim(self) -> None:
        rate, marks = self.config.fim_rate, self.config.fim_tokens
        for name, share in (("fim_rate", rate), ("fim_spm", self.config.fim_spm)):
            if not 0.0 <= share <= 1.0:
                raise DataError(f"data.{name} is {share}: give a share from 0 to 1.")
        if rate and len(marks) != 3:
            raise DataError("data.fim_tokens: give three ids, of the marks before prefix, middle and suffix.")
        if rate and not all(0 <= mark < self.vocab_size for mark in marks):
            raise DataError(f"data.fim_tokens={list(marks)}: ids must be below model.vocab_size={self.vocab_size}.")

    def end_of_document(self) -> int:
        """The id of the end-of-document token."""
        known = {one.record["eod"] for one in self.opened if one.record.get("eod") is not None}
        if self.config.eod is not None:
            return self.config.eod
        if len(known) != 1:
            raise DataError("data.eod is needed: the files do not record one id of the end of a document.")
        return int(known.pop())

    def _fixed(self) -> dict[str, Any]:
        """What may not change in the middle of a run."""
        now = {"task": self.config.task, "order": self.config.order, "sequence_length": self.sequence_length}
        return {**now, "seed": self.seed, "row": self.length}

    def samples(self) -> int:
        """Samples in one epoch of this split (order "megatron": in its whole index)."""
        return self.order.samples

    def batch(self, first_sample: int, count: int, dp_rank: int = 0, dp_size: int = 1) -> Batch:
        """Rows of one data-parallel rank: count/dp_size ids from first_sample + dp_rank x count/dp_size on."""
        ids = own_samples(first_sample, count, dp_rank, dp_size)
        rows = len(ids)
        tokens = self.order.rows(ids)
        if self.config.fim_rate:
            self._fill_in_the_middle(tokens, ids)
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.vocab_size:
            _require(high, self.vocab_size, f"{self.split} samples {ids[0]} to {ids[-1]}")
            raise DataError(
                f"{self.split} samples {ids[0]} to {ids[-1]}: token id {low} is negative; run megnorm data verify."
            )
        mask = np.ones((rows, self.length), np.float32)
        if self.config.mask_end:
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
                piece = piece[:-1] if piece[-1] == self.eod else piece  # a document's end stays its end
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
        state = {**self._fixed(), **self.order.state(consumed_samples)}
        json.dumps(state)
        return state


def _positions(borders: list[NDArray[np.int64]], length: int) -> NDArray[np.int64]:
    """Positions [rows, length] that start again at every document."""
    begins = np.zeros((len(borders), length), np.int64)  # at each place, where its document begins
    for row, inside in enumerate(borders):
        inside = inside[inside < length]
        begins[row, inside] = inside
    positions: NDArray[np.int64] = np.arange(length) - np.maximum.accumulate(begins, axis=1)
    return positions
