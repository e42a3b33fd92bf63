"""Beam search with an encoder-decoder: batched, with caches for self- and cross-attention; one beam is greedy decoding."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from megnorm.layers.cache import Cache
from megnorm.models.encdec import EncoderDecoder


@dataclass(frozen=True)
class Beam:
    """start: first token of a decoder; end: the one that ends a sequence. size: hypotheses that are followed at a time.

    length_penalty: a hypothesis counts with its log probability over its length (end included) to this power. longest: most
    new tokens; what is cut off there counts as it is, beside what has ended. cached: keep keys and values; without, every step
    computes all tokens anew.
    """

    start: int
    end: int
    size: int = 4
    length_penalty: float = 1.0
    longest: int = 128
    cached: bool = True

    def __post_init__(self) -> None:
        if self.size < 1 or self.longest < 1:
            raise ValueError("a beam's size and its longest output must be at least 1")


@dataclass
class _Best:
    """The hypotheses of one sentence that ended or were cut off, at most ``size``: (score, tokens without the end)."""

    size: int
    found: list[tuple[float, list[int]]] = field(default_factory=list)

    def add(self, score: float, tokens: list[int]) -> None:
        if self.size == 1 and self.found:
            return  # greedy: the first is the only one
        self.found = sorted([*self.found, (score, tokens)], key=lambda one: -one[0])[: self.size]

    def settled(self, hope: float) -> bool:
        """Whether there are enough of them, none worse than the best that may still come; one beam takes what it finds."""
        return len(self.found) == self.size and (self.size == 1 or self.found[-1][0] >= hope)


@torch.no_grad()
def beam_search(model: EncoderDecoder, source: Tensor, real: Tensor | None, beam: Beam) -> list[list[int]]:
    """The best hypothesis for each column of source [s, b], without start and end token. The model is in evaluation mode."""
    if beam.longest > model.cfg.max_positions:
        raise ValueError(
            f"outputs of {beam.longest} tokens were asked for, and the model takes {model.cfg.max_positions}"
        )
    k, batch = beam.size, source.shape[1]
    memory = model.encode(source, real).repeat_interleave(k, 1)
    real = None if real is None else real.repeat_interleave(k, 1)
    following = _Scorer(model, memory, real, beam)
    device = memory.device
    tokens = torch.full((1, batch * k), beam.start, device=device)
    # In the beginning all hypotheses of a sentence are the same: the first alone counts.
    scores = torch.full((batch, k), -torch.inf, dtype=torch.float64, device=device)
    scores[:, 0] = 0.0
    best = [_Best(k) for _ in range(batch)]
    going = list(range(batch))  # sentences that are not settled: the columns of tokens and scores, k for each
    for length in range(1, beam.longest + 1):
        logp = following(tokens).double().log_softmax(-1).view(len(going), k, -1)
        vocabulary = logp.shape[-1]
        # Of 2k continuations at most k end, so that k go on.
        top, place = (scores[..., None] + logp).flatten(1).topk(min(2 * k, k * vocabulary))
        rows, scores = _go_on(tokens, top, place, vocabulary, [best[i] for i in going], beam, length)
        hopes = _hopes(scores, length, beam)
        left = [at for at, i in enumerate(going) if not best[i].settled(hopes[at])]
        if not left:
            break
        columns = torch.tensor(left, device=device)
        rows, scores = rows[columns], scores[columns]
        index = (rows // vocabulary + columns[:, None] * k).flatten()
        tokens = torch.cat([tokens[:, index], (rows % vocabulary).view(1, -1)])
        following.select(index, fewer=len(left) < len(going))
        going = [going[at] for at in left]
    return [one.found[0][1] for one in best]


def _go_on(
    tokens: Tensor, top: Tensor, place: Tensor, vocabulary: int, best: list[_Best], beam: Beam, length: int
) -> tuple[Tensor, Tensor]:
    """Note the hypotheses that end, or are cut off at ``longest``; the places [b, k] and scores [b, k] of those that go on."""
    k = beam.size
    ends = place % vocabulary == beam.end
    done = ends if length < beam.longest else torch.ones_like(ends)
    for i, rank in done[:, :k].nonzero().tolist():
        if top[i, rank] > -torch.inf:
            row, word = divmod(int(place[i, rank]), vocabulary)
            said = tokens[1:, i * k + row].tolist() + ([] if ends[i, rank] else [word])
            best[i].add(float(top[i, rank]) / length**beam.length_penalty, said)
    # The first k that do not end, in their order: a stable sort puts those that end behind.
    order = ends.long().argsort(dim=1, stable=True)[:, :k]
    scores = top.gather(1, order).masked_fill(ends.gather(1, order), -torch.inf)
    return place.gather(1, order), scores


def _hopes(scores: Tensor, length: int, beam: Beam) -> list[float]:
    """For scores [b, k], the most that a hypothesis of each sentence which goes on may still count: no further loss, at the
    length that favours it most."""
    favour = (beam.longest if beam.length_penalty > 0 else length) ** beam.length_penalty
    return [float(best) / favour for best in scores.amax(1).tolist()]


class _Scorer:
    """tokens [n, b k] -> scores [b k, v] of what follows them."""

    def __init__(self, model: EncoderDecoder, memory: Tensor, real: Tensor | None, beam: Beam) -> None:
        self.model, self.memory, self.real = model, memory, real
        self.cache = Cache() if beam.cached else None

    def __call__(self, tokens: Tensor) -> Tensor:
        if self.cache is not None:
            return self.model.step(tokens[-1], len(tokens) - 1, self.memory, self.real, self.cache)
        return self.model.scores(tokens, self.memory, self.real)[-1]

    def select(self, rows: Tensor, *, fewer: bool) -> None:
        """Go on with these columns, fewer than before where sentences are settled."""
        if fewer:
            self.memory = self.memory.index_select(1, rows)
            self.real = None if self.real is None else self.real.index_select(1, rows)
        if self.cache is not None:
            self.cache.select(rows, fewer=fewer)
