"""Directions of translation: the files that each reads, the tag of its target language, its share of an epoch."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megnorm.data.config import DataConfig, PairConfig
from megnorm.data.errors import DataError
from megnorm.data.indexed import IndexedDataset
from megnorm.data.loader import open_tokens
from megnorm.data.samples import key, permute
from megnorm.data.tokenizer import Tokenizer, id_of, tokenizer_of

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Direction:
    """Documents of two data sets side by side, from one language to the other. tag: a token of the target's; None: none.

    first: number of the first of them, counted over all directions. sizes: of each, of the longer side with its tag.
    kept: those that are used, by their number among these.
    """

    source: IndexedDataset
    target: IndexedDataset
    tag: int | None
    first: int
    sizes: Ids
    kept: Ids

    @property
    def dropped(self) -> int:
        return len(self.sizes) - len(self.kept)


def open_directions(config: DataConfig, paths: Sequence[str], vocab_size: int) -> list[Direction]:
    """One for each path, or two with data.pairs.both_ways: all paths forwards, then all backwards."""
    options = config.pairs
    if options.languages and len(options.languages) != len(paths):
        raise DataError(
            f"data.pairs.languages names {len(options.languages)} pairs of languages for {len(paths)} paths: give one for "
            "each path of a split."
        )
    known = tags(options, tokenizer_of(config)) if options.languages else {}
    found: list[Direction] = []
    files = [[open_tokens(path + side, config, vocab_size).data for side in options.sides] for path in paths]
    for back in (False, True) if options.both_ways else (False,):
        for place, pair in enumerate(files):
            tag = known[options.languages[place][0 if back else 1]] if known else None
            source, target = pair[::-1] if back else pair
            first = found[-1].first + len(found[-1].sizes) if found else 0
            found.append(_direction(paths[place], source, target, tag, first, options))
    return found


def tags(options: PairConfig, tokenizer: Tokenizer) -> dict[str, int]:
    """The token of every language that is a target."""
    targets = {name for pair in options.languages for name in (pair if options.both_ways else pair[1:])}
    return {name: id_of(tokenizer, options.tag.replace("{}", name), "data.pairs.tag") for name in sorted(targets)}


def _direction(
    path: str, source: IndexedDataset, target: IndexedDataset, tag: int | None, first: int, options: PairConfig
) -> Direction:
    counts = source.document_count, target.document_count
    if counts[0] != counts[1]:
        raise DataError(
            f"{source.prefix} has {counts[0]} documents, {target.prefix} {counts[1]}: write both with one run of megnorm "
            "preprocess, so that they stay side by side."
        )
    sizes = [np.diff(side.document_starts()).astype(np.int64) for side in (source, target)]
    longer = np.maximum(sizes[0] + (tag is not None and options.tag_on == "source"), sizes[1])
    kept = np.flatnonzero((np.minimum(*sizes) > 0) & (longer <= options.longest)).astype(np.int64)
    if not len(kept):
        raise DataError(
            f"{path}: none of its {counts[0]} pairs has two sides of 1 to data.pairs.longest={options.longest} tokens."
        )
    return Direction(source, target, tag, first, longer, kept)


def shares(counts: Sequence[int], temperature: float) -> NDArray[np.float64]:
    """p_i ~ (n_i / sum n)^(1 / T)."""
    weights = (np.asarray(counts, np.float64) / sum(counts)) ** (1.0 / temperature)
    found: NDArray[np.float64] = weights / weights.sum()
    return found


def drawn(directions: Sequence[Direction], temperature: float, seed: int, epoch: int) -> Ids:
    """The pairs of an epoch, by their number over all directions: about as many as there are.

    Each direction hands out its pairs in permutations of its own, one behind the other, so none comes again before all
    have come; an epoch takes the next ones of each, to its share.
    """
    counts = [len(one.kept) for one in directions]
    parts = []
    for place, (one, share) in enumerate(zip(directions, shares(counts, temperature), strict=True)):
        quota = float(share) * sum(counts)
        first, last = (int(np.floor(end * quota + 0.5)) for end in (epoch, epoch + 1))
        turns, places = np.divmod(np.arange(first, last, dtype=np.int64), len(one.kept))
        for turn in np.unique(turns):
            now = turns == turn
            places[now] = permute(places[now], len(one.kept), key(seed, "direction", place, int(turn)))
        parts.append(np.sort(one.first + one.kept[places]))
    return np.concatenate(parts)
