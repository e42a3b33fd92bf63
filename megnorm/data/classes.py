"""Classification from TSV (header, last column the label) or JSONL: one or two texts and a class."""

import csv
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megnorm.data.batch import ClassBatch
from megnorm.data.config import DataConfig
from megnorm.data.documents import decompress
from megnorm.data.errors import DataError, require_same
from megnorm.data.pairs import own_path
from megnorm.data.samples import key, own_samples, permute
from megnorm.data.tokenizer import id_of, tokenizer_of


def read_examples(
    path: str, *, texts: tuple[str, ...] = (), label: str | None = None
) -> tuple[list[tuple[str, ...]], list[str]]:
    """Texts and label of every row. texts, label: column names; by default all columns but the last, and the last."""
    rows = _rows(path)
    if not rows:
        raise DataError(f"{path}: no rows: give a TSV with a header, or JSONL.")
    names = list(rows[0])
    texts, label = texts or tuple(names[:-1]), label or names[-1]
    for number, row in enumerate(rows):
        for name in (*texts, label):
            if not isinstance(row.get(name), str | int | (float if name == label else int)):
                raise DataError(f"{path}: row {number + 1} has no text in column {name!r}; it has {', '.join(row)}.")
    return [tuple(str(row[name]) for name in texts) for row in rows], [str(row[label]) for row in rows]


def _rows(path: str) -> list[dict[str, Any]]:
    """Rows by column name."""
    if not Path(path).is_file():
        raise DataError(f"{path}: no such file: give a TSV with a header, or JSONL.")
    try:
        with open(path, "rb") as raw:
            lines = decompress(path, raw).read().decode("utf-8").removesuffix("\n").split("\n")
    except (UnicodeDecodeError, OSError, EOFError) as error:
        raise DataError(f"{path}: cannot be read as text ({error}): mend the file.") from None
    found = []
    if ".jsonl" in Path(path).suffixes:
        for number, line in enumerate(lines, 1):
            try:
                found.append(dict(json.loads(line)))
            except (ValueError, TypeError) as error:
                raise DataError(f"{path}:{number}: not a JSON object ({error}).") from None
        return found
    table = list(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    for number, row in enumerate(table[1:], 2):
        if len(row) != len(table[0]):
            raise DataError(f"{path}:{number}: {len(row)} columns, the header has {len(table[0])}.")
        found.append(dict(zip(table[0], row, strict=True)))
    return found


def _places(labels: list[str], classes: tuple[str, ...]) -> NDArray[np.int64]:
    return np.array([classes.index(one) for one in labels], np.int64)


def _numbers(path: str, labels: list[str]) -> NDArray[np.float32]:
    try:
        found = np.array([float(one) for one in labels], np.float32)
    except ValueError as error:
        raise DataError(f"{path}: data.classes.regression takes numbers as labels ({error}).") from None
    if not np.isfinite(found).all():
        raise DataError(f"{path}: a label is not finite: leave its row out.")
    return found


class ClassLoader:
    """Batches of ``begin text end [text end]``, cut to sequence_length by shortening the longest text first.

    classes: their names in order, those of data.classes.names or of the training file; empty for regression. texts: in a row.
    types: token types that the model has, one for each text; 1: all texts have the same one, as RoBERTa's; 0: none.
    """

    types = 0

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
        path, options, tokenizer = own_path(config, split), config.classes, tokenizer_of(config)
        columns = {"texts": options.texts, "label": options.label}
        rows, labels = read_examples(path, **columns)  # type: ignore[arg-type]
        self.classes: tuple[str, ...] = ()
        if not options.regression:
            names = labels if split == "train" else read_examples(own_path(config, "train"), **columns)[1]  # type: ignore[arg-type]
            self.classes = options.names or tuple(sorted(set(names)))
            if unknown := set(labels) - set(self.classes):
                raise DataError(f"{path}: classes {sorted(unknown)} are not among {list(self.classes)}.")
        marks = [id_of(tokenizer, getattr(options, side), f"data.classes.{side}") for side in ("begin", "end")]
        self.length, self.seed, self.pad, self.path = sequence_length, seed, config.pad, path
        self.texts = len(rows[0])
        if sequence_length < 2 * len(rows[0]) + 1:
            raise DataError(f"train.sequence_length={sequence_length} has no room for {len(rows[0])} texts: raise it.")
        self.labels = _numbers(path, labels) if options.regression else _places(labels, self.classes)
        encoded = []
        for texts_of_column in zip(*rows, strict=True):
            ids, sizes = tokenizer.encode_batch(list(texts_of_column))
            encoded.append(np.split(ids.astype(np.int64), np.cumsum(sizes)[:-1]))
        self.rows = [self._join([column[i] for column in encoded], *marks) for i in range(len(rows))]
        largest = max(self.pad, *(int(tokens.max()) for tokens, _ in self.rows))
        if largest >= vocab_size:
            raise DataError(f"{path}: needs token id {largest}, model.vocab_size is {vocab_size}: make it larger.")
        if state is not None:
            require_same(state, self._fixed())

    def _fixed(self) -> dict[str, Any]:
        content = hashlib.sha256(Path(self.path).read_bytes()).hexdigest()
        return {"task": "classes", "seed": self.seed, "content": content}

    def state(self, consumed_samples: int) -> dict[str, Any]:
        """JSON for a checkpoint."""
        return {**self._fixed(), "samples": consumed_samples}

    def _join(
        self, parts: list[NDArray[np.int64]], begin: int, end: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        sizes = [len(part) for part in parts]
        while sum(sizes) + len(parts) + 1 > self.length:
            sizes[int(np.argmax(sizes))] -= 1
        tokens, segments = [np.array([begin])], [np.zeros(1, np.int64)]
        for number, (part, size) in enumerate(zip(parts, sizes, strict=True)):
            tokens += [part[:size], np.array([end])]
            segments.append(np.full(size + 1, number, np.int64))
        return np.concatenate(tokens), np.concatenate(segments)

    def samples(self) -> int:
        """Rows in an epoch."""
        return len(self.rows)

    def batch(
        self, first_sample: int, count: int, dp_rank: int = 0, dp_size: int = 1, *, shuffle: bool = True
    ) -> ClassBatch:
        """Rows by sample id over all epochs; shuffle False keeps the file's order (for evaluation)."""
        ids = own_samples(first_sample, count, dp_rank, dp_size)
        part = len(ids)
        epochs, places = np.divmod(ids, len(self.rows))
        if shuffle:
            for epoch in np.unique(epochs):
                chosen = epochs == epoch
                places[chosen] = permute(places[chosen], len(self.rows), key(self.seed, "classes", int(epoch)))
        tokens, segments = np.full((self.length, part), self.pad, np.int64), np.zeros((self.length, part), np.int64)
        mask = np.zeros((self.length, part), np.float32)
        for column, place in enumerate(places.tolist()):
            row, segment = self.rows[place]
            if self.types == 1:
                segment = np.zeros_like(segment)
            tokens[: len(row), column], segments[: len(row), column], mask[: len(row), column] = row, segment, 1.0
        return ClassBatch(*(torch.from_numpy(array) for array in (tokens, mask, segments, self.labels[places])))
