"""Masked, span, fill-in-the-middle, pair and class data: what every sample must satisfy, on the shared texts."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megnorm.data.choose import open_split
from megnorm.data.classes import ClassLoader, read_examples
from megnorm.data.config import ClassConfig, DataConfig, MaskConfig, PairConfig, SpanConfig
from megnorm.data.denoising import MaskedLoader, SpanLoader, word_table
from megnorm.data.errors import DataError
from megnorm.data.loader import Loader
from megnorm.data.pairs import PairLoader
from megnorm.data.preprocess import Job, run
from megnorm.data.tasks import corrupt_spans, fill_in_the_middle, mask
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
    path = write(tmp_path / "x", [[*range(100 * i, 100 * i + 40), 6000] for i in range(50)])
    config = DataConfig(path=path, split=(1, 0, 0), eod=6000, fim_rate=0.5, fim_tokens=(6001, 6002, 6003))
    sizes = {"sequence_length": 64, "seed": 1, "vocab_size": 7000}
    one = open_split(config, "train", **sizes)
    whole = one.batch(0, 30).tokens
    assert torch.equal(torch.cat([one.batch(0, 30, r, 3).tokens for r in range(3)], dim=1), whole)
    marked = (whole == 6001).any(dim=0).float().mean()
    assert 0.3 < marked < 1.0
    plain = open_split(replace(config, fim_rate=0.0), "train", **sizes).batch(0, 30).tokens
    assert torch.equal(whole == 6000, plain == 6000) and not torch.equal(whole, plain)  # documents end where they did
    with pytest.raises(DataError, match="three ids"):
        open_split(replace(config, fim_tokens=()), "train", **sizes)
    with pytest.raises(DataError, match="below model.vocab_size=6002"):
        open_split(config, "train", **{**sizes, "vocab_size": 6002})
    with pytest.raises(DataError, match="fim_rate is 2"):
        open_split(replace(config, fim_rate=2.0), "train", **sizes)


@pytest.fixture(scope="module")
def words(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The shared validation text in WordPiece: (prefix, tokenizer)."""
    out, tokenizer = tmp_path_factory.mktemp("words") / "valid", str(shared / "data/tokenizers/wordpiece8k-en")
    source = str(shared / "data/text/valid.jsonl.gz")
    run(Job((source,), str(out), tokenizer, append_eod=False, progress=False))
    return str(out), tokenizer


def masked(words: tuple[str, str], length: int = 128, **options: object) -> MaskedLoader:
    path, tokenizer = words
    config = DataConfig(path=path, task="masked", tokenizer=tokenizer, split=(1, 0, 0), mask=MaskConfig(**options))
    found = open_split(config, "train", sequence_length=length, seed=5, vocab_size=8192)
    assert isinstance(found, MaskedLoader)
    return found


@pytest.mark.parametrize("unit", ["token", "word", "span"])
def test_masked_rows(words: tuple[str, str], unit: str) -> None:
    one = masked(words, unit=unit)
    batch = one.batch(10, 16)
    share = batch.loss_mask.mean().item()
    assert 0.12 < share < 0.18
    same = batch.tokens == batch.labels
    assert same[batch.loss_mask == 0].all() and not same[batch.loss_mask == 1].all()
    hidden = (batch.tokens == 4)[batch.loss_mask == 1].float().mean().item()
    assert 0.7 < hidden < 0.9
    parts = [one.batch(10, 16, rank, 4) for rank in range(4)]
    assert torch.equal(torch.cat([part.tokens for part in parts], dim=1), batch.tokens)
    epoch = one.samples()
    again = {tuple(row): mask for row, mask in zip(*_rows(one.batch(epoch, epoch)), strict=True)}
    moved = [again[tuple(row)] != mask for row, mask in zip(*_rows(batch), strict=True) if tuple(row) in again]
    assert all(moved)


def test_masked_rows_in_a_frame(words: tuple[str, str]) -> None:
    one = masked(words, begin="[CLS]", end="[SEP]")
    batch = one.batch(0, 8)
    assert batch.tokens.shape == (128, 8)
    for tensor in (batch.tokens, batch.labels):
        assert (tensor[0] == 2).all() and (tensor[-1] == 3).all()
    assert not batch.loss_mask[[0, -1]].any() and batch.loss_mask.sum() > 8
    assert torch.equal(batch.labels[1:-1], one.rows.batch(0, 8).tokens)
    the = load(words[1]).token_id("the")
    other = masked(words, token="the").batch(0, 8)
    assert (other.labels == the).any() and not (other.labels == the)[other.loss_mask == 1].any()
    with pytest.raises(DataError, match="no token <nothing>"):
        masked(words, begin="<nothing>")
    with pytest.raises(DataError, match="begin or data.mask.end was 126"):
        Loader(one.rows.config, "train", sequence_length=128, seed=5, vocab_size=8192, state=one.state(3), framing=0)


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
    path = numbered(tmp_path / "x", 5000, vocab=1000)
    config = DataConfig(path=path, task="spans", split=(1, 0, 0), eod=1001, spans=SpanConfig(sentinels=(1163, 1100)))
    sizes = {"sequence_length": 64, "seed": 1, "vocab_size": 1200}
    one = open_split(config, "train", **sizes)
    assert isinstance(one, SpanLoader) and one.sentinels == list(range(1163, 1099, -1))
    pairs = one.batch(3, 4)
    plain = one.rows.batch(3, 4)
    source, labels = pairs.source.T.numpy(), pairs.labels.T.numpy()
    for row in range(4):
        seen = [t for t in (*source[row], *labels[row]) if 0 < t < 1000]
        assert Counter(seen) == Counter(t for t in plain.tokens.T.tolist()[row] if t > 0)
    assert torch.equal(pairs.tokens[1:][pairs.loss_mask[1:] > 0], pairs.labels[:-1][pairs.loss_mask[1:] > 0])
    assert (pairs.tokens[0] == 0).all()
    assert (open_split(replace(config, start=7), "train", **sizes).batch(3, 4).tokens[0] == 7).all()
    with pytest.raises(DataError, match="uses token id 1163, model.vocab_size is 1100"):
        open_split(config, "train", **{**sizes, "vocab_size": 1100})
    with pytest.raises(DataError, match="data.tokenizer is needed for data.task=spans"):
        open_split(replace(config, spans=SpanConfig()), "train", **sizes)
    with pytest.raises(DataError, match="data.eod is needed"):
        open_split(replace(config, eod=None), "train", **sizes)


@pytest.fixture(scope="module")
def pairs(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """The shared English-German validation pairs."""
    out = str(tmp_path_factory.mktemp("pairs") / "p")
    source, tokenizer = shared / "data/parallel/valid.en-de.tsv", shared / "data/tokenizers/unigram8k-multi"
    run(Job((str(source),), out, str(tokenizer), keys=("0", "1"), eod_token="</s>", progress=False))
    options = PairConfig(tokens_per_batch=1024, longest=128)
    return DataConfig(path=out, task="pairs", tokenizer=str(tokenizer), start=2, pairs=options)


SIZES = {"sequence_length": 128, "seed": 2, "vocab_size": 8192}


def test_translation_pairs(shared: Path, pairs: DataConfig) -> None:
    one = open_split(pairs, "train", **SIZES)
    assert isinstance(one, PairLoader)
    seen = np.concatenate(one.buckets(0))
    assert sorted(seen.tolist()) == one.kept.tolist() and len(seen) == 890 - one.dropped
    padded = real = 0
    for batch in one.batch(0, one.samples()):
        assert max(batch.source.shape[0], batch.labels.shape[0]) * batch.source.shape[1] <= 1024
        padded += batch.source.numel() + batch.labels.numel()
        real += int(batch.source_mask.sum() + batch.loss_mask.sum())
    assert real / padded > 0.7
    words = load(str(pairs.tokenizer))
    line = (shared / "data/parallel/valid.en-de.tsv").read_text().splitlines()[0].split("\t")
    for side, text in zip((one.directions[0].source, one.directions[0].target), line, strict=True):
        assert words.decode(side.document(0)[0].tolist()).replace("</s>", "").strip() == text


def test_buckets_are_the_same_for_every_dp_and_after_a_restart(pairs: DataConfig) -> None:
    one = open_split(pairs, "train", **SIZES)
    first = one.samples() - 4  # over the end of the first epoch
    whole = [batch.labels for batch in one.batch(first, 12)]
    again = open_split(pairs, "train", **SIZES, state=one.state(first))
    for dp in (2, 3, 4):
        parts = [batch.labels for rank in range(dp) for batch in again.batch(first, 12, rank, dp)]
        assert all(torch.equal(a, b) for a, b in zip(parts, whole, strict=True))
    with pytest.raises(DataError, match="data.pairs.longest was 128"):
        other = replace(pairs, pairs=replace(pairs.pairs, longest=64))
        open_split(other, "train", **SIZES, state=one.state(first))
    with pytest.raises(DataError, match="train.seed was 2"):
        open_split(pairs, "train", **{**SIZES, "seed": 3}, state=one.state(first))


def test_pairs_that_cannot_be(pairs: DataConfig, tmp_path: Path) -> None:
    write(tmp_path / "x_0", [[1]])
    write(tmp_path / "x_1", [[1], [2]])
    for change, match in (
        ({"path": str(tmp_path / "x"), "tokenizer": None}, "side by side"),
        ({"pairs": replace(pairs.pairs, tokens_per_batch=100)}, "cannot hold a pair"),
        ({"pairs": replace(pairs.pairs, longest=1)}, "none of its 890 pairs"),
        ({"path": (pairs.path, pairs.path), "pairs": replace(pairs.pairs, languages=(("en", "de"),))}, "names 1 pairs"),
        ({"weights": (1.0,)}, "data.weights has no meaning for data.task=pairs"),
    ):
        with pytest.raises(DataError, match=match):
            open_split(replace(pairs, **change), "train", **SIZES)
    with pytest.raises(DataError, match=r"data\.valid is empty.*train\.eval_batches=0"):
        open_split(pairs, "valid", **SIZES)


@pytest.mark.parametrize(("task", "columns", "count"), [("wntopic", 1, 10), ("wnhyper", 2, 2), ("wnsense", 3, 2)])
def test_classes(shared: Path, task: str, columns: int, count: int) -> None:
    paths = {split: shared / f"data/tasks/{task}.{split}.tsv" for split in ("train", "valid", "test")}
    config = DataConfig(
        path=str(paths["train"]), valid=str(paths["valid"]), test=str(paths["test"]), task="classes",
        tokenizer=str(shared / "data/tokenizers/wordpiece8k-en"),
    )  # fmt: skip
    options = {"sequence_length": 32, "seed": 1, "vocab_size": 8192}
    for split, path in paths.items():
        one = open_split(config, split, **options)
        assert isinstance(one, ClassLoader)
        assert len(one.classes) == count and one.samples() == len(path.read_text().splitlines()) - 1
    batch = one.batch(0, one.samples())
    assert sorted(batch.classes.tolist()) == sorted(one.labels.tolist())
    assert (batch.tokens[0] == 2).all()
    assert ((batch.tokens == 3).sum(dim=0) == columns).all()
    assert torch.equal(batch.mask == 0, batch.tokens == 0)
    assert batch.segments.max() == columns - 1
    plain = one.batch(0, 3, shuffle=False)
    assert plain.classes.tolist() == one.labels[:3].tolist()
    for change, match in (
        ({"classes": ClassConfig(names=("x",))}, "not among"),
        ({"classes": ClassConfig(begin="<none>")}, "data.classes.begin: the tokenizer has no token <none>"),
        ({"order": "megatron"}, "data.order has no meaning"),
        ({"test": ()}, "data.test is empty"),
    ):
        with pytest.raises(DataError, match=match):
            open_split(replace(config, **change), "test", **options)


def test_a_ragged_table_is_told(tmp_path: Path) -> None:
    (tmp_path / "x.tsv").write_text("a\tlabel\nb\t1\nc\n")
    with pytest.raises(DataError, match=r"x\.tsv:3: 1 columns"):
        read_examples(str(tmp_path / "x.tsv"))
    (tmp_path / "x.jsonl").write_text('{"a": "b", "label": 1}\n[3]\n')
    with pytest.raises(DataError, match=r"x\.jsonl:2: not a JSON object"):
        read_examples(str(tmp_path / "x.jsonl"))
    (tmp_path / "x.jsonl").write_text('{"a": "b", "label": 1}\n')
    assert read_examples(str(tmp_path / "x.jsonl")) == ([("b",)], ["1"])


@pytest.mark.parametrize("name", ["mask", "spans", "pairs", "classes"])
def test_options_of_another_task_are_refused(tmp_path: Path, name: str) -> None:
    given = {"mask": MaskConfig(keep=0.2), "spans": SpanConfig(density=0.3), "pairs": PairConfig(longest=9)}
    config = DataConfig(path=numbered(tmp_path / "x", 500), **{name: given.get(name, ClassConfig(label="x"))})
    with pytest.raises(DataError, match=f"data.{name} has no meaning for data.task=causal"):
        open_split(config, "train", sequence_length=16, seed=1, vocab_size=60000)


@pytest.mark.parametrize(
    "options",
    [
        {"probability": 0.0},
        {"probability": 1.5},
        {"keep": -0.5},
        {"keep": 0.9, "swap": 0.2},
        {"mean_span": 0.5},
        {"longest_span": 0},
    ],
)
def test_masks_that_mean_nothing_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"data\.mask\.{list(options)[-1]}="):
        MaskConfig(**options)
    assert MaskConfig(keep=0.9, swap=0.1).swap == 0.1
