"""Masked, span, fill-in-the-middle, pair and class data: what every sample must satisfy, on the shared texts."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megnorm.data.classes import ClassLoader, read_examples
from megnorm.data.config import DataConfig
from megnorm.data.denoising import MaskedLoader, SpanLoader, word_table
from megnorm.data.errors import DataError
from megnorm.data.loader import Loader
from megnorm.data.pairs import PairLoader
from megnorm.data.preprocess import Job, run
from megnorm.data.tasks import MaskConfig, corrupt_spans, fill_in_the_middle, mask
from megnorm.data.tokenizer import HuggingFace, load
from tests.data.helpers import numbered, write

SPECIAL = np.arange(100) < 5


@given(
    row=st.lists(st.integers(0, 99), min_size=1, max_size=200),
    unit=st.sampled_from(["token", "word", "span"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_mask_obeys_its_rules(row: list[int], unit: str, seed: int) -> None:
    tokens, begins = np.array(row), np.arange(100) % 3 != 0
    out, chosen = mask(
        tokens,
        np.random.RandomState(seed),
        MaskConfig(unit=unit),
        mask_id=4,
        vocab_size=100,
        special=SPECIAL,
        begins_word=begins,
    )
    free = ~SPECIAL[tokens]
    assert not chosen[~free].any() and np.array_equal(out[~chosen], tokens[~chosen])
    budget = round(0.15 * free.sum())
    if unit == "token":
        assert chosen.sum() == budget
    else:  # a chosen token's whole word is chosen
        inside = free[1:] & free[:-1] & ~begins[tokens[1:]]
        assert np.array_equal(chosen[1:][inside], chosen[:-1][inside]) or unit == "span"
    assert chosen.any() or budget == 0
    assert not SPECIAL[out[chosen & (out != 4)]].any() if chosen.any() else True


def test_shares_of_mask_keep_and_swap() -> None:
    row, config = np.full(200_000, 50), MaskConfig()
    out, chosen = mask(row, np.random.RandomState(0), config, mask_id=4, vocab_size=100, special=SPECIAL)
    shares = [(out[chosen] == 4).mean(), (out[chosen] == 50).mean()]
    assert chosen.sum() == 30_000
    assert np.allclose(shares, [0.8, 0.1 + 0.1 / 95], atol=0.01)


@given(row=st.lists(st.integers(10, 99), min_size=2, max_size=300), seed=st.integers(0, 2**32 - 1))
def test_spans_can_be_put_back(row: list[int], seed: int) -> None:
    marks = list(range(200, 260))
    source, target = corrupt_spans(
        np.array(row), np.random.RandomState(seed), density=0.15, mean_span=3, sentinels=marks, eos=1
    )
    assert source[-1] == target[-1] == 1
    gone: dict[int, list[int]] = {}
    for token in target[:-1].tolist():
        if token >= 200:
            gone[token] = []
            last = token
        else:
            gone[last].append(token)
    back = [t for token in source[:-1].tolist() for t in (gone[token] if token >= 200 else [token])]
    assert back == row
    assert sum(map(len, gone.values())) == min(max(round(len(row) * 0.15), 1), len(row) - 1)


@given(piece=st.lists(st.integers(10, 99), min_size=8, max_size=80), seed=st.integers(0, 2**32 - 1))
def test_fill_in_the_middle_keeps_the_text(piece: list[int], seed: int) -> None:
    for spm in (0.0, 1.0):
        out = fill_in_the_middle(np.array(piece + [99] * 9), np.random.RandomState(seed), (1, 2, 3), spm).tolist()
        assert len(out) == len(piece) + 9 and (spm == 1.0 or out[0] == 1)
        if all(mark in out for mark in (1, 2, 3)) and spm == 0.0:
            prefix, rest = out[1 : out.index(3)], out[out.index(3) + 1 :]
            suffix, middle = rest[: rest.index(2)], rest[rest.index(2) + 1 :]
            whole = prefix + middle
            assert whole == (piece + [99] * 9)[: len(whole)] or not middle
            assert (piece + [99] * 9)[len(piece) + 9 - len(suffix) :] == suffix


def test_fill_in_the_middle_in_the_loader(tmp_path: Path) -> None:
    path = numbered(tmp_path / "x", 4000, vocab=5000)
    config = DataConfig(path=path, split=(1, 0, 0), fim_rate=0.5, fim_tokens=(6001, 6002, 6003))
    one = Loader(config, "train", sequence_length=64, seed=1, vocab_size=7000)
    whole = one.batch(0, 40).tokens
    assert torch.equal(torch.cat([one.batch(0, 40, r, 4).tokens for r in range(4)], dim=1), whole)
    marked = (whole == 6001).any(dim=0).float().mean()
    assert 0.3 < marked < 0.8
    with pytest.raises(DataError, match="three ids"):
        Loader(replace(config, fim_tokens=()), "train", sequence_length=64, seed=1, vocab_size=7000)


@pytest.fixture(scope="module")
def words(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The shared validation text in WordPiece: (prefix, tokenizer)."""
    out, tokenizer = tmp_path_factory.mktemp("words") / "valid", str(shared / "data/tokenizers/wordpiece8k-en")
    source = str(shared / "data/text/valid.jsonl.gz")
    run(Job((source,), str(out), tokenizer, append_eod=False, progress=False))
    return str(out), tokenizer


@pytest.mark.parametrize("unit", ["token", "word", "span"])
def test_masked_rows(words: tuple[str, str], unit: str) -> None:
    path, tokenizer = words
    config, options = DataConfig(path=path, tokenizer=tokenizer, split=(1, 0, 0)), MaskConfig(unit=unit)
    one = MaskedLoader(config, "train", options, sequence_length=128, seed=5, vocab_size=8192)
    batch = one.batch(10, 16)
    share = batch.loss_mask.mean().item()
    assert 0.12 < share < 0.18
    same = batch.tokens == batch.labels
    assert same[batch.loss_mask == 0].all() and not same[batch.loss_mask == 1].all()
    masked = (batch.tokens == 4)[batch.loss_mask == 1].float().mean().item()
    assert 0.7 < masked < 0.9
    parts = [one.batch(10, 16, rank, 4) for rank in range(4)]
    assert torch.equal(torch.cat([part.tokens for part in parts], dim=1), batch.tokens)
    epoch = one.samples()
    again = {tuple(row): mask for row, mask in zip(*_rows(one.batch(epoch, epoch)), strict=True)}
    moved = [again[tuple(row)] != mask for row, mask in zip(*_rows(batch), strict=True) if tuple(row) in again]
    assert all(moved)


def _rows(batch: object) -> tuple[list, list]:
    return batch.labels.T.tolist(), batch.loss_mask.T.tolist()


def test_word_starts_of_three_kinds(shared: Path) -> None:
    for name in ("wordpiece8k-en", "bpe4k-en", "unigram8k-multi"):
        tokenizer = load(str(shared / "data/tokenizers" / name))
        assert isinstance(tokenizer, HuggingFace)
        special, begins = word_table(tokenizer, tokenizer.vocab_size)
        ids = tokenizer.encode_batch(["the quick brown unbelievable foxes"])[0]
        assert begins[ids][1:].sum() == 4 and not special[ids].any()
        assert special[:2].all()


def test_span_pairs(tmp_path: Path) -> None:
    config = DataConfig(path=numbered(tmp_path / "x", 5000, vocab=1000), split=(1, 0, 0))
    one = SpanLoader(
        config, "train", sentinels=range(1100, 1164), eos=1001, sequence_length=64, seed=1, vocab_size=1200
    )
    pairs = one.pairs(3, 4)
    plain = one.batch(3, 4)
    source, labels = pairs.source.T.numpy(), pairs.labels.T.numpy()
    for row in range(4):
        seen = [t for t in (*source[row], *labels[row]) if 0 < t < 1000]
        assert Counter(seen) == Counter(t for t in plain.tokens.T.tolist()[row] if t > 0)
    assert torch.equal(pairs.tokens[1:][pairs.loss_mask[1:] > 0], pairs.labels[:-1][pairs.loss_mask[1:] > 0])
    assert (pairs.tokens[0] == 0).all()


def test_translation_pairs(shared: Path, tmp_path: Path) -> None:
    source, tokenizer = shared / "data/parallel/valid.en-de.tsv", shared / "data/tokenizers/unigram8k-multi"
    run(Job((str(source),), str(tmp_path / "p"), str(tokenizer), keys=("0", "1"), eod_token="</s>", progress=False))
    options = {
        "tokens_per_batch": 1024,
        "seed": 2,
        "vocab_size": 8192,
        "start": 2,
        "pad": 0,
        "multiple": 2,
        "longest": 128,
    }
    one = PairLoader(str(tmp_path / "p_0"), str(tmp_path / "p_1"), **options)
    batches = one.batches(0)
    seen = np.concatenate(batches)
    assert len(seen) == len(set(seen.tolist())) and len(seen) >= 890 - one.dropped - 2 * 2
    padded = real = 0
    for number in range(len(batches)):
        batch = one.batch(0, number)
        assert batch.source.shape[1] % 2 == 0
        longest = max(batch.source.shape[0], batch.labels.shape[0])
        assert longest * batch.source.shape[1] <= 1024
        padded += batch.source.numel() + batch.labels.numel()
        real += int(batch.source_mask.sum() + batch.loss_mask.sum())
    assert real / padded > 0.7
    parts = [one.batch(1, 3, rank, 2) for rank in (0, 1)]
    assert sum(part.source.shape[1] for part in parts) == one.batch(1, 3).source.shape[1]
    words = load(str(tokenizer))
    line = source.read_text().splitlines()[0].split("\t")
    first = one.source.document(0)[0].tolist()
    assert words.decode(first).replace("</s>", "").strip() == line[0]
    write(tmp_path / "short", [[1]])
    with pytest.raises(DataError, match="side by side"):
        PairLoader(str(tmp_path / "p_0"), str(tmp_path / "short"), **options)


@pytest.mark.parametrize(("task", "columns", "count"), [("wntopic", 1, 10), ("wnhyper", 2, 2), ("wnsense", 3, 2)])
def test_classes(shared: Path, task: str, columns: int, count: int) -> None:
    tokenizer = load(str(shared / "data/tokenizers/wordpiece8k-en"))
    path = shared / f"data/tasks/{task}.valid.tsv"
    options = {"sequence_length": 32, "seed": 1, "begin": 2, "end": 3, "pad": 0}
    one = ClassLoader(str(path), tokenizer, **options)
    assert len(one.classes) == count and one.samples() == len(path.read_text().splitlines()) - 1
    batch = one.batch(0, one.samples())
    assert sorted(batch.classes.tolist()) == sorted(one.labels.tolist())
    assert (batch.tokens[0] == 2).all()
    assert ((batch.tokens == 3).sum(dim=0) == columns).all()
    assert torch.equal(batch.mask == 0, batch.tokens == 0)
    assert batch.segments.max() == columns - 1
    plain = one.batch(0, 3, shuffle=False)
    assert plain.classes.tolist() == one.labels[:3].tolist()
    with pytest.raises(DataError, match="not among"):
        ClassLoader(str(path), tokenizer, classes=("x",), **options)


def test_a_ragged_table_is_told(tmp_path: Path) -> None:
    (tmp_path / "x.tsv").write_text("a\tlabel\nb\t1\nc\n")
    with pytest.raises(DataError, match=r"x\.tsv:3: 1 columns"):
        read_examples(str(tmp_path / "x.tsv"))
