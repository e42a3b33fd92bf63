"""Classification from TSV (header, last column the label) or JSONL: one or two texts and a class."""

import csv
import json
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from megnorm.data.batch import ClassBatch
from megnorm.data.errors import DataError
from megnorm.data.samples import key, permute
from megnorm.data.tokenizer import Tokenizer


def read_examples(
    path: str, *, texts: tuple[str, ...] = (), label: str = ""
) -> tuple[list[tuple[str, ...]], list[str]]:
    """Texts and label of every row. texts, label: column names; by default all columns but the last, and the last."""
    with open(path, encoding="utf-8", newline="") as file:
        if Path(path).suffix == ".jsonl":
            rows = [json.loads(line) for line in file]
            names = list(rows[0]) if rows else []
        else:
            table = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
            names = table[0] if table else []
            for number, row in enumerate(table[1:], 2):
                if len(row) != len(names):
                    raise DataError(f"{path}:{number}: {len(row)} columns, the header has {len(names)}.")
            rows = [dict(zip(names, row, strict=True)) for row in table[1:]]
    if not rows:
        raise DataError(f"{path}: no rows: give a TSV with a header, or JSONL.")
    texts, label = texts or tuple(names[:-1]), label or names[-1]
    for number, row in enumerate(rows):
        for name in (*texts, label):
            if not isinstance(row.get(name), str | int):
                raise DataError(f"{path}: row {number + 1} has no text in column {name!r}; it has {', '.join(row)}.")
    return [tuple(str(row[name]) for name in texts) for row in rows], [str(row[label]) for row in rows]


class ClassLoader:
    """Batches of ``begin text end [text end]``, cut to sequence_length by shortening the longest text first.

    classes: their names in order; None takes those of this file, sorted: give the training file's to the others.
    """

    def __init__(
        self,
        path: str,
        tokenizer: Tokenizer,
        *,
        sequence_length: int,
        seed: int,
        begin: int,
        end: int,
        pad: int,
        classes: tuple[str, ...] | None = None,
        texts: tuple[str, ...] = (),
        label: str = "",
    ) -> None:
        rows, labels = read_examples(path, texts=texts, label=label)
        self.classes = classes or tuple(sorted(set(labels)))
        unknown = set(labels) - set(self.classes)
        if unknown:
            raise DataError(f"{path}: classes {sorted(unknown)} are not among {list(self.classes)}.")
        self.length, self.seed, self.pad, self.path = sequence_length, seed, pad, path
        self.labels = np.array([self.classes.index(one) for one in labels], np.int64)
        columns = []
        for texts_of_column in zip(*rows, strict=True):
            ids, sizes = tokenizer.encode_batch(list(texts_of_column))
            columns.append(np.split(ids.astype(np.int64), np.cumsum(sizes)[:-1]))
        self.rows = [self._join([column[i] for column in columns], begin, end) for i in range(len(rows))]

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
        if count % dp_size:
            raise DataError(
                f"a batch of {count} rows cannot be dealt to {dp_size} data-parallel ranks: make it a multiple."
            )
        part = count // dp_size
        ids = first_sample + dp_rank * part + np.arange(part, dtype=np.int64)
        epochs, places = np.divmod(ids, len(self.rows))
        if shuffle:
            for epoch in np.unique(epochs):
                chosen = epochs == epoch
                places[chosen] = permute(places[chosen], len(self.rows), key(self.seed, "classes", int(epoch)))
        tokens, segments = np.full((self.length, part), self.pad, np.int64), np.zeros((self.length, part), np.int64)
        mask = np.zeros((self.length, part), np.float32)
        for column, place in enumerate(places.tolist()):
            row, segment = self.rows[place]
            tokens[: len(row), column], segments[: len(row), column], mask[: len(row), column] = row, segment, 1.0
        return ClassBatch(*(torch.from_numpy(array) for array in (tokens, mask, segments, self.labels[places])))
