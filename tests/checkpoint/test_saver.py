"""Saving in the background, and which checkpoints stay."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megnorm.checkpoint import io, saver
from megnorm.checkpoint.config import CheckpointConfig
from megnorm.checkpoint.folder import steps
from megnorm.checkpoint.io import CheckpointError, Shard
from megnorm.checkpoint.retention import keep
from megnorm.checkpoint.saver import Saver
from tests.checkpoint.helpers import blank, same, state, whole
from tests.distributed.pool import Pool


def held(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in steps(folder)]


def test_the_loop_goes_on_and_the_copy_does_not_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    real = saver.save

    def slow(*args: Any, **kwargs: Any) -> Path:
        assert gate.wait(10)
        return real(*args, **kwargs)

    monkeypatch.setattr(saver, "save", slow)
    saving = Saver(CheckpointConfig(), tmp_path)
    tensors = state(1)
    meta = {"step": 5, "nested": {"seen": 1}}
    saving.save(5, whole(tensors), meta)
    assert io.latest(tmp_path) is None
    for tensor in tensors.values():
        tensor.zero_()
    meta["nested"] = {"seen": 2}
    gate.set()
    saving.wait()
    path = io.latest(tmp_path)
    assert path is not None
    loaded = blank(tensors)
    assert io.load(path, whole(loaded)) == {"step": 5, "nested": {"seen": 1}}
    assert same(loaded, state(1))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_failure_is_told_at_the_next_call(tmp_path: Path, asynchronous: bool) -> None:
    folder = tmp_path / "run" / "checkpoints"
    saving = Saver(CheckpointConfig(asynchronous=asynchronous), folder)
    folder.rmdir()
    folder.parent.rmdir()
    folder.parent.write_text("")
    if not asynchronous:
        with pytest.raises(CheckpointError, match="step 1 .* not saved: Not a directory"):
            saving.save(1, whole(state()), {})
        return
    for ask in (saving.wait, lambda: saving.save(2, whole(state()), {}), saving.check):
        saving.save(1, whole(state()), {})
        if saving._thread is not None:
            saving._thread.join()
        assert saving.failed
        with pytest.raises(CheckpointError, match="step 1 .* not saved: Not a directory"):
            ask()
        assert not saving.failed


def test_a_folder_that_cannot_be_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file/checkpoints cannot be made: Not a directory; see that train\.out"):
        Saver(CheckpointConfig(), tmp_path / "file" / "checkpoints")


def test_two_runs_cannot_write_to_one_folder(tmp_path: Path) -> None:
    first = Saver(CheckpointConfig(), tmp_path)
    other_rank = Saver(CheckpointConfig(), tmp_path, 1, 2)
    with pytest.raises(CheckpointError, match=r"another run writes its checkpoints to .*; end it, or set train\.out"):
        Saver(CheckpointConfig(), tmp_path)
    first.close()
    with Saver(CheckpointConfig(), tmp_path), pytest.raises(CheckpointError, match="another run"):
        Saver(CheckpointConfig(), tmp_path)
    Saver(CheckpointConfig(), tmp_path)
    other_rank.close()


def test_a_folder_is_held_while_it_is_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    real = saver.save

    def slow(*args: Any, **kwargs: Any) -> Path:
        assert gate.wait(10)
        return real(*args, **kwargs)

    monkeypatch.setattr(saver, "save", slow)
    with Saver(CheckpointConfig(), tmp_path) as saving:  # as when an error of the training ends it
        saving.save(1, whole(state()), {})
    with pytest.raises(CheckpointError, match="another run"):
        Saver(CheckpointConfig(), tmp_path)
    gate.set()
    saving.wait()
    Saver(CheckpointConfig(), tmp_path)


def test_a_barrier_that_fails_is_a_failure_too(tmp_path: Path) -> None:
    def barrier() -> None:
        raise RuntimeError("rank 1 did not come")

    saving = Saver(CheckpointConfig(), tmp_path, 0, 2, barrier)
    saving.save(1, whole(state()), {})
    with pytest.raises(CheckpointError, match="rank 1 did not come"):
        saving.wait()


def save_while_training(rank: int, world: int, folder: Path) -> float:
    """Background saves of two ranks, while the default group is busy with all-reduces."""
    saving = Saver(CheckpointConfig(), folder, rank, world, saver.own_barrier(30))
    total = torch.zeros(())
    for step in range(1, 4):
        saving.save(step, [Shard("w", torch.full((2, 3), float(step)), (4, 3), (2 * rank, 0))], {"step": step})
        for _ in range(20):
            one = torch.ones(())
            dist.all_reduce(one)
            total += one
    saving.wait()
    return float(total)


def test_ranks_save_while_they_train(tmp_path: Path, ranks: Callable[[int], Pool]) -> None:
    assert ranks(2).run(save_while_training, tmp_path) == [120.0, 120.0]
    path = io.latest(tmp_path)
    assert path == tmp_path / "step-00000003"
    assert io.verify(path) == []
    assert io.read_full(path, ["w"])["w"].tolist() == [[3.0] * 3] * 4


def test_copies_are_reused(tmp_path: Path) -> None:
    saving = Saver(CheckpointConfig(keep_last=9), tmp_path)
    tensors = state(1)
    saving.save(1, whole(tensors), {})
    saving.wait()
    memory = {key: tensor.data_ptr() for key, tensor in saving._copies.items()}
    for tensor in tensors.values():
        tensor.copy_(tensor.flip(0) if tensor.dim() else tensor + 1)
    saving.save(2, whole(tensors), {})
    saving.wait()
    assert memory == {key: tensor.data_ptr() for key, tensor in saving._copies.items()}
    assert same(io.read_full(tmp_path / "step-00000001", tensors), state(1))
    assert same(io.read_full(tmp_path / "step-00000002", tensors), tensors)


def test_room_is_made_before_the_first_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saving = Saver(CheckpointConfig(), tmp_path)
    tensors = state(1)
    saving.prepare(whole(tensors))
    saving.wait()
    memory = [tensor.data_ptr() for tensor in saving._copies.values()]
    saving.save(1, whole(tensors), {})
    saving.wait()
    assert memory == [tensor.data_ptr() for tensor in saving._copies.values()] and len(memory) == len(tensors)
    assert same(io.read_full(tmp_path / "step-00000001", tensors), tensors)

    def full(tensor: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("not enough memory")

    monkeypatch.setattr(saver, "_memory_for", full)
    saving.prepare([Shard.whole("more", torch.ones(2))])
    with pytest.raises(CheckpointError, match=r"not enough memory.*set checkpoint\.asynchronous=false"):
        saving.wait()


def test_old_checkpoints_are_deleted(tmp_path: Path) -> None:
    scores = {1: 5.0, 2: 1.0, 3: 4.0, 4: 3.0, 5: 2.0, 6: 9.0}
    saving = Saver(CheckpointConfig(keep_last=2, keep_every=3, keep_best=1, asynchronous=False), tmp_path)
    for step, score in scores.items():
        saving.save(step, whole({"w": torch.ones(2)}), {"score": score})
    assert held(tmp_path) == [2, 3, 5, 6]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"keep_last": 1}, {50, 60}),
        ({"keep_last": 3}, {30, 40, 50, 60}),
        ({"keep_last": 1, "keep_every": 20}, {20, 40, 50, 60}),
        ({"keep_last": 1, "keep_best": 2}, {10, 30, 50, 60}),
        ({"keep_last": 1, "keep_best": 2, "best": "highest"}, {20, 40, 50, 60}),
    ],
)
def test_rules(options: dict[str, Any], expected: set[int]) -> None:
    """60 belongs to a branch that the run has left: never deleted here, and not one of the last."""
    scores = {10: 1.0, 20: 9.0, 30: 2.0, 40: 8.0, 60: 0.0}
    assert keep([10, 20, 30, 40, 50, 60], 50, scores, CheckpointConfig(**options)) == expected


def test_config_names_the_field() -> None:
    with pytest.raises(ValueError, match=r"checkpoint\.keep_last is 0; set it to 1 or more"):
        CheckpointConfig(keep_last=0)
