"""A disk that is full, read-only or broken: told within a second, nothing left behind, the last good checkpoint intact."""

import errno
import logging
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megnorm.checkpoint import io
from megnorm.checkpoint.config import CheckpointConfig
from megnorm.checkpoint.io import CheckpointError, Shard
from megnorm.checkpoint.saver import Saver
from megnorm.cli import main
from tests.checkpoint.helpers import random_tensor
from tests.train.tiny import write_config, write_data

SIZE = 300_000  # bytes of the state
ADVICE = {errno.ENOSPC: "free space on this disk or lower checkpoint.keep_last", errno.EIO: "the disk fails"}


def state(seed: int) -> list[Shard]:
    return [Shard.whole(f"w.{i}", random_tensor((SIZE // 12,), torch.float32, seed + i)) for i in range(3)]


class Disk:
    """Takes ``room`` bytes, the last write in part, as a real one does; then it fails. told: when it did."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int, code: int) -> None:
        self.room, self.code, self.told = room, code, 0.0
        for name in ("write", "pwrite"):
            monkeypatch.setattr(os, name, self.wrap(getattr(os, name)))

    def wrap(self, real: Any) -> Any:
        def write(fd: int, data: Any, *rest: int) -> int:
            if self.room <= 0:
                self.told = self.told or time.time()
                raise OSError(self.code, os.strerror(self.code))
            done = int(real(fd, memoryview(data)[: self.room], *rest))
            self.room -= done
            return done

        return write


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("code", ADVICE)
@pytest.mark.parametrize("room", [0, 1, 100_000, SIZE - 1, SIZE + 400])
def test_it_fails_at_any_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, room: int, code: int,
    asynchronous: bool,
) -> None:  # fmt: skip
    saver = Saver(CheckpointConfig(asynchronous=asynchronous), tmp_path)
    saver.save(1, state(1), {})
    saver.wait()
    with monkeypatch.context() as patch, pytest.raises(CheckpointError) as caught:
        disk = Disk(patch, room, code)
        saver.save(2, state(2), {})
        saver.wait()
    assert os.strerror(code) in str(caught.value) and ADVICE[code] in str(caught.value)
    said = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert disk.told and said[0].created - disk.told < 1.0
    assert names(tmp_path) == ["latest", "step-00000001"]
    assert io.verify(tmp_path / "step-00000001") == []
    saver.save(2, state(2), {})  # there is room again
    saver.wait()
    assert io.latest(tmp_path) == tmp_path / "step-00000002"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with 1 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place]).returncode:
        pytest.skip("mounting a file system is not allowed here")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def remount(place: Path, mode: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{mode}", place], check=True)


@pytest.mark.parametrize("known", [True, False], ids=["seen before writing", "seen in writing"])
def test_a_real_disk_gets_full(small_disk: Path, monkeypatch: pytest.MonkeyPatch, known: bool) -> None:
    io.save(small_disk, 1, state(1), {})
    (small_disk / "other").write_bytes(bytes(500_000))
    if not known:  # others fill it while we write
        real = os.statvfs(small_disk)
        empty = os.statvfs_result((*tuple(real)[:3], real.f_blocks, real.f_blocks, *tuple(real)[5:]))
        monkeypatch.setattr(os, "statvfs", lambda path: empty)
    begun = time.perf_counter()
    with pytest.raises(CheckpointError, match="not saved: .*free space on this disk or lower checkpoint.keep_last"):
        io.save(small_disk, 2, state(2), {})
    assert time.perf_counter() - begun < 10.0  # at once, on a busy machine too
    assert names(small_disk) == ["latest", "other", "step-00000001"]
    assert io.verify(small_disk / "step-00000001") == []


def test_a_disk_becomes_read_only(small_disk: Path) -> None:
    """As file systems do after an error of the device."""
    saver = Saver(CheckpointConfig(), small_disk / "run")
    saver.save(1, state(1), {})
    saver.wait()
    remount(small_disk, "ro")
    begun = time.perf_counter()
    saver.save(2, state(2), {})
    with pytest.raises(CheckpointError, match="Read-only file system.*set train.out to a folder that can be written"):
        saver.wait()
    assert time.perf_counter() - begun < 10.0  # at once, on a busy machine too
    assert names(small_disk / "run") == ["latest", "step-00000001"]
    assert io.verify(small_disk / "run" / "step-00000001") == []


def test_training_ends_with_the_reason(tmp_path: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The run stops at the next step with one sentence; with room again it goes on to the end."""
    config = write_config(tmp_path, write_data(tmp_path / "text"), checkpoint={"every": 2, "keep_last": 9})
    command = ["train", "--config", str(config), f"train.out={small_disk / 'run'}", "train.steps=30"]
    filler = small_disk / "other"
    filler.write_bytes(bytes(700_000))
    assert main(command) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message and "free space on this disk" in message
    folder = small_disk / "run" / "checkpoints"
    last = io.latest(folder)
    assert last is not None and io.verify(last) == []
    assert not list(folder.glob(".*"))
    filler.unlink()
    assert main([*command, "checkpoint.keep_last=2"]) == 0
    assert io.read_meta(folder / "step-00000030")["step"] == 30


def test_a_folder_that_cannot_be_written_is_told_before_the_first_step(
    tmp_path: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, write_data(tmp_path / "text"))
    remount(small_disk, "ro")
    assert main(["train", "--config", str(config), f"train.out={small_disk / 'run'}"]) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    assert f"{small_disk}/run/checkpoints cannot be made: Read-only file system; set train.out to a folder" in message
