"""The default sample order: a pure function from sample id to a place in the token stream, with no index to build.

A split is one run of tokens of each file, cut at document ends. Sample i of an epoch is the L + 1 tokens at
shift + p(i) x L, where p is a permutation computed on the fly for that (seed, path, epoch) and the shift moves the cuts
from epoch to epoch. So every sample is read in one piece, all tokens but a rest shorter than L are seen once an epoch,
and nothing has to be stored, cached or shared between ranks. Neighbours in the file stay neighbours.
"""

import bisect
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megnorm.data.errors import DataError
from megnorm.data.indexed import IndexedDataset

PERIOD = 1 << 20  # samples after which the pattern of a mixture repeats; shares are multiples of 1 / PERIOD
ROUNDS = 8
BLOCK = 1 << 14  # indices that are permuted at a time
_32 = np.uint64(32)


def own_samples(first: int, count: int, dp_rank: int, dp_size: int) -> NDArray[np.int64]:
    """The samples of one data-parallel rank: count/dp_size of the ``count`` from ``first`` on."""
    if count % dp_size:
        raise DataError(
            f"a batch of {count} samples cannot be dealt to {dp_size} data-parallel ranks: make it a multiple."
        )
    part = count // dp_size
    return first + dp_rank * part + np.arange(part, dtype=np.int64)


def key(*parts: object) -> int:
    """64 bits that depend on all parts, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def permute(index: NDArray[np.int64], size: int, seed: int) -> NDArray[np.int64]:
    """Where a permutation of 0 .. size-1, chosen by seed, sends each index: a Feistel network on a grid of about
    sqrt(size) x sqrt(size), walked on while it lands beyond size."""
    if len(index) > BLOCK:  # block by block they stay in the processor's cache
        parts = [permute(index[first : first + BLOCK], size, seed) for first in range(0, len(index), BLOCK)]
        return np.concatenate(parts)
    rows = int(np.ceil(np.sqrt(size)))
    columns = -(-size // rows)
    out = index.astype(np.uint64)
    todo: Any = slice(None)
    while True:
        out[todo] = _rounds(out[todo], rows, columns, seed)
        todo = np.flatnonzero(out >= np.uint64(size))
        if not len(todo):
            return out.astype(np.int64)


def _rounds(index: NDArray[np.uint64], rows: int, columns: int, seed: int) -> NDArray[np.uint64]:
    width = np.uint64(columns)
    sizes = (np.uint64(rows), width)
    high = index // width
    halves = [high, index - high * width]
    for turn in range(ROUNDS):
        secret = key(seed, turn)
        this, other = turn % 2, halves[1 - turn % 2]
        noise = other + np.uint64(secret >> 1)
        noise *= np.uint64(secret | 1)
        noise ^= noise >> _32
        noise *= np.uint64(0xD6E8FEB86659FD93)
        noise >>= _32
        noise *= sizes[this]
        noise >>= _32
        noise += halves[this]
        halves[this] = np.minimum(
            noise, noise - sizes[this]
        )  # modulo: below its size, the difference wraps and is large
    result: NDArray[np.uint64] = halves[0] * width + halves[1]
    return result


def split_tokens(data: IndexedDataset, fractions: tuple[float, float]) -> tuple[int, int]:
    """First and last token of a split, at document borders."""
    borders = range(data.document_count + 1)

    def border(fraction: float) -> int:
        if fraction >= 1.0:
            return data.total
        return data.document_start(bisect.bisect_left(borders, fraction * data.total, key=data.document_start))

    return border(fractions[0]), border(fractions[1])


def too_few(path: str, split: str, tokens: int, length: int) -> DataError:
    """The refusal of a split that holds not even one sample of ``length`` tokens and the next one."""
    remedy = "change data.split, use more data or shorter sequences"
    remedy += ", or set train.eval_batches=0 to train without evaluation" if split == "valid" else ""
    return DataError(
        f"{path}: its {split} part has {tokens} tokens, one sample of train.sequence_length={length} needs {length + 1}: "
        f"{remedy}."
    )


@dataclass(frozen=True)
class Source:
    """One file's part in a split. start, tokens: elements of .bin; length: L; samples: full samples in an epoch.

    identity: of the content, so that a run goes on with the same samples when its data have moved.
    """

    path: str
    identity: str
    data: IndexedDataset
    start: int
    tokens: int
    length: int
    seed: int

    @property
    def samples(self) -> int:
        return max(0, (self.tokens - 1) // self.length)

    def starts(self, draws: NDArray[np.int64]) -> NDArray[np.int64]:
        """First token of the samples drawn from this source as its 0th, 1st, ... draw, over all epochs."""
        epochs, within = np.divmod(draws, self.samples)
        out = np.empty_like(draws)
        for epoch in range(int(epochs.min()), int(epochs.max()) + 1) if len(epochs) else ():
            chosen = epochs == epoch
            secret = key(self.seed, self.identity, epoch)
            shift = secret % (self.tokens - self.samples * self.length)
            out[chosen] = self.start + shift + permute(within[chosen], self.samples, secret) * self.length
        return out


def shares(weights: Sequence[float], paths: Sequence[str]) -> list[int]:
    """Weights as whole numbers that sum to PERIOD, by largest remainder."""
    total = float(sum(weights))
    ideal = [weight / total * PERIOD for weight in weights]
    for path, weight, part in zip(paths, weights, ideal, strict=True):
        if weight > 0 and part < 0.5:
            raise DataError(
                f"data.weights: the share of {path} is {weight / total:.1e}, below 5e-7: leave it out or weigh it more."
            )
    counts = [int(part) if part >= 1 or part == 0 else 1 for part in ideal]
    by_rest = sorted(range(len(ideal)), key=lambda i: counts[i] - ideal[i])
    while (missing := PERIOD - sum(counts)) != 0:
        step = 1 if missing > 0 else -1
        order = by_rest if step > 0 else [i for i in reversed(by_rest) if counts[i] > 1]
        for i in [i for i in order if counts[i] > 0][: abs(missing)]:
            counts[i] += step
    return counts


class Mixture:
    """Which source serves sample id g: draw k of source d stands at time (k + 1/2) / share, and times are sorted.

    The pattern repeats every PERIOD samples, so any id is found at once. start: the id from which this mixture holds;
    counts: what each source had given before (non-zero after a change of mixture).
    """

    def __init__(self, parts: Sequence[int], start: int = 0, counts: Sequence[int] | None = None) -> None:
        self.parts, self.start = np.array(parts, np.int64), start
        self.counts = np.array(counts if counts is not None else [0] * len(parts), np.int64)
        self.single = int(np.argmax(self.parts)) if np.count_nonzero(self.parts) == 1 else None
        if self.single is None:
            source = np.repeat(np.arange(len(parts), dtype=np.int32), self.parts)
            draw = np.arange(PERIOD, dtype=np.int64) - np.repeat(np.cumsum(self.parts) - self.parts, self.parts)
            order = np.argsort((draw + 0.5) / self.parts[source], kind="stable")
            self.source = source[order]
            self.draw = draw[order].astype(np.int32)

    def locate(self, ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Source and draw (the how manieth sample of that source, over all epochs) of each id."""
        if self.single is not None:
            return np.full(len(ids), self.single), ids - self.start + self.counts[self.single]
        period, place = np.divmod(ids - self.start, PERIOD)
        source = self.source[place].astype(np.int64)
        drawn = self.counts[source] + period * self.parts[source] + self.draw[place]
        return source, drawn.astype(np.int64)

    def consumed(self, samples: int) -> list[int]:
        """How many samples each source has given when all ids below ``samples`` are used."""
        period, place = divmod(samples - self.start, PERIOD)
        if self.single is not None:
            extra = np.zeros(len(self.parts), np.int64)
            extra[self.single] = place
        else:
            extra = np.bincount(self.source[:place], minlength=len(self.parts))
        return [int(n) for n in self.counts + period * self.parts + extra]


def by_source(source: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Each source that occurs, and the rows in which it does."""
    order = np.argsort(source, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(source[order])) + 1) if len(source) else ():
        yield int(source[rows[0]]), rows


class DefaultOrder:
    """Reads rows by sample id. left: what a checkpoint said of sources that are in the mixture no more."""

    def __init__(self, sources: Sequence[Source], mixture: Mixture, left: Sequence[Mapping[str, Any]] = ()) -> None:
        self.sources, self.mixture, self.left = list(sources), mixture, list(left)
        self.length = sources[0].length
        self._documents: dict[int, NDArray[np.int64]] = {}

    @property
    def samples(self) -> int:
        return sum(source.samples for source in self.sources)

    def rows(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens [len(ids), L + 1]."""
        source, start = self.places(ids)
        out = np.empty((len(ids), self.length + 1), np.int64)
        for number, mine in by_source(source):
            counts = np.full(len(mine), self.length + 1)
            out[mine] = self.sources[number].data.read_many(start[mine], counts).reshape(len(mine), -1)
        return out

    def borders(self, ids: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """For each row, the positions 1 .. L at which a new document begins."""
        found = []
        for source, start in zip(*(array.tolist() for array in self.places(ids)), strict=True):
            if source not in self._documents:
                self._documents[source] = np.unique(self.sources[source].data.document_starts())
            starts = self._documents[source]
            low, high = np.searchsorted(starts, [start + 1, start + self.length + 1])
            found.append(starts[low:high] - start)
        return found

    def places(self, ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Source and first token of each id."""
        source, draw = self.mixture.locate(ids)
        start = np.empty(len(ids), np.int64)
        for number in np.unique(source):
            chosen = source == number
            start[chosen] = self.sources[number].starts(draw[chosen])
        return source, start

    def state(self, consumed: int) -> dict[str, Any]:
        """What a checkpoint keeps: enough to go on with the same mixture, or another one."""
        mixture = self.mixture
        columns = (mixture.parts.tolist(), mixture.counts.tolist(), mixture.consumed(consumed))
        sources = [
            {"path": s.path, "identity": s.identity, "start": s.start, "tokens": s.tokens}
            | {"share": share, "count": count, "consumed": used}
            for s, share, count, used in zip(self.sources, *columns, strict=True)
        ]
        return {"samples": consumed, "start": mixture.start, "sources": sources, "left": self.left}


def resume_order(parts: Sequence[int], sources: Sequence[Source], state: Mapping[str, Any] | None) -> DefaultOrder:
    """The order of a run that goes on: the old mixture where nothing changed, else a new one from the point reached, in
    which every source goes on where it stood, also one that was left out for a while."""
    if state is None:
        return DefaultOrder(sources, Mixture(parts))
    known = {entry["identity"]: entry for entry in [*state["left"], *state["sources"]]}
    _check_known(sources, known)
    now = [(source.identity, part) for source, part in zip(sources, parts, strict=True)]
    if [(entry["identity"], entry["share"]) for entry in state["sources"]] == now:
        mixture = Mixture(parts, state["start"], [entry["count"] for entry in state["sources"]])
    else:
        used = [known[s.identity]["consumed"] if s.identity in known else 0 for s in sources]
        mixture = Mixture(parts, state["samples"], used)
    left = [entry for identity, entry in known.items() if identity not in dict(now)]
    return DefaultOrder(sources, mixture, left)


def _check_known(sources: Sequence[Source], known: Mapping[str, Mapping[str, Any]]) -> None:
    """What was read before the checkpoint must still be what its counters count."""
    held = {entry["path"] for entry in known.values()}
    for source in sources:
        before = known.get(source.identity)
        if before is None and source.path in held:
            raise DataError(
                f"{source.path}: holds other data than when the checkpoint was written: put those back, or give the new "
                "data a name of their own."
            )
        if before is not None and (before["start"], before["tokens"]) != (source.start, source.tokens):
            raise DataError(
                f"{source.path}: tokens {before['start']} to {before['start'] + before['tokens']} were read before the "
                f"checkpoint, now {source.start} to {source.start + source.tokens}: keep data.split, or start a new run "
                "from the weights alone (checkpoint.init_from)."
            )
