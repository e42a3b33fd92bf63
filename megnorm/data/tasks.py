"""What is done to a row of tokens for each task; pure functions of the row and a random stream."""

from collections.abc import Sequence

import numpy as np
from numpy.random import RandomState
from numpy.typing import NDArray

from megnorm.data.config import MaskConfig
from megnorm.data.errors import DataError

Ids = NDArray[np.int64]


def mask(
    row: Ids,
    random: RandomState,
    config: MaskConfig,
    *,
    mask_id: int,
    vocab_size: int,
    special: NDArray[np.bool_],
    begins_word: NDArray[np.bool_] | None = None,
) -> tuple[Ids, NDArray[np.bool_]]:
    """(corrupted row, where to predict). special [vocab]: never chosen, never drawn; begins_word [vocab]: token begins one."""
    chosen = np.zeros(len(row), np.bool_)
    free = ~special[row]
    budget = int(round(config.probability * int(free.sum())))
    starts = np.flatnonzero(free)
    if config.unit != "token":
        if begins_word is None:
            raise DataError(f"data.mask.unit={config.unit} needs a tokenizer that tells where words begin.")
        after_gap = np.append(True, ~free[:-1])
        starts = np.flatnonzero(free & (begins_word[row] | after_gap))
    stops = np.append(starts[1:], len(row))
    order, taken = random.permutation(len(starts)), 0
    for first in order.tolist():
        if taken >= budget:
            break
        words = 1
        if config.unit == "span":
            words = min(int(random.geometric(1.0 / config.mean_span)), config.longest_span)
        for word in range(first, min(first + words, len(starts))):
            part = np.arange(starts[word], stops[word])
            part = part[free[part] & ~chosen[part]]
            if taken and taken + len(part) > budget:
                break
            chosen[part] = True
            taken += len(part)
    out, draw = row.copy(), random.random_sample(len(row))
    drawn = np.flatnonzero(~special[:vocab_size])[random.randint(0, int((~special[:vocab_size]).sum()), len(row))]
    swapped = chosen & (draw >= config.keep) & (draw < config.keep + config.swap)
    out[chosen & (draw >= config.keep + config.swap)] = mask_id
    out[swapped] = drawn[swapped]
    return out, chosen


def corrupt_spans(
    row: Ids, random: RandomState, *, density: float, mean_span: float, sentinels: Sequence[int], eos: int
) -> tuple[Ids, Ids]:
    """T5: (source, target). Spans of the row give way to sentinels; the target tells what stood there.

    The shares of noise and the number of spans are fixed by the row's length; where the spans lie is random.
    """
    noise = min(max(round(len(row) * density), 1), len(row) - 1)
    spans = min(max(round(noise / mean_span), 1), len(sentinels) - 1, len(row) - noise)

    def cut(total: int, parts: int) -> Ids:
        borders = np.sort(random.permutation(total - 1)[: parts - 1]) + 1
        return np.diff(np.concatenate([[0], borders, [total]])).astype(np.int64)

    gone, kept = cut(noise, spans), cut(len(row) - noise, spans)
    source, target, place = [], [], 0
    for number in range(spans):
        mark = np.array([sentinels[number]])
        source += [row[place : place + kept[number]], mark]
        place += int(kept[number])
        target += [mark, row[place : place + gone[number]]]
        place += int(gone[number])
    end = np.array([eos])
    return np.concatenate([*source, end]), np.concatenate([*target, np.array([sentinels[spans]]), end])


def fill_in_the_middle(piece: Ids, random: RandomState, marks: Sequence[int], spm: float) -> Ids:
    """The piece as prefix, suffix and middle behind their marks (or suffix, prefix, middle), cut to its old length.

    marks: ids before prefix, middle and suffix. Tokens that the marks push out are taken off the middle's end.
    """
    if len(piece) < 8:
        return piece
    first, last = np.sort(random.randint(0, len(piece) + 1, 2))
    before, middle, after = (np.array([mark], np.int64) for mark in marks)
    head, body, tail = piece[:first], piece[first:last], piece[last:]
    if random.random_sample() < spm:
        parts = [before, after, tail, middle, head, body]
    else:
        parts = [before, head, after, tail, middle, body]
    return np.concatenate(parts)[: len(piece)]
