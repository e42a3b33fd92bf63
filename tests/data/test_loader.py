"""Sample order and batches: every token once an epoch, the same ids whatever the layout, clear refusals."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megnorm.data.batch import Batch
from megnorm.data.config import DataConfig
from megnorm.data.errors import DataError
from megnorm.data.indexed import IndexedDataset, IndexedWriter
from megnorm.data.loader import Loader
from megnorm.data.preprocess import Job, run
from megnorm.data.samples import PERIOD, Mixture, permute, shares
from tests.data.helpers import numbered, write


def loader(
    path: str | tuple[str, ...], part: str = "train", *, length: int = 16, seed: int = 3, **options: object
) -> Loader:
    vocab = int(options.pop("vocab_size", 65536))
    samples, state = options.pop("samples", None), options.pop("state", None)
    config = DataConfig(path=path, **options)
    return Loader(config, part, sequence_length=length, seed=seed, vocab_size=vocab, samples=samples, state=state)


@settings(max_examples=60)
@given(size=st.integers(1, 3000), seed=st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(size: int, seed: int) -> None:
    found = permute(np.arange(size), size, seed)
    assert np.array_equal(np.sort(found), np.arange(size))
    some = np.arange(size)[:: max(1, size // 7)]
    assert np.array_equal(permute(some, size, seed), found[some])


def test_permutations_are_evenly_spread() -> None:
    """All 24 orders of 4 come up about equally often; neighbours do not stay near each other."""
    orders = [tuple(permute(np.arange(4), 4, seed).tolist()) for seed in range(4800)]
    counts = [orders.count(one) for one in set(orders)]
    assert len(counts) == 24
    assert min(counts) > 140 and max(counts) < 260
    found = permute(np.arange(20000), 20000, 5).astype(float)
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.03
    assert abs(np.corrcoef(np.arange(20000), found)[0, 1]) < 0.03


def test_an_epoch_reads_every_token_once(tmp_path: Path) -> None:
    one = loader(numbered(tmp_path / "x", 1003), split=(1, 0, 0))
    assert one.samples() == 1002 // 16
    for epoch in range(3):
        batch = one.batch(epoch * one.samples(), one.samples())
        labels = np.sort(batch.labels.numpy().ravel())
        assert np.array_equal(labels, np.arange(labels[0], labels[0] + one.samples() * 16))
        assert torch.equal(batch.labels[:-1], batch.tokens[1:])
        assert torch.equal(batch.labels, batch.tokens + 1)
    first, second = (one.batch(e * one.samples(), one.samples()).tokens for e in (0, 1))
    assert not torch.equal(first, second)


@settings(max_examples=25)
@given(
    dp=st.sampled_from([1, 2, 3, 4, 6, 12]),
    workers=st.integers(1, 4),
    first=st.integers(0, 500),
    stop=st.integers(0, 24),
    order=st.sampled_from(["default", "megatron"]),
    sources=st.integers(1, 3),
    packed=st.booleans(),
)
def test_the_same_samples_for_every_dp_worker_and_restart(
    tmp_path_factory: pytest.TempPathFactory,
    dp: int,
    workers: int,
    first: int,
    stop: int,
    order: str,
    sources: int,
    packed: bool,
) -> None:
    """One process for the whole run, against: ranks, threads that ask in any order, and a restart in between."""
    folder = tmp_path_factory.mktemp("x")
    paths = tuple(numbered(folder / str(i), 900 + 100 * i, seed=i) for i in range(sources))
    options = {"order": order, "samples": 600, "split": (1, 0, 0), "separate_documents": packed}
    one = loader(paths, **options)
    whole = rows(one.batch(first, 24))
    again = loader(paths, **options)
    assert [row for rank in range(dp) for row in rows(again.batch(first, 24, rank, dp))] == whole
    restarted = loader(paths, **options, state=json.loads(json.dumps(one.state(first + stop))))
    assert [row for i in range(24) for row in rows(restarted.batch(first + i, 1))][stop:] == whole[stop:]
    with ThreadPoolExecutor(workers) as pool:
        order_of_work = np.random.default_rng(first).permutation(24).tolist()
        found = dict(zip(order_of_work, pool.map(lambda i: again.batch(first + i, 1), order_of_work), strict=True))
    assert [row for i in range(24) for row in rows(found[i])] == whole


def rows(batch: Batch) -> list[list[int]]:
    """Tokens, labels and positions of each row."""
    parts = [batch.tokens, batch.labels] + ([] if batch.positions is None else [batch.positions])
    return torch.cat([part.t().reshape(-1, 16) for part in parts], dim=1).tolist()


def test_splits_share_no_document(tmp_path: Path) -> None:
    path = numbered(tmp_path / "x", 6000, documents=60)
    borders = set(IndexedDataset(path).document_starts().tolist())
    seen = []
    for split in ("train", "valid", "test"):
        one = loader(path, split, split=(0.8, 0.1, 0.1))
        tokens = np.unique(one.batch(0, 8 * one.samples()).tokens.numpy())
        seen.append(set(tokens.tolist()))
        assert any(tokens[0] - 16 <= border <= tokens[0] for border in borders)
    assert not (seen[0] & seen[1] or seen[1] & seen[2] or seen[0] & seen[2])
    assert min(seen[1]) > max(seen[0]) and min(seen[2]) > max(seen[1])


def test_own_files_for_validation(tmp_path: Path) -> None:
    path, valid = numbered(tmp_path / "x", 500), numbered(tmp_path / "v", 200)
    assert loader(path, "train", valid=valid).samples() == 499 // 16
    assert loader(path, "valid", valid=valid).samples() == 199 // 16
    with pytest.raises(DataError, match="test part has 0 tokens"):
        loader(path, "test", valid=valid)


def test_megatron_order_overlaps_by_one_token(tmp_path: Path) -> None:
    one = loader(numbered(tmp_path / "x", 1003), order="megatron", split=(1, 0, 0))
    batch = one.batch(0, one.samples())
    labels = batch.labels.numpy().ravel()
    assert len(np.unique(labels)) == len(labels) == 16 * (1002 // 16)
    with pytest.raises(DataError, match="sample 62 asked for"):
        one.batch(one.samples(), 1)


@pytest.mark.parametrize("order", ["default", "megatron"])
def test_packed_rows_know_their_documents(tmp_path: Path, order: str) -> None:
    """Pieces end where documents end, positions start again, and no document predicts the next one."""
    random = np.random.default_rng(1)
    documents = [[i] * int(random.integers(1, 30)) for i in range(1, 120)]
    path = write(tmp_path / "x", documents)
    one = loader(path, order=order, separate_documents=True, split=(1, 0, 0))
    rows = min(one.samples(), 60)
    batch = one.batch(0, rows)
    tokens, labels, mask = (t.numpy().ravel() for t in (batch.tokens, batch.labels, batch.loss_mask))
    cuts = batch.cu_seqlens.numpy()
    assert batch.tokens.shape == (rows * 16, 1) and cuts.dtype == np.int32
    assert cuts[0] == 0 and cuts[-1] == rows * 16 and (np.diff(cuts) > 0).all()
    assert set(range(0, rows * 16, 16)) <= set(cuts.tolist())
    for first, last in zip(cuts[:-1], cuts[1:], strict=True):
        assert len(set(tokens[first:last].tolist())) == 1
        assert batch.positions.numpy().ravel()[first:last].tolist() == list(range(last - first))
    assert np.array_equal(mask == 1, tokens == labels)
    assert batch.max_seqlen == np.diff(cuts).max()
    plain = loader(path, order=order, split=(1, 0, 0)).batch(0, rows)
    assert np.array_equal(plain.tokens.numpy().T.ravel(), tokens)
    reset = loader(path, order=order, reset_positions=True, split=(1, 0, 0)).batch(0, rows)
    assert np.array_equal(reset.positions.numpy().T.ravel(), batch.positions.numpy().ravel())


def test_mask_end(tmp_path: Path) -> None:
    path = write(tmp_path / "x", [[5, 6, 7, 0]] * 50)
    batch = loader(path, mask_end=True, eod=0).batch(0, 2)
    assert torch.equal(batch.loss_mask == 0, batch.tokens == 0)
    with pytest.raises(DataError, match=r"data\.eod is needed"):
        loader(path, mask_end=True)


def test_mixture_gives_every_source_its_share() -> None:
    mixture = Mixture(shares([0.5, 0.3, 0.2], "abc"))
    for upto in (10, 1000, 10**6, PERIOD + 12345):
        source, draw = mixture.locate(np.arange(max(0, upto - 1000), upto))
        counts = mixture.consumed(upto)
        assert sum(counts) == upto
        assert np.allclose(counts, np.array([0.5, 0.3, 0.2]) * upto, atol=3)
        for one in range(3):
            mine = draw[source == one]
            assert mine.tolist() == list(range(counts[one] - len(mine), counts[one]))


@settings(max_examples=30)
@given(weights=st.lists(st.floats(0.001, 1000), min_size=1, max_size=50))
def test_shares_sum_up(weights: list[float]) -> None:
    try:
        found = shares(weights, [str(i) for i in range(len(weights))])
    except DataError:
        assert min(weights) / sum(weights) * PERIOD < 0.5
        return
    assert sum(found) == PERIOD
    ideal = np.array(weights) / sum(weights) * PERIOD
    assert (np.abs(np.array(found) - ideal) <= 1 + len(weights)).all()


def test_a_changed_mixture_goes_on_where_each_source_stood(tmp_path: Path) -> None:
    paths = tuple(write(tmp_path / n, [[k] * 4000]) for k, n in enumerate("abc", 1))
    before = loader(paths[:2], weights=(3, 1), split=(1, 0, 0))
    state = json.loads(json.dumps(before.state(100)))
    assert [(entry["path"], entry["consumed"]) for entry in state["sources"]] == [(paths[0], 75), (paths[1], 25)]
    same = loader(paths[:2], weights=(3, 1), split=(1, 0, 0), state=state)
    assert torch.equal(same.batch(100, 8).tokens, before.batch(100, 8).tokens)
    after = loader(paths, weights=(1, 1, 2), split=(1, 0, 0), state=state)
    assert after.order.mixture.consumed(100) == [75, 25, 0]
    source, draw = after.order.mixture.locate(np.arange(100, 500))
    for number, (start, count) in enumerate([(75, 100), (25, 100), (0, 200)]):
        assert draw[source == number].tolist() == list(range(start, start + count))
    again = loader(paths, weights=(1, 1, 2), split=(1, 0, 0), state=after.state(300))
    assert torch.equal(again.batch(300, 40).tokens, after.batch(300, 40).tokens)


def test_a_source_left_out_for_a_while_goes_on_where_it_stood(tmp_path: Path) -> None:
    paths = (numbered(tmp_path / "a", 2000), numbered(tmp_path / "b", 2000, seed=1))
    first = loader(paths, weights=(1, 1), split=(1, 0, 0)).state(30)
    alone = loader(paths[0], split=(1, 0, 0), state=first).state(50)
    both = loader(paths[::-1], weights=(1, 1), split=(1, 0, 0), state=json.loads(json.dumps(alone)))
    assert both.order.mixture.consumed(50) == [15, 35] and both.state(50)["left"] == []
    with pytest.raises(DataError, match="data.split"):
        loader(paths, split=(0.5, 0.5, 0), state=alone)


def test_turned_paths_go_on_where_each_source_stood(tmp_path: Path) -> None:
    paths = (numbered(tmp_path / "a", 2000), numbered(tmp_path / "b", 2000, seed=1))
    before = loader(paths, weights=(1, 1), split=(1, 0, 0))
    after = loader(paths[::-1], weights=(1, 1), split=(1, 0, 0), state=before.state(31))
    assert after.order.mixture.consumed(31) == before.order.mixture.consumed(31)[::-1]


def test_data_may_move(tmp_path: Path) -> None:
    """The samples belong to the content: another folder, or a relative path, changes nothing."""
    (tmp_path / "there").mkdir()
    here = tuple(numbered(tmp_path / name, 2000, seed=seed) for seed, name in enumerate("ab"))
    there = tuple(numbered(tmp_path / "there" / name, 2000, seed=seed) for seed, name in enumerate("ab"))
    for order in ("default", "megatron"):
        before = loader(here, order=order, samples=300)
        after = loader(there, order=order, samples=300, state=before.state(50))
        assert torch.equal(after.batch(50, 40).tokens, before.batch(50, 40).tokens)


@pytest.mark.parametrize("order", ["default", "megatron"])
def test_what_would_repeat_samples_is_refused(tmp_path: Path, order: str) -> None:
    path = numbered(tmp_path / "x", 3000)
    options = {"order": order, "split": (1, 0, 0), "samples": 100}
    state = loader(path, **options).state(60)
    for change, match in (
        ({"length": 8}, r"train\.sequence_length was 16 .* and is 8 now"),
        ({"seed": 4}, r"train\.seed was 3 .* and is 4 now"),
        ({"order": "megatron" if order == "default" else "default"}, r"data\.order was"),
        ({"split": (0.5, 0.5, 0)}, r"data\.split"),
    ):
        with pytest.raises(DataError, match=match):
            loader(path, **{**options, **change}, state=state)
    numbered(tmp_path / "x", 3000, seed=9)
    with pytest.raises(DataError, match="holds other data than" if order == "default" else "cannot change its data"):
        loader(path, **options, state=state)


def test_the_same_data_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="hold the same data"):
        loader((numbered(tmp_path / "a", 500), numbered(tmp_path / "b", 500)))


@pytest.mark.parametrize("sources", [1, 2])
def test_megatron_order_keeps_the_size_of_its_index(tmp_path: Path, sources: int) -> None:
    """A run of another length or batch goes on in the old order, as far as the old index reaches."""
    paths = tuple(numbered(tmp_path / str(i), 1000 + i, seed=i) for i in range(sources))
    before = loader(paths, order="megatron", samples=400)
    state = json.loads(json.dumps(before.state(100)))
    shorter = loader(paths, order="megatron", samples=300, state=state)
    assert torch.equal(shorter.batch(100, 200).tokens, before.batch(100, 200).tokens)
    assert shorter.state(100) == state
    with pytest.raises(DataError, match="made for the 400 samples with which this run began"):
        loader(paths, order="megatron", samples=before.samples() + 1, state=state)


def test_epochs_as_weights(tmp_path: Path) -> None:
    paths = (numbered(tmp_path / "a", 4001), numbered(tmp_path / "b", 1001))
    one = loader(paths, epochs=(1, 2), split=(1, 0, 0))
    counts = one.order.mixture.consumed(600)
    assert abs(counts[1] / counts[0] - 0.5) < 0.02


def test_a_wrong_tokenizer_is_told(tmp_path: Path) -> None:
    path = write(tmp_path / "x", [[1, 2, 300] * 30])
    with pytest.raises(DataError, match=r"token id 300, model\.vocab_size is 256"):
        loader(path, vocab_size=256)
    Path(path + ".meta.json").unlink()
    with pytest.raises(DataError, match="token id 300"):
        loader(path, vocab_size=256)
    negative = write(tmp_path / "n", [[1, -2, 3] * 30], "int32")
    with pytest.raises(DataError, match="-2 is negative"):
        loader(negative, split=(1, 0, 0)).batch(0, 4)


def test_the_tokenizer_of_the_data_is_compared(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with IndexedWriter(tmp_path / "x", "uint16") as writer:
        writer.add_document(list(range(100)))
        writer.notes["tokenizer"] = {"name": "theirs", "sha256": "0"}
    with pytest.raises(DataError, match="written with tokenizer theirs"):
        loader(str(tmp_path / "x"), tokenizer=str(tmp_path))
    with pytest.raises(DataError, match=r"data\.tokenizer: there is no"):
        loader(str(tmp_path / "x"), tokenizer=str(tmp_path / "none"))


def test_names_of_tokenizers_and_of_files(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "many words"}\n' * 100)
    run(Job((str(tmp_path / "in.jsonl"),), str(tmp_path / "x"), "bytes", progress=False))
    with pytest.raises(DataError, match="bytes, data.tokenizer=tiktoken:gpt2 is another one"):
        loader(str(tmp_path / "x.bin"), tokenizer="tiktoken:gpt2")
    one = loader(str(tmp_path / "x.bin"), tokenizer="bytes", mask_end=True, vocab_size=257)
    assert one.eod == 256


def test_plain_refusals(tmp_path: Path) -> None:
    path = numbered(tmp_path / "x", 100)
    with pytest.raises(DataError, match=r"data\.path is empty"):
        loader(())
    with pytest.raises(DataError, match="not found"):
        loader(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="needs 201"):
        loader(path, length=200)
    with pytest.raises(DataError, match=r"valid part has 0 tokens.*train\.eval_batches=0"):
        loader(path, "valid", split=(1, 0, 0))
    with pytest.raises(DataError, match=r"valid part has 0 tokens.*train\.eval_batches=0"):
        loader(path, "valid", split=(1, 0, 0), order="megatron")
    with pytest.raises(DataError, match="dealt to 3"):
        loader(path).batch(0, 4, 0, 3)
    with pytest.raises(DataError, match="twice"):
        loader((path, path))
    with pytest.raises(DataError, match="2 numbers for 1 paths"):
        loader(path, weights=(1, 2))
    with pytest.raises(ValueError, match="three fractions"):
        loader(path, split=(-1, 1, 1))
    with pytest.raises(DataError, match="samples="):
        loader((path, numbered(tmp_path / "y", 100)), order="megatron")


def test_damage_is_found_when_asked(tmp_path: Path) -> None:
    path = numbered(tmp_path / "x", 1000)
    content = bytearray(Path(path + ".bin").read_bytes())
    content[77] ^= 1
    Path(path + ".bin").write_bytes(content)
    loader(path)
    with pytest.raises(DataError, match="differ from what was written"):
        loader(path, verify=True)
