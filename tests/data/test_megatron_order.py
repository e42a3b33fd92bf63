"""Megatron's order: against a walk through the documents one by one, and against files its own code wrote."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megnorm.data import blending, megatron_order
from megnorm.data.errors import DataError


def walk(lengths: np.ndarray, order: list[int], total: int, length: int, extra: int) -> list[list[int]]:
    """Where samples begin, found token by token."""
    out, place, offset = [[0, 0]], 0, 0
    for _ in range(total):
        left = length + extra
        while left:
            rest = int(lengths[order[place]]) - offset
            if rest >= left:
                offset, left = offset + left - extra, 0
            elif place == len(order) - 1:
                offset, left = int(lengths[order[place]]) - extra, 0
            else:
                place, offset, left = place + 1, 0, left - rest
        out.append([place, offset])
    return out


@settings(max_examples=200)
@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=15),
    length=st.integers(1, 12),
    samples=st.none() | st.integers(1, 60),
    extra=st.integers(0, 1),
    drop=st.booleans(),
    chunk=st.sampled_from([1, 3, 1 << 20]),
)
def test_samples_begin_where_a_walk_says(
    lengths: list[int], length: int, samples: int | None, extra: int, drop: bool, chunk: int
) -> None:
    sizes = np.array([3, *lengths, 3], np.int32)
    patch = pytest.MonkeyPatch()
    with patch.context() as context:
        context.setattr(megatron_order, "CHUNK", chunk)
        options = {"length": length, "seed": 7, "samples": samples, "drop_last": drop, "extra": extra}
        try:
            found = megatron_order.gpt_indices(sizes, 0, len(sizes), **options)
        except DataError:
            assert sizes.sum() < length + extra
            return
    order, total = found["document_index"].tolist(), len(found["shuffle_index"])
    epochs = len(order) // len(sizes)
    assert sorted(order) == sorted(list(range(len(sizes))) * epochs)
    assert sorted(found["shuffle_index"].tolist()) == list(range(total))
    if sizes[order[-1]]:
        assert found["sample_index"].tolist() == walk(sizes, order, total, length, extra)
    assert samples is None or total >= samples


def greedy(share: np.ndarray, samples: int, limits: np.ndarray) -> list[int]:
    """The rule of blending, one step after the other."""
    drawn, found = np.zeros(len(share)), []
    for i in range(samples):
        error = np.where(drawn < limits, share * max(i, 1) - drawn, -np.inf)
        found.append(int(np.argmax(error)))
        drawn[found[-1]] += 1
    return found


@settings(max_examples=60)
@given(
    count=st.sampled_from([1, 2, 5, 40, 300, 700]),
    samples=st.integers(1, 900),
    kind=st.sampled_from(["even", "few values", "random", "one large"]),
    seed=st.integers(0, 1000),
)
def test_blends_are_greedy(count: int, samples: int, kind: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    weights = {
        "even": np.ones(count),
        "few values": random.integers(1, 4, count).astype(float),
        "random": random.random(count) + 1e-3,
        "one large": random.random(count) + 1e-3 + np.where(np.arange(count) == seed % count, 1e3, 0),
    }[kind]
    found = blending.blend_indices(weights.tolist(), samples)
    assert found["dataset_index"].tolist() == greedy(weights / weights.sum(), samples, np.full(count, np.inf))
    for one in range(count):
        mine = found["dataset_sample_index"][found["dataset_index"] == one]
        assert mine.tolist() == list(range(len(mine)))


@settings(max_examples=30)
@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=400).filter(any))
def test_blends_may_use_every_sample_up(sizes: list[int]) -> None:
    found, total = blending.blend_exhaustive(sizes), sum(sizes)
    assert np.bincount(found["dataset_index"], minlength=len(sizes)).tolist() == sizes
    wanted = greedy(np.array(sizes, np.float64) / total, total, np.array(sizes))
    assert found["dataset_index"].tolist() == wanted


def test_the_golden_folder(project: Path, shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("check_dataset", project / "tools/check_dataset.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    code = module.main([str(shared / "golden/megatron_dataset")])
    told = capsys.readouterr().out
    assert code == 0, [line for line in told.splitlines() if line.startswith("FAIL")]
    assert told.splitlines()[-1].endswith(" passed, 0 failed")


def test_the_checker_bites(project: Path, shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (shared / "golden/megatron_dataset").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    content = bytearray((tmp_path / "text_document.bin").read_bytes())
    content[5000] ^= 1
    (tmp_path / "text_document.bin").write_bytes(content)
    spec = importlib.util.spec_from_file_location("check_dataset", project / "tools/check_dataset.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main([str(tmp_path)]) == 1
    told = capsys.readouterr().out
    assert "FAIL read text_document (mapped)" in told and "FAIL preprocess docs.jsonl" in told
    assert "FAIL gpt samples one_epoch.train" in told and "ok   read sentences (plain)" in told
