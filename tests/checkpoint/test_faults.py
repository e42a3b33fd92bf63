"""A save cut at any write, flush or rename, or failing there: the last good checkpoint stays, the next save works."""

import contextlib
import errno
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megnorm.checkpoint import io
from megnorm.checkpoint.io import CheckpointError, Shard
from tests.checkpoint.helpers import blank, same, save_ranks, state, whole

CALLS = ("pwrite", "write", "fsync", "rename", "replace", "open", "mkdir", "unlink", "rmdir")


class Kill(BaseException):
    """The process dies here: nothing of ours may run any more."""


class Cut:
    """Counts calls into the operating system that change files; fails the one numbered ``at``, and all after it."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, at: int, error: Callable[[], BaseException], forever: bool
    ) -> None:
        self.count = 0
        self.hit = ""
        for name in CALLS:
            monkeypatch.setattr(os, name, self.wrap(name, getattr(os, name), at, error, forever))

    def wrap(self, name: str, real: Any, at: int, error: Callable[[], BaseException], forever: bool) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            changes = name != "open" or bool(args[1] & os.O_CREAT)
            if changes:
                self.count += 1
                if self.count == at or (forever and self.count > at):
                    self.hit = self.hit or name
                    raise error()
            return real(*args, **kwargs)

        return call


def _cuts(
    monkeypatch: pytest.MonkeyPatch, error: Callable[[], BaseException], forever: bool, action: Callable[[], object]
) -> Iterator[str]:
    """Run ``action`` cut at each call in turn; yields the call cut, with the system whole again."""
    at = 0
    while True:
        at += 1
        with monkeypatch.context() as patch:
            cut = Cut(patch, at, error, forever)
            with contextlib.suppress(Kill, CheckpointError):
                action()
        if not cut.hit:
            return
        yield f"{cut.hit} ({at})"


@pytest.mark.parametrize("again", [False, True], ids=["new step", "step saved before"])
def test_kill_at_every_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool) -> None:
    """After a kill anywhere, ``latest`` loads the old or the new state, whole; and the next save cleans up."""
    old, new = state(1), state(9)
    kinds = set()
    step = 100
    io.save(tmp_path, step, whole(old), {"is": "old"})

    def save_new() -> None:
        io.save(tmp_path, step if again else step + 1, whole(new), {"is": "new"}, threads=1)

    for where in _cuts(monkeypatch, Kill, True, save_new):
        kinds.add(where.split()[0])
        path = io.latest(tmp_path)
        assert path is not None, where
        loaded = blank(old)
        meta = io.load(path, whole(loaded))
        assert same(loaded, {"old": old, "new": new}[meta["is"]]), where
        step += 2  # again from the start, over what is left
        assert io.verify(io.save(tmp_path, step, whole(old), {"is": "old"})) == [], where
        assert not list(tmp_path.glob(".*")), where
        for other in tmp_path.glob("step-*"):
            if other.name != f"step-{step:08d}":
                shutil.rmtree(other)  # so that there is only one to fall back on
    assert kinds >= {"pwrite", "write", "fsync", "rename", "replace", "open", "mkdir"}


def test_everything_is_flushed_before_its_name_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def flush(fd: int) -> None:
        events.append("flush " + os.path.relpath(os.readlink(f"/proc/self/fd/{fd}"), tmp_path))
        fsync(fd)

    def move(real: Callable[..., None]) -> Callable[[Path, Path], None]:
        def call(source: Path, target: Path) -> None:
            events.append(f"name {target.name}")
            real(source, target)

        return call

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "rename", move(rename))
    monkeypatch.setattr(os, "replace", move(replace))
    path = io.save(tmp_path, 1, whole(state()), {}, max_file_bytes=64)
    named, recorded = events.index("name step-00000001"), events.index("name latest")
    files = {f"flush .tmp-step-00000001/{file.name}" for file in path.iterdir()}
    assert len(files) > 4
    assert files <= set(events[:named])
    assert events[named - 1] == "flush .tmp-step-00000001"
    assert events[named + 1 : recorded] == ["flush .", "flush .tmp-latest"]
    assert events[recorded + 1] == "flush ."


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("forever", [False, True], ids=["once", "from then on"])
def test_error_at_every_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, forever: bool) -> None:
    """An error of the disk is one sentence; earlier checkpoints are as they were; temporary files are gone."""
    old = state(1)
    first = io.save(tmp_path, 100, whole(old), {})
    failures: list[str] = []

    def save_new() -> None:
        try:
            io.save(tmp_path, 101, whole(state(2)), {}, threads=1)
        except CheckpointError as error:
            failures.append(str(error))
            raise

    for where in _cuts(monkeypatch, lambda: OSError(code, os.strerror(code)), forever, save_new):
        assert io.verify(first) == [], where
        found = io.latest(tmp_path)
        assert found in (first, tmp_path / "step-00000101"), where
        assert found is not None and io.verify(found) == []
        if not forever:
            assert not list(tmp_path.glob(".tmp-*")), where
        io.save(tmp_path, 100, whole(old), {})
    assert all(os.strerror(code) in message and "step 101" in message for message in failures)
    assert len(failures) > 10


def test_a_rank_that_fails_fails_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = [[Shard.whole(f"w.{r}", state(r)["blocks.0.ffn.up.weight"])] for r in range(3)]
    good = save_ranks(tmp_path, 1, ranks, {})
    real = os.pwrite

    def pwrite(fd: int, data: Any, start: int) -> int:
        if "rank-00002" in os.readlink(f"/proc/self/fd/{fd}"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, data, start)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(CheckpointError, match=r"Input/output error \(rank 2\)"):
        save_ranks(tmp_path, 2, ranks, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000001"]
    assert io.verify(good) == []


def test_ranks_that_do_not_share_the_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="rank 1 wrote nothing .* folder that all ranks share"):
        io.save(tmp_path, 1, whole(state()), {}, rank=0, world=2, barrier=lambda: None)
    with pytest.raises(CheckpointError, match="rank 1 does not see .* folder that all ranks share"):
        io.save(tmp_path / "elsewhere", 1, whole(state()), {}, rank=1, world=2, barrier=lambda: None)


def test_a_full_disk_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = io.save(tmp_path, 1, whole(state()), {})
    real = os.statvfs(tmp_path)
    full = os.statvfs_result((real.f_bsize, real.f_frsize, real.f_blocks, 0, 0, *tuple(real)[5:]))
    monkeypatch.setattr(os, "statvfs", lambda path: full)
    begun = time.perf_counter()
    with pytest.raises(CheckpointError, match="MB to write, 0 MB free .*free space on this disk"):
        io.save(tmp_path, 2, whole(state()), {})
    assert time.perf_counter() - begun < 10.0  # at once, on a busy machine too
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000001"]
    assert io.latest(tmp_path) == good


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(CheckpointError, match="not saved.*see that train.out can be written"):
        io.save(tmp_path / "run" / "checkpoints", 1, whole(state()), {})


def test_two_log_lines(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        io.save(tmp_path, 7, whole(state()), {})
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert lines[0] == "checkpoint of step 7 requested"
    assert lines[1].startswith("checkpoint of step 7 durable after ")
