"""Samples as text, for a person who wants to see what a model will see."""

from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from itertools import groupby
from typing import Any, get_type_hints

import numpy as np
import yaml
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from megnorm.data.batch import Batch, ClassBatch, PairBatch
from megnorm.data.choose import Samples
from megnorm.data.classes import ClassLoader
from megnorm.data.config import DataConfig
from megnorm.data.denoising import MaskedLoader, SpanLoader
from megnorm.data.errors import DataError
from megnorm.data.tokenizer import Tokenizer

PAIRS = 3  # pairs of a bucket that are printed


def read_options(base: dict[str, Any], overrides: Sequence[str]) -> DataConfig:
    """A DataConfig of plain values and ``key=value`` as in data.key, values in YAML (mask.unit=word)."""
    found = dict(base)
    for override in overrides:
        name, equals, text = override.partition("=")
        *sections, last = name.removeprefix("data.").split(".")
        here: dict[str, Any] = found
        kind: Any = DataConfig
        for section in sections:
            kind = get_type_hints(kind).get(section) if is_dataclass(kind) else None
            here = here.setdefault(section, {})
        if not equals or not is_dataclass(kind) or last not in {field.name for field in fields(kind)}:
            raise DataError(f"'{override}': write key=value with a key of data, as in mask.unit=word.")
        try:
            here[last] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise DataError(f"'{override}': the value is broken YAML; quote it.") from None
    try:
        return TypeAdapter(DataConfig).validate_python(found)
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(f"data.{'.'.join(map(str, first['loc']))}: {first['msg']}; it is {first['input']!r}.") from None


class Words:
    """Ids as text, or as numbers without a tokenizer; marks: ids that are written as <mark number>."""

    def __init__(self, tokenizer: Tokenizer | None, marks: Sequence[int] = ()) -> None:
        self.tokenizer, self.marks = tokenizer, {number: f"<{place}>" for place, number in enumerate(marks)}

    def __call__(self, ids: NDArray[Any] | Sequence[int]) -> str:
        parts = []
        for marked, run in groupby((int(number) for number in ids), key=lambda number: number in self.marks):
            if marked:
                parts += [self.marks[number] for number in run]
            elif self.tokenizer is None:
                parts.append(" ".join(map(str, run)))
            else:
                parts.append(self.tokenizer.decode(list(run)))
        return " ".join(parts) if self.marks else "".join(parts)


def show(loader: Samples, tokenizer: Tokenizer | None, first: int, count: int) -> Iterator[str]:
    """Lines about ``count`` samples from id ``first`` on."""
    words = Words(tokenizer, loader.sentinels if isinstance(loader, SpanLoader) else ())
    for sample in range(first, first + count):
        batch = loader.batch(sample, 1)
        if isinstance(loader, MaskedLoader):
            assert isinstance(batch, Batch)
            yield from _masked(sample, batch, words, loader.mask_id)
        elif isinstance(batch, Batch):
            yield from _causal(sample, batch, words)
        elif isinstance(batch, ClassBatch):
            assert isinstance(loader, ClassLoader)
            yield from _classes(sample, batch, words, loader.classes)
        else:
            for one in batch if isinstance(batch, list) else [batch]:
                yield from _pairs(sample, one, words)


def _causal(sample: int, batch: Batch, words: Words) -> Iterator[str]:
    tokens, silent = batch.tokens.numpy().ravel(), int((batch.loss_mask == 0).sum())
    ends = [0, len(tokens)] if batch.cu_seqlens is None else batch.cu_seqlens.tolist()
    yield f"--- sample {sample}: {len(tokens)} tokens in {len(ends) - 1} pieces, {silent} without loss"
    for begin, end in zip(ends[:-1], ends[1:], strict=True):
        yield f"[{begin}:{end}] {words(tokens[begin:end])}"


def _masked(sample: int, batch: Batch, words: Words, mask_id: int) -> Iterator[str]:
    tokens, labels, chosen = (x.numpy().ravel() for x in (batch.tokens, batch.labels, batch.loss_mask))
    places = np.flatnonzero(chosen)
    yield f"--- sample {sample}: {len(tokens)} tokens, {len(places)} to predict"
    yield f"input:   {words(tokens)}"
    told = []
    for place in places.tolist():
        seen = tokens[place]
        how = "masked" if seen == mask_id else "kept" if seen == labels[place] else f"as {words([seen])!r}"
        told.append(f"{place}: {words([labels[place]])!r} ({how})")
    yield f"predict: {', '.join(told)}"


def _pairs(sample: int, batch: PairBatch, words: Words) -> Iterator[str]:
    real = float(batch.source_mask.sum() + batch.loss_mask.sum())
    size = batch.source.numel() + batch.labels.numel()
    longest, count = batch.source.shape
    yield (
        f"--- sample {sample}: {count} pairs, source {longest} and target {batch.labels.shape[0]} tokens long, "
        f"{100 * real / size:.0f}% of them real"
    )
    for column in range(min(count, PAIRS)):
        source = batch.source[:, column][batch.source_mask[:, column] > 0]
        target = batch.labels[:, column][batch.loss_mask[:, column] > 0]
        yield f"source: {words(source.numpy())}"
        yield f"target: {words(target.numpy())}"


def _classes(sample: int, batch: ClassBatch, words: Words, names: Sequence[str]) -> Iterator[str]:
    tokens = batch.tokens[:, 0][batch.mask[:, 0] > 0].numpy()
    yield f"--- sample {sample}: {len(tokens)} tokens, class {names[int(batch.classes[0])]}"
    yield words(tokens)
