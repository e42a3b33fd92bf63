"""The chaos tool at small counts, and that it finds what is broken on purpose."""

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megnorm.checkpoint import io, write
from megnorm.checkpoint.folder import install, remove
from tools import chaos
from tools.faults import cuts, soak
from tools.faults.disk import AFTER, BEFORE, DIED, TORN, Disk
from tools.faults.job import Failed, dealt, forked, ranges
from tools.faults.life import Life


@pytest.mark.full
@pytest.mark.parametrize(
    "what",
    [["--kills", "3"], ["--save-cuts", "40", "--corruptions", "21"], ["--soak", "500"]],
    ids=lambda what: what[0],
)
def test_chaos(what: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code = chaos.main([*what, "--seed", "7"])
    text = capsys.readouterr().out
    count = sum(1 if name == "--soak" else int(n) for name, n in zip(what[::2], what[1::2], strict=True))
    assert code == 0 and text.splitlines()[-1] == f"{count} passed, 0 failed", text


def test_nothing_asked_is_no_success(capsys: pytest.CaptureFixture[str]) -> None:
    assert chaos.main([]) == 1
    assert capsys.readouterr().out == "0 passed, 0 failed\n"


class NoFlush:
    """The module os without fsync; everything else as it is at the time, cut or not."""

    def fsync(self, fd: int) -> None: ...

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


@pytest.mark.full
def test_a_save_that_does_not_flush_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "os", NoFlush())
    tally = cuts.run(tmp_path, 400, 1)
    assert any("said to be durable, and is lost" in reason for reason in tally.failures or [])


@pytest.mark.full
def test_a_save_that_deletes_first_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def install_late(temporary: Path, final: Path) -> None:
        remove(final)
        install(temporary, final)

    monkeypatch.setattr(io, "install", install_late)
    tally = cuts.run(tmp_path, 60, 1)
    assert any("the older state" in reason for reason in tally.failures or [])


# The parts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("at", "when", "power", "expected"),
    [
        (2, BEFORE, False, b""),
        (2, TORN, False, b"abcdefgh"),
        (2, AFTER, False, b"abcdefgh"),
        (2, AFTER, True, b""),
        (3, AFTER, True, b"abcdefgh"),
        (0, BEFORE, False, b"abcdefgh"),
    ],
)
def test_a_process_dies_at_a_call(tmp_path: Path, at: int, when: str, power: bool, expected: bytes) -> None:
    """What is left: a part of a torn write, and with the power gone what was flushed for sure."""
    path = tmp_path / "file"

    def work() -> int:
        disk = Disk(at, when, power, random.Random(1))
        disk.watch()
        import os

        fd = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.write(fd, b"abcdefgh")
        os.fsync(fd)
        os.close(fd)
        return 0

    assert forked(work, tmp_path / "log") == (DIED if at else 0)
    left = path.read_bytes()
    if when == TORN or (power and at == 2):
        assert len(left) <= 8 and left != b"abcdefgh" and left.strip(b"\0") == b"abcdefgh"[: len(left.strip(b"\0"))]
    else:
        assert left == expected


def test_a_rename_that_was_not_recorded_is_undone(tmp_path: Path) -> None:
    (tmp_path / "new").write_text("new")
    (tmp_path / "file").write_text("old")

    def work() -> int:
        Disk(2, BEFORE, True, random.Random(2)).watch()
        import os

        os.replace(tmp_path / "new", tmp_path / "file")
        os.mkdir(tmp_path / "folder")
        return 0

    assert forked(work, tmp_path / "log") == DIED
    assert (tmp_path / "file").read_text() == "old" and (tmp_path / "new").read_text() == "new"


@settings(max_examples=200, deadline=None)
@given(shape=st.lists(st.integers(1, 6), max_size=4).map(tuple), data=st.data())
def test_a_part_of_a_flat_state_is_a_few_boxes(shape: tuple[int, ...], data: st.DataObject) -> None:
    index = torch.arange(int(np.prod(shape))).reshape(shape)
    begin = data.draw(st.integers(0, index.numel()))
    end = data.draw(st.integers(begin, index.numel()))
    boxes = list(ranges(shape, begin, end))
    assert len(boxes) <= max(1, 2 * len(shape) - 1)
    parts = [index[tuple(slice(o, o + n) for o, n in zip(*box, strict=True))].reshape(-1) for box in boxes]
    assert torch.cat([index.new_empty(0), *parts]).tolist() == list(range(begin, end))


def test_phases(tmp_path: Path) -> None:
    """What a run is doing, from its log and its record."""
    log, record = tmp_path / "log", tmp_path / "metrics.jsonl"
    log.write_text("megnorm: an earlier life\n")
    record.write_text('{"step": 9}\n')
    life = Life(tmp_path, log, 20)
    with log.open("a") as stream:
        assert life.phase() == "start-up"
        stream.write("megnorm: 2 layers\ncontinuing from x/step-00000004: step 4, 16 samples consumed\n")
        stream.flush()
        assert life.phase() == "before the first step" and not life.stepped()
        (tmp_path / "cut").write_text('{"step": 4}\n')
        (tmp_path / "cut").replace(record)
        assert life.phase() == "before the first step"
        record.open("a").write('{"step": 5}\n{"st')
        assert life.phase() == "step" and life.stepped()
        stream.write("checkpoint of step 8 requested\n")
        stream.flush()
        assert life.phase() == "save requested, not yet durable"
        stream.write("checkpoint of step 8 durable after 0.1 s\n")
        stream.flush()
        assert life.phase() == "step"
        stream.write("checkpoint of step 20 requested\ncheckpoint of step 20 durable after 0.1 s\n")
        stream.flush()
        assert life.phase() == "after the last save"


@pytest.mark.parametrize(
    ("grows", "message"),
    [(0, None), (1, "^memory grows:"), (2, "^descriptors grow:"), (3, "^checkpoints pile up:")],
)
def test_what_grows_in_a_soak_is_found(grows: int, message: str | None) -> None:
    steps = np.arange(0, 10_000, 25)
    samples = np.stack([steps, 10**8 + 0 * steps, 12 + 0 * steps, 2 + 0 * steps], axis=1)
    samples[:, grows] += {0: 0, 1: steps * 1500, 2: steps // 1000, 3: steps // 5000 * 2}[grows]
    if message is None:
        assert "0.00 MB per 1000 steps, descriptors 12 to 12, at most 2 checkpoints" in soak.judge(samples, {}, 10_000)
    else:
        with pytest.raises(Failed, match=message):
            soak.judge(samples, {}, 10_000)


def test_shares_of_a_flat_state_reshard(tmp_path: Path) -> None:
    """Thousands of small, odd boxes a file: 300 shares saved, 1, 7 and 301 loaded, all bits equal."""
    state = {f"w.{i}": torch.randn(7, 97) for i in range(40)} | {"e": torch.randn(500, 33), "n": torch.tensor(3.0)}
    shards = [shard for rank in range(300) for shard in dealt(state, rank, 300)]
    path = io.save(tmp_path, 1, shards, {})
    assert len(shards) > 700 and io.verify(path) == []
    assert (path / "manifest.json").stat().st_size < 100 * len(shards)
    for count in (1, 7, 301):
        loaded = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        io.load(path, [shard for rank in range(count) for shard in dealt(loaded, rank, count)], untouched=False)
        assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
