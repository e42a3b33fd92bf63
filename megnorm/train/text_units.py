"""Held-out loss by byte and by word, which do not depend on the tokenizer."""

import math
from collections.abc import Iterator, Sequence

import torch

from megnorm.data import tokenizer as tokenizers
from megnorm.data.batch import Batch
from megnorm.data.tokenizer import Tokenizer
from megnorm.parallel.collectives import all_reduce
from megnorm.train.build import Run
from megnorm.train.rows import own_rows


class TextUnits:
    """An evaluator (``Run.evaluators``): bits per byte and perplexity by word of the samples that held-out loss is the mean of.

    They are the same each time, so they are decoded once. End-of-document tokens count as tokens, not as text.
    """

    def __init__(self, path: str | None) -> None:
        if path is None:
            raise ValueError(
                "train.eval_units counts bytes and words of text; set data.tokenizer, or train.eval_units=false"
            )
        self.tokenizer = tokenizers.load(path)
        self.counts: tuple[float, float, float] | None = None

    def __call__(self, run: Run, loss: float) -> dict[str, float]:
        if self.counts is None:
            self.counts = self._measure(run)
        tokens, size, words = self.counts
        by_word = loss * tokens / max(words, 1.0)
        return {
            "valid_bits_per_byte": loss * tokens / max(size, 1.0) / math.log(2.0),
            "valid_word_perplexity": math.exp(by_word) if by_word < 700.0 else math.inf,
        }

    def _measure(self, run: Run) -> tuple[float, float, float]:
        """Tokens, bytes and words of all held-out samples, over all ranks."""
        assert run.valid_data is not None
        t, found = run.plan.config.train, torch.zeros(3, dtype=torch.float64)
        for i in range(t.eval_batches):
            batch = own_rows(run, run.valid_data, i * t.global_batch, t.global_batch)
            assert isinstance(batch, Batch), "the plan refuses train.eval_units for other families"
            for column in range(batch.labels.shape[1]):
                counted = batch.loss_mask[:, column] > 0
                labels = batch.labels[counted, column].tolist()
                size, words = text_of(self.tokenizer, batch.tokens[0, column].item(), labels)
                found += torch.tensor([len(labels), size, words], dtype=torch.float64)
        total = all_reduce(found.to(run.mesh.device), run.mesh.dp)
        return float(total[0]), float(total[1]), float(total[2])


def text_of(tokenizer: Tokenizer, before: int | float, ids: Sequence[int]) -> tuple[int, int]:
    """Bytes and words of tokens behind the token ``before``; a word that it began is not counted again."""
    size, words, inside = 0, 0, before != tokenizer.eod and not tokenizer.decode([int(before)])[-1:].isspace()
    for piece in _documents(ids, tokenizer.eod):
        text = tokenizer.decode(piece)
        size += len(text.encode())
        words += len(text.split()) - (inside and not text[:1].isspace() and bool(text))
        inside = False
    return size, words


def _documents(ids: Sequence[int], end: int | None) -> Iterator[list[int]]:
    """The tokens between the ends of documents."""
    piece: list[int] = []
    for token in ids:
        if token == end:
            yield piece
            piece = []
        else:
            piece.append(token)
    yield piece
