"""Megatron's blending of data sets: greedy, the one furthest behind its weight comes next.

At step i the largest weight x max(i, 1) - drawn is taken, the first of equal ones. The steps depend on each other, so they
are walked one by one; but within a block of steps only few data sets can come into play, and the others are left out.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megnorm.data.errors import DataError

SURPLUS = 0.005  # each source of a blend is made this much longer than its share
BLOCK = 64  # steps that are walked with the same few data sets
Indices = dict[str, NDArray[Any]]


def blend_sizes(weights: Sequence[float], samples: int) -> list[int]:
    """How many samples each source of a blend is asked for."""
    total = sum(weights)
    return [math.ceil(math.ceil(samples * (w / total)) * (1 + SURPLUS)) for w in weights]


def blend_indices(weights: Sequence[float], samples: int) -> Indices:
    """dataset_index [samples] int16, dataset_sample_index [samples] int64."""
    if len(weights) > np.iinfo(np.int16).max:
        raise DataError(
            f'order "megatron" mixes at most 32767 data sets, {len(weights)} are given: use order "default".'
        )
    share = np.asarray(weights, np.float64)
    return _greedy(share / share.sum(), samples, np.full(len(share), np.inf))


def blend_exhaustive(sizes: Sequence[int]) -> Indices:
    """As ``blend_indices`` with weights in proportion to sizes, until every source is used up."""
    limits = np.asarray(sizes, np.float64)
    return _greedy(limits / sum(sizes), sum(sizes), limits)


def _greedy(share: NDArray[np.float64], samples: int, limits: NDArray[np.float64]) -> Indices:
    chosen = np.empty(samples, np.int16)
    counts = np.where(limits > 0, 0.0, np.inf)  # of a source that is used up: infinite, so that it is never the largest
    done = 0
    while done < samples:
        steps = np.maximum(np.arange(done, min(done + BLOCK, samples)), 1)
        found = _walk(share, counts, steps, limits)
        chosen[done : done + len(found)] = found
        counts += np.bincount(found, minlength=len(share))
        counts[counts >= limits] = np.inf
        done += len(found)
    order = np.argsort(chosen, kind="stable")
    sizes = np.bincount(chosen, minlength=len(share))
    drawn = np.empty(samples, np.int64)
    drawn[order] = np.arange(samples) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return {"dataset_index": chosen, "dataset_sample_index": drawn}


def _walk(
    share: NDArray[np.float64], counts: NDArray[np.float64], steps: NDArray[np.int64], limits: NDArray[np.float64]
) -> NDArray[np.int64]:
    """The choices of as many of the steps as the data sets looked at decide, at least one."""
    last = share * steps[-1] - counts  # no data set comes higher than this within the steps
    if len(share) <= 2 * BLOCK:
        near, bound = np.arange(len(share)), -np.inf
    else:
        order = np.argpartition(last, len(share) - 2 * BLOCK)
        near, bound = np.sort(order[-2 * BLOCK :]), float(last[order[: -2 * BLOCK]].max())
    drawn, top = counts[near], limits[near].tolist()
    held, picks = drawn.tolist(), []  # plain numbers are read faster
    error, subtract = np.empty(len(near)), np.subtract
    for row in np.multiply.outer(steps, share[near]):
        subtract(row, drawn, error)
        best = int(error.argmax())
        if error.item(best) <= bound:
            break
        picks.append(best)
        count = held[best] + 1.0
        held[best] = drawn[best] = count if count < top[best] else np.inf
    if not picks:
        return np.array([int(np.argmax(share * steps[0] - counts))])
    return near[picks]
