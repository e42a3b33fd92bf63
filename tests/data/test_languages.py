"""Several directions of translation: their shares of an epoch, their tags, their place in a run."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megnorm.config import ConfigError, load
from megnorm.data.batch import PairBatch
from megnorm.data.choose import open_split
from megnorm.data.config import DataConfig, PairConfig
from megnorm.data.errors import DataError
from megnorm.data.indexed import IndexedWriter
from megnorm.data.languages import shares
from megnorm.data.pairs import PairLoader

COUNTS = {"de": 600, "fr": 60, "zh": 6}
FIRST = {"de": 1000, "fr": 2000, "zh": 3000}  # ids that only this language has
TAGS = {"de": 4, "fr": 5, "zh": 6, "en": 7}
SIZES = {"sequence_length": 16, "seed": 5, "vocab_size": 4000}


def write_tokenizer(path: Path) -> str:
    from tokenizers import Tokenizer, models

    names = ["<pad>", "<s>", "</s>", "<unk>", *(f"<2{name}>" for name in TAGS)]
    Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>")).save(str(path))
    return str(path)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Pair i of a language is (8 + i, 9) and (first + i, 2), so that every row tells where it comes from."""
    folder = tmp_path_factory.mktemp("languages")
    for name, count in COUNTS.items():
        for side, rows in (
            ("_0", [[8 + i] + [9] * (i % 5 + 1) for i in range(count)]),
            ("_1", [[FIRST[name] + i, 2] for i in range(count)]),
        ):
            with IndexedWriter(f"{folder / name}{side}", "uint16") as writer:
                for row in rows:
                    writer.add_document(row)
    options = PairConfig(tokens_per_batch=64, longest=8, languages=tuple(("en", name) for name in COUNTS))
    paths = tuple(str(folder / name) for name in COUNTS)
    tokenizer = write_tokenizer(folder / "tokenizer.json")
    return DataConfig(path=paths, task="pairs", tokenizer=tokenizer, start=1, pairs=options)


def opened(config: DataConfig, **pairs: Any) -> PairLoader:
    one = open_split(replace(config, pairs=replace(config.pairs, **pairs)), "train", **SIZES)
    assert isinstance(one, PairLoader)
    return one


def rows(batches: list[PairBatch]) -> list[tuple[list[int], int, list[int]]]:
    """Source, first token of the decoder, and target of every pair."""
    found = []
    for batch in batches:
        for i in range(batch.source.shape[1]):
            source = batch.source[:, i][batch.source_mask[:, i] > 0].tolist()
            found.append((source, int(batch.tokens[0, i]), batch.labels[:, i][batch.loss_mask[:, i] > 0].tolist()))
    return found


def test_the_share_of_a_direction() -> None:
    """(n_i / sum n)^(1 / T), brought to a sum of 1."""
    assert shares([600, 300, 100], 1.0).tolist() == pytest.approx([0.6, 0.3, 0.1], rel=1e-12)
    roots = np.sqrt([0.8, 0.2])
    assert shares([8, 2], 2.0).tolist() == pytest.approx((roots / roots.sum()).tolist(), rel=1e-12)
    assert shares([1000, 1], 1e9).tolist() == pytest.approx([0.5, 0.5], abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_epochs_hold_the_shares(config: DataConfig, temperature: float) -> None:
    """Over some epochs each direction comes as often as it should, and its pairs equally often."""
    one, epochs = opened(config, temperature=temperature), 4
    seen = np.concatenate([np.concatenate(one.buckets(epoch)) for epoch in range(epochs)])
    wanted = shares(list(COUNTS.values()), temperature) * sum(COUNTS.values()) * epochs
    for direction, count in zip(one.directions, wanted, strict=True):
        own = seen[(seen >= direction.first) & (seen < direction.first + len(direction.sizes))]
        assert abs(len(own) - count) <= 1
        times = np.bincount(own - direction.first, minlength=len(direction.sizes))
        assert times.max() - times.min() <= 1
    if temperature == 1.0:
        assert np.array_equal(np.sort(np.concatenate(one.buckets(2))), one.kept)
    first, second = (np.concatenate(one.buckets(epoch)) for epoch in (0, 1))
    assert not np.array_equal(np.sort(first), np.sort(second)) or temperature == 1.0


def test_a_single_direction_is_read_as_before(config: DataConfig) -> None:
    """Whatever the temperature, every pair once; and a checkpoint without the mixture goes on."""
    assert isinstance(config.path, tuple)
    alone = replace(config, path=config.path[0])
    plain, warm = opened(alone, languages=()), opened(alone, languages=(), temperature=7.0)
    assert all(np.array_equal(a, b) for a, b in zip(plain.buckets(3), warm.buckets(3), strict=True))
    assert np.array_equal(np.sort(np.concatenate(plain.buckets(3))), plain.kept)
    old = {name: value for name, value in plain.state(9).items() if name != "mixture"}
    options = replace(config.pairs, languages=())
    assert open_split(replace(alone, pairs=options), "train", **SIZES, state=old).samples() == plain.samples()
    with pytest.raises(DataError, match=r"mixture of directions.*is \[1\.0, 'source', \[4\]\] now"):
        open_split(replace(alone, pairs=replace(options, languages=(("en", "de"),))), "train", **SIZES, state=old)


@pytest.mark.parametrize("tag_on", ["source", "target"])
def test_every_row_has_the_tag_of_its_language(config: DataConfig, tag_on: str) -> None:
    one = opened(config, temperature=5.0, tag_on=tag_on)
    seen = set()
    for source, first, target in rows(one.batch(0, one.samples())):
        name = next(name for name in COUNTS if 0 <= target[0] - FIRST[name] < COUNTS[name])
        number = target[0] - FIRST[name]
        plain = [8 + number] + [9] * (number % 5 + 1)
        assert (source, first) == (([TAGS[name], *plain], 1) if tag_on == "source" else (plain, TAGS[name]))
        seen.add(name)
    assert seen == set(COUNTS)


def test_both_ways(config: DataConfig) -> None:
    """Backwards a pair's target is its source, and the tag is that of the first language."""
    one = opened(config, both_ways=True)
    found = rows(one.batch(0, one.samples()))
    assert len(found) == 2 * sum(COUNTS.values())
    back = [(source, target) for source, _, target in found if source[0] == TAGS["en"]]
    assert len(back) == sum(COUNTS.values())
    assert all(source[1] >= 1000 and source[-1] == 2 and target[0] < 1000 for source, target in back)


def test_the_tag_counts_in_the_length(config: DataConfig) -> None:
    """Sources have 2 to 6 tokens; with the tag the longest have 7."""
    assert opened(config, longest=6, tag_on="target").dropped == 0
    one = opened(config, longest=6)
    assert one.dropped == sum(len(range(4, count, 5)) for count in COUNTS.values())
    assert max(len(source) for source, _, _ in rows(one.batch(0, one.samples()))) == 6


def test_samples_do_not_depend_on_ranks_or_restarts(config: DataConfig) -> None:
    one = opened(config, temperature=5.0, both_ways=True)
    first = one.samples() - 4  # over the end of the first epoch
    whole = one.batch(first, 12)
    own = replace(config, pairs=replace(config.pairs, temperature=5.0, both_ways=True))
    for dp in (2, 3):
        again = open_split(own, "train", **SIZES, state=one.state(first))
        parts = [batch for rank in range(dp) for batch in again.batch(first, 12, rank, dp)]
        for a, b in zip(parts, whole, strict=True):
            assert (
                torch.equal(a.source, b.source) and torch.equal(a.tokens, b.tokens) and torch.equal(a.labels, b.labels)
            )
    other = open_split(own, "train", **{**SIZES, "seed": 6}).batch(first, 12)
    assert any(
        a.source.shape != b.source.shape or not torch.equal(a.source, b.source)
        for a, b in zip(other, whole, strict=True)
    )
    with pytest.raises(DataError, match="mixture of directions"):
        open_split(config, "train", **SIZES, state={**one.state(0), "content": opened(config).state(0)["content"]})


def test_what_cannot_be(config: DataConfig) -> None:
    languages = config.pairs.languages
    for pairs, sizes, match in (
        ({"languages": languages[:2]}, {}, r"data\.pairs\.languages names 2 pairs of languages for 3 paths"),
        ({"tag": "[{}]"}, {}, r"data\.pairs\.tag: the tokenizer has no token \[de\]"),
        ({}, {"vocab_size": 3006}, None),
        ({}, {"vocab_size": 3005}, "holds token id 3005"),
    ):
        changed = replace(config, pairs=replace(config.pairs, **pairs))
        if match is None:
            open_split(changed, "train", **SIZES | sizes)
            continue
        with pytest.raises(DataError, match=match):
            open_split(changed, "train", **SIZES | sizes)
    with pytest.raises(DataError, match="data.tokenizer is needed"):
        open_split(replace(config, tokenizer=None), "train", **SIZES)
    for override, match in (
        ("data.pairs.temperature=0.5", "data.pairs.temperature is 0.5; give a number from 1"),
        ("data.pairs.temperature=.inf", "data.pairs.temperature is inf"),
        ("data.pairs.both_ways=true", "name data.pairs.languages"),
        ("data.pairs.tag_on=target", "there are none; name data.pairs.languages"),
        ("data.pairs.tag=<de>", "data.pairs.tag is <de>; write {} where"),
    ):
        with pytest.raises(ConfigError, match=match):
            load(None, [override])
