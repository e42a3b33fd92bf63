"""Beam search finds what a search of everything finds, and caches change nothing."""

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megnorm.infer.beam import Beam, beam_search
from megnorm.layers.cache import Cache
from megnorm.layers.env import Env
from megnorm.models.build import build_model
from megnorm.models.config import InitConfig, ModelConfig
from megnorm.norms.config import NormConfig

# Large weights, so that outputs differ much from each other.
TINY = ModelConfig(
    family="encdec", layers=2, width=16, heads=4, kv_heads=2, ffn=24, vocab_size=7, max_positions=16, activation="gelu",
    shared_embedding=True, init=InitConfig(std=0.4),
)  # fmt: skip
MODELS = {
    "rotary": TINY,
    "learned": replace(TINY, positions="learned", norm=NormConfig("deepnorm", {"embedding_norm": True})),
    "sinusoidal": replace(TINY, positions="sinusoidal", norm=NormConfig("normformer"), bias=True),
    "relative": replace(TINY, positions="none", relative_buckets=8, relative_distance=12, norm=NormConfig("postln")),
    "norms on k and v": replace(TINY, norm=NormConfig("hybridnorm_star")),
}
START, END = 1, 2


def model_of(cfg: ModelConfig, seed: int = 3) -> Any:
    return build_model(cfg, Env(dtype=torch.float64), seed=seed).eval()


def sources(batch: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    real = torch.ones(9, batch, dtype=torch.bool)
    for column in range(batch):
        real[9 - column :, column] = False
    return torch.randint(3, 7, (9, batch), generator=generator), real


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", [1, 3])
def test_caches_change_nothing(name: str, size: int) -> None:
    model, beam = model_of(MODELS[name]), Beam(START, END, size, 3.0, longest=10)
    found = beam_search(model, *sources(), beam)
    assert found == beam_search(model, *sources(), replace(beam, cached=False))
    assert size > 1 or max(map(len, found)) > 1


@pytest.mark.parametrize("name", MODELS)
def test_a_step_says_what_all_tokens_say(name: str) -> None:
    """Scores of every step, after random tokens whose rows change places on the way."""
    model, (source, real), cache = model_of(MODELS[name]), sources(), Cache()
    tokens = torch.randint(0, 7, (9, 4), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        memory = model.encode(source, real).repeat_interleave(2, 1)[:, :4]
        mine = real.repeat_interleave(2, 1)[:, :4]
        for at in range(9):
            step = model.step(tokens[at], at, memory, mine, cache)
            torch.testing.assert_close(step, model.scores(tokens[: at + 1], memory, mine)[-1], rtol=1e-9, atol=1e-10)
            rows = torch.tensor([1, 0, 3, 3])  # of the same sentences
            tokens = tokens[:, rows]
            cache.select(rows)


def test_a_sentence_does_not_depend_on_its_batch() -> None:
    model, beam = model_of(MODELS["relative"]), Beam(START, END, 3, longest=10)
    source, real = sources()
    alone = [beam_search(model, source[:, [i]], real[:, [i]], beam)[0] for i in range(4)]
    assert beam_search(model, source, real, beam) == alone
    short = 9 - 3
    assert beam_search(model, source[:short, [3]], None, beam) == alone[3:]


def test_one_beam_is_greedy() -> None:
    model = model_of(MODELS["sinusoidal"])
    source, real = sources()
    memory, tokens = model.encode(source, real), torch.full((1, 4), START)
    with torch.no_grad():
        for _ in range(10):
            tokens = torch.cat([tokens, model.scores(tokens, memory, real)[-1].argmax(-1)[None]])
    expected = [list(itertools.takewhile(lambda word: word != END, row)) for row in tokens[1:].t().tolist()]
    assert beam_search(model, source, real, Beam(START, END, 1, longest=10)) == expected


class Told:
    """A model that says what follows a prefix as it was told; the other words share what is left."""

    cfg = TINY

    def __init__(self, following: dict[tuple[int, ...], dict[int, float]]) -> None:
        self.following = following

    def encode(self, source: Tensor, real: Tensor | None) -> Tensor:
        return torch.zeros(1, source.shape[1], 1)

    def scores(self, tokens: Tensor, memory: Tensor, real: Tensor | None) -> Tensor:
        rows = []
        for prefix in tokens[1:].t().tolist():
            told = self.following.get(tuple(prefix), {})
            rest = max(1.0 - sum(told.values()), 1e-9) / (7 - len(told))
            rows.append([told.get(word, rest) for word in range(7)])
        return torch.tensor([rows], dtype=torch.float64).log()

    def found(self, beam: Beam) -> list[int]:
        model: Any = self
        return beam_search(model, torch.zeros(2, 1), None, replace(beam, cached=False))[0]


A, B = 3, 4


def test_hypotheses_differ_from_the_first_word_on() -> None:
    """The best of all begins with the second best word, so that two beams must not both begin with the best."""
    model = Told({(): {A: 0.5, B: 0.4}, (A,): {A: 0.3, B: 0.3, END: 0.2}, (B,): {END: 0.95}})
    assert model.found(Beam(START, END, 2, 0.0, longest=4)) == [B]


def test_length_counts_as_it_says() -> None:
    """Logarithms 1 : 1.45 at lengths 2 and 3, with the end: the longer one wins where 1.5 ** penalty is above 1.45."""
    model = Told({(): {A: 0.4, B: 0.4**1.45}, (A,): {END: 1.0}, (B,): {B: 1.0}, (B, B): {END: 1.0}})
    assert model.found(Beam(START, END, 2, 1.0, longest=8)) == [B, B]
    assert model.found(Beam(START, END, 2, 0.9, longest=8)) == [A]


def test_the_search_ends_when_nothing_better_can_come() -> None:
    """Two have ended after two words, and the one that goes on is better than both in the end, because it is long."""
    sure = {(A,) * n: {A: 1.0} for n in range(2, 5)} | {(A,) * 5: {END: 1.0}}
    model = Told({(): {END: 0.5, A: 0.4}, (A,): {END: 0.5, A: 0.49}, **sure})
    assert model.found(Beam(START, END, 2, 1.0, longest=8)) == [A] * 5
    assert model.found(Beam(START, END, 2, 0.0, longest=8)) == []
    assert model.found(Beam(START, END, 1, 1.0, longest=8)) == [], "one beam is greedy"


@pytest.mark.parametrize("penalty", [0.0, 0.6, 1.5])
def test_a_wide_beam_finds_the_best_of_all(penalty: float) -> None:
    """4 words of which one ends, up to 4 long: 3^3 hypotheses at most that go on; those cut off count too."""
    cfg = replace(TINY, vocab_size=4)
    model, (source, real) = model_of(cfg, seed=1), sources(2)
    source = source % 4
    found = beam_search(model, source, real, Beam(START, END, 40, penalty, longest=4))
    for column in range(2):
        memory, mine = model.encode(source[:, [column]], real[:, [column]]), real[:, [column]]
        best: tuple[float, list[int]] = (-math.inf, [])
        for length in range(5):
            for words in itertools.product((0, 1, 3), repeat=length):
                whole = (*words, END)[:4]
                tokens = torch.tensor([START, *words])[:, None]
                with torch.no_grad():
                    logp = model.scores(tokens, memory, mine)[:, 0].log_softmax(-1)
                score = float(sum(logp[i, word] for i, word in enumerate(whole))) / len(whole) ** penalty
                best = max(best, (score, list(words)))
        assert found[column] == best[1]


def test_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Beam(START, END, 0)
    with pytest.raises(ValueError, match="17 tokens were asked for, and the model takes 16"):
        beam_search(model_of(TINY), *sources(), Beam(START, END, longest=17))
