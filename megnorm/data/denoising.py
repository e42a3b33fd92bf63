"""Loaders that corrupt rows of the token stream: masked language models and T5. Masks are new in every epoch."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megnorm.data.batch import MaskedBatch, PairBatch
from megnorm.data.config import DataConfig, SpanConfig
from megnorm.data.errors import DataError
from megnorm.data.loader import Loader
from megnorm.data.pairs import collate
from megnorm.data.samples import key, own_samples
from megnorm.data.tasks import corrupt_spans, mask
from megnorm.data.tokenizer import HuggingFace, id_of, tokenizer_of

SPECIAL = (
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "<pad>",
    "<unk>",
    "<s>",
    "</s>",
    "<mask>",
    "<|endoftext|>",
    "<|pad|>",
)
MASKS = ("[MASK]", "<mask>")


def word_table(tokenizer: HuggingFace, size: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """(special [size], begins a word [size]) of every id, by the marks of WordPiece, byte-level BPE or SentencePiece."""
    names = [tokenizer.inner.id_to_token(number) or "" for number in range(size)]
    special = np.array([name == "" or name in SPECIAL for name in names])
    if any(name.startswith("##") for name in names):
        return special, np.array([not name.startswith("##") for name in names])
    begins = np.array([name.startswith(("\u0120", "\u010a", "\u2581")) for name in names])
    if not begins.any():
        raise DataError("the tokenizer does not tell where words begin: use data.mask.unit=token.")
    return special, begins


class MaskedLoader:
    """Rows of L tokens, some of them corrupted; labels are the true tokens, loss_mask is 1 where one is to be predicted.

    ``rest`` is what ``Loader`` takes.
    """

    def __init__(self, config: DataConfig, split: str, **rest: Any) -> None:
        options, tokenizer = config.mask, tokenizer_of(config)
        if not isinstance(tokenizer, HuggingFace):
            raise DataError(f"{config.tokenizer}: data.task=masked needs a tokenizer.json or a vocabulary file.")
        found = [name for name in MASKS if tokenizer.token_id(name) is not None]
        self.mask_id = id_of(tokenizer, options.token or (found or MASKS)[0], "data.mask.token")
        self.begin, self.end = (
            [] if name is None else [id_of(tokenizer, name, f"data.mask.{key}")]
            for key, name in (("begin", options.begin), ("end", options.end))
        )
        self.rows = Loader(config, split, framing=len(self.begin) + len(self.end), **rest)
        self.options, size = options, self.rows.vocab_size
        self.special, self.begins = np.ones(size, np.bool_), None
        names = min(tokenizer.vocab_size, size)
        if options.unit == "token":
            listed = [tokenizer.inner.id_to_token(number) or "" for number in range(names)]
            self.special[:names] = [name == "" or name in SPECIAL for name in listed]
        else:
            self.begins = np.zeros(size, np.bool_)
            self.special[:names], self.begins[:names] = word_table(tokenizer, names)
        self.special[[self.mask_id, *self.begin, *self.end]] = True

    def samples(self) -> int:
        """Rows in one epoch."""
        return self.rows.samples()

    def batch(self, first_sample: int, count: int, dp_rank: int = 0, dp_size: int = 1) -> MaskedBatch:
        """As in ``Loader``; every sample id has its own mask."""
        plain = self.rows.batch(first_sample, count, dp_rank, dp_size)
        ids = own_samples(first_sample, count, dp_rank, dp_size).tolist()
        inputs = np.empty((len(ids), self.rows.sequence_length), np.int64)
        labels, wanted = np.empty_like(inputs), np.zeros(inputs.shape, np.float32)
        inner = slice(len(self.begin), len(self.begin) + self.rows.length)
        for row, (number, tokens) in enumerate(zip(ids, plain.tokens.numpy().T, strict=True)):
            random = np.random.RandomState(key(self.rows.seed, "mask", number) % 2**32)
            changed, wanted[row, inner] = mask(
                tokens,
                random,
                self.options,
                mask_id=self.mask_id,
                vocab_size=self.rows.vocab_size,
                special=self.special,
                begins_word=self.begins,
            )
            inputs[row] = [*self.begin, *changed, *self.end]
            labels[row] = [*self.begin, *tokens, *self.end]
        return MaskedBatch(torch.from_numpy(inputs).t(), torch.from_numpy(labels).t(), torch.from_numpy(wanted).t())

    def state(self, consumed_samples: int) -> dict[str, Any]:
        """As in ``Loader``."""
        return self.rows.state(consumed_samples)


class SpanLoader:
    """T5: rows of L tokens as pairs of corrupted source and the spans taken out of it. ``rest`` is what ``Loader`` takes."""

    def __init__(self, config: DataConfig, split: str, **rest: Any) -> None:
        options = config.spans
        if not 0 < options.density < 1 or options.mean_span < 1:
            raise DataError(
                f"data.spans: density {options.density} must lie between 0 and 1, mean_span {options.mean_span} be >= 1."
            )
        self.rows, self.options = Loader(config, split, **rest), options
        self.sentinels = _sentinels(config, options)
        self.eos = self.rows.end_of_document()
        self.pad, self.start = config.pad, config.pad if config.start is None else config.start
        largest = max(*self.sentinels, self.eos, self.pad, self.start)
        if largest >= self.rows.vocab_size:
            raise DataError(
                f"data.task=spans uses token id {largest}, model.vocab_size is {self.rows.vocab_size}: make it larger."
            )

    def samples(self) -> int:
        """Rows in one epoch."""
        return self.rows.samples()

    def batch(self, first_sample: int, count: int, dp_rank: int = 0, dp_size: int = 1) -> PairBatch:
        """Source and target of the rows that ``Loader.batch`` would give."""
        plain = self.rows.batch(first_sample, count, dp_rank, dp_size)
        ids, found = own_samples(first_sample, count, dp_rank, dp_size).tolist(), []
        for number, tokens in zip(ids, plain.tokens.numpy().T, strict=True):
            random = np.random.RandomState(key(self.rows.seed, "spans", number) % 2**32)
            found.append(
                corrupt_spans(
                    tokens,
                    random,
                    density=self.options.density,
                    mean_span=self.options.mean_span,
                    sentinels=self.sentinels,
                    eos=self.eos,
                )
            )
        sources, targets = [pair[0] for pair in found], [pair[1] for pair in found]
        return collate(sources, targets, start=self.start, pad=self.pad)

    def state(self, consumed_samples: int) -> dict[str, Any]:
        """As in ``Loader``."""
        return self.rows.state(consumed_samples)


def _sentinels(config: DataConfig, options: SpanConfig) -> Sequence[int]:
    if options.sentinels is not None:
        first, last = options.sentinels
        marks = list(range(first, last + 1)) or list(range(first, last - 1, -1))
    else:
        tokenizer, marks = tokenizer_of(config), []
        while (number := tokenizer.token_id(f"<extra_id_{len(marks)}>")) is not None:
            marks.append(number)
    if len(marks) < 2 or min(marks) < 0:
        raise DataError(
            "data.spans.sentinels: give the first and last id of at least two marks, as in [4096, 4195] for a vocabulary of "
            "4096 tokens and 100 marks, or a tokenizer with <extra_id_0>, <extra_id_1>, ..."
        )
    return marks
