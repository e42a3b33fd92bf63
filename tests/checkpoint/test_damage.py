"""Nothing damaged loads: flipped bits, torn, missing and mixed files, and files made to harm."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megnorm.checkpoint import io
from megnorm.checkpoint.folder import complete_text
from megnorm.checkpoint.io import CheckpointError, Shard
from tests.checkpoint.helpers import bits, blank, random_tensor, same, save_ranks, state, whole


def flip(path: Path, index: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[index] ^= 1 << bit
    path.write_bytes(data)


def names(path: Path) -> list[str]:
    return sorted(file.name for file in path.iterdir())


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    """One random bit of every byte of every file: verify finds it, and no load changes a tensor."""
    tensors = state()
    path = io.save(tmp_path, 1, whole(tensors), {"step": 1}, chunk_bytes=64)
    random.seed(0)
    for name in names(path):
        good = (path / name).read_bytes()
        header = int.from_bytes(good[:8], "little") + 8 if name.startswith("rank") else len(good)
        for index in range(len(good)):
            flip(path / name, index, random.randrange(8))
            assert io.verify(path), f"byte {index} of {name}"
            if index % 7 == 0 or index >= header:
                loaded = blank(tensors)
                with pytest.raises(CheckpointError, match=f"{name}|manifest.json"):
                    io.load(path, whole(loaded))
                assert same(loaded, blank(tensors))
            (path / name).write_bytes(good)
    assert io.verify(path) == []


def test_a_damaged_byte_names_file_and_tensor(tmp_path: Path) -> None:
    tensors = state()
    path = io.save(tmp_path, 1, whole(tensors), {})
    flip(path / "rank-00000-00000.safetensors", -1, 0)
    message = r"rank-00000-00000.safetensors: bytes .* of tensor blocks.0.norm.weight are damaged"
    for untouched in (True, False):
        with pytest.raises(CheckpointError, match=message):
            io.load(path, whole(blank(tensors)), untouched=untouched)
    io.load(path, whole({"counter": torch.zeros((), dtype=torch.int64)}))  # what is not damaged can still be read
    io.load(path, whole(blank(tensors)), verify=False)


def test_all_damage_is_reported_at_once(tmp_path: Path) -> None:
    path = save_ranks(tmp_path, 1, [[Shard.whole(f"w.{r}", random_tensor((9,), seed=r))] for r in range(2)], {})
    for rank in range(2):
        flip(path / f"rank-{rank:05d}-00000.safetensors", -1, 3)
    with pytest.raises(CheckpointError, match=r"w\.0 .*; .*w\.1 "):
        io.load(path, whole({f"w.{r}": torch.zeros(9) for r in range(2)}))
    assert len(io.verify(path)) == 2


def test_torn_and_missing_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = state()
    first = io.save(tmp_path, 1, whole(tensors), {})
    second = io.save(tmp_path, 2, whole(tensors), {})
    for name in names(second):
        good = (second / name).read_bytes()
        for damage in ("cut", "empty", "grown", "gone"):
            if damage == "gone":
                (second / name).unlink()
            else:
                (second / name).write_bytes({"cut": good[:-1], "empty": b"", "grown": good + b"\0"}[damage])
            with pytest.raises(CheckpointError, match=name):
                io.load(second, whole(blank(tensors)))
            assert io.verify(second)
            caplog.clear()
            assert io.latest(tmp_path) == first
            assert "passing over checkpoint step-00000002" in caplog.text
        (second / name).write_bytes(good)
    assert io.latest(tmp_path) == second


def test_files_of_two_steps_mixed(tmp_path: Path) -> None:
    paths = [io.save(tmp_path, step, whole(state(step)), {"step": step}) for step in (1, 2)]
    for name in names(paths[0]):
        good = (paths[1] / name).read_bytes()
        shutil.copy(paths[0] / name, paths[1] / name)
        problems = io.verify(paths[1])
        assert problems
        if name.startswith("rank"):
            with pytest.raises(CheckpointError, match=rf"{name}.*written for step 1\b"):
                io.load(paths[1], whole(blank(state())))
        (paths[1] / name).write_bytes(good)
    for name in names(paths[0]):
        shutil.copy(paths[0] / name, paths[1] / name)
    assert "belongs to step 1" in io.verify(paths[1])[0]


def test_a_damaged_record_is_no_disaster(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths = [io.save(tmp_path, step, whole(state(step)), {}) for step in (1, 2, 3)]
    record = tmp_path / "latest"
    good = record.read_bytes()
    for index in range(0, len(good), 3):
        flip(record, index, index % 8)
        assert io.latest(tmp_path) in (paths[2], paths[1]), index
        record.write_bytes(good)
    record.write_bytes(b"")
    assert io.latest(tmp_path) == paths[2]
    assert "latest is damaged" in caplog.text
    record.unlink()
    assert io.latest(tmp_path) == paths[2]
    assert io.latest(tmp_path / "nowhere") is None


def test_the_record_decides_after_going_back(tmp_path: Path) -> None:
    """A run that went back to step 1 and saved step 2 does not resume from step 3 of the branch it left."""
    for step in (1, 3, 2):
        io.save(tmp_path, step, whole(state(step)), {})
    assert io.latest(tmp_path) == tmp_path / "step-00000002"
    shutil.rmtree(tmp_path / "step-00000002")
    assert io.latest(tmp_path) == tmp_path / "step-00000001"


def test_resume_passes_over_damage(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (1, 2):
        io.save(tmp_path, step, whole(state(step)), {"step": step})
    flip(tmp_path / "step-00000002" / "rank-00000-00000.safetensors", -1, 0)
    loaded = blank(state())
    found = io.resume(tmp_path, whole(loaded))
    assert found == io.Resumed(tmp_path / "step-00000001", {"step": 1}, 3, 6 * 5 * 4 + 7 * 2 + 8, True)
    assert same(loaded, state(1))
    assert "passing over checkpoint step-00000002" in caplog.text
    answers = iter([False, True])  # another rank cannot load the newest
    assert io.resume(tmp_path, whole(loaded), agree=lambda ok: next(answers) and ok) is not None
    flip(tmp_path / "step-00000001" / "rank-00000-00000.safetensors", -1, 0)
    with pytest.raises(CheckpointError, match="step-00000002"):
        io.resume(tmp_path, whole(loaded))
    assert io.resume(tmp_path / "empty", whole(loaded)) is None


# Malice: the checksums are right, since whoever made the file could compute them.

Edit = Callable[[dict[str, Any]], None]


def _slices(manifest: dict[str, Any]) -> dict[str, list[Any]]:
    """By file, of the one tensor."""
    slices: dict[str, list[Any]] = manifest["tensors"]["w"]["slices"]
    return slices


def _row(place: int, value: Any) -> Edit:
    """A value of the one slice: 0 offset, 1 shape, 2 first byte, 3 sums."""

    def edit(manifest: dict[str, Any]) -> None:
        (rows,) = _slices(manifest).values()
        rows[0][place] = value

    return edit


def _rename(name: str) -> Edit:
    def edit(manifest: dict[str, Any]) -> None:
        manifest["files"] = {name: next(iter(manifest["files"].values()))}
        manifest["tensors"]["w"]["slices"] = {name: next(iter(_slices(manifest).values()))}

    return edit


def _unlisted(manifest: dict[str, Any]) -> None:
    manifest["tensors"]["w"]["slices"] = {"rank-00009-00000.safetensors": next(iter(_slices(manifest).values()))}


MALICE: dict[str, Edit] = {
    "traversal": _rename("../../outside.safetensors"),
    "absolute": _rename("/etc/passwd"),
    "nested": _rename("a/rank-00000-00000.safetensors"),
    "nul": _rename("rank-00000-00000.safetensors\0"),
    "unlisted": _unlisted,
    "beyond the end": _row(2, 10**9),
    "into the header": _row(2, 0),
    "negative": _row(2, -8),
    "float": _row(2, 128.0),
    "boolean": _row(0, [True, 0]),
    "outside the tensor": _row(0, [3, 0]),
    "few checksums": _row(3, []),
    "checksums that are none": _row(3, ["g" * 16]),
    "a slice of five": lambda m: next(iter(_slices(m).values()))[0].append(1),
    "a slice that is none": lambda m: next(iter(_slices(m).values())).append(None),
    "huge shape": lambda m: m["tensors"]["w"].update(shape=[2**40, 2**40]),
    "many dimensions": lambda m: m["tensors"]["w"].update(shape=[1] * 1000),
    "unknown dtype": lambda m: m["tensors"]["w"].update(dtype="__import__('os')"),
    "tensor name": lambda m: m["tensors"].update({"w\n../x": m["tensors"].pop("w")}),
    "huge chunks": lambda m: m.update(chunk_bytes=2**50),
    "no chunks": lambda m: m.update(chunk_bytes=0),
    "huge header": lambda m: m["files"]["rank-00000-00000.safetensors"].update(header_bytes=2**40),
    "huge file": lambda m: m["files"]["rank-00000-00000.safetensors"].update(bytes=2**60),
    "huge meta": lambda m: m["meta"].update(bytes=2**60),
    "version": lambda m: m.update(version=1),
    "lists for objects": lambda m: m.update(tensors=[]),
    "hole": lambda m: m["tensors"]["w"].update(slices={}),
    "a list of slices": lambda m: m["tensors"]["w"].update(slices=[]),
}


@pytest.mark.parametrize("kind", MALICE)
def test_malicious_manifest(tmp_path: Path, kind: str) -> None:
    path = io.save(tmp_path / "run", 1, [Shard.whole("w", torch.ones(4, 4))], {})
    (tmp_path / "outside.safetensors").write_bytes((path / "rank-00000-00000.safetensors").read_bytes())
    before = sorted(tmp_path.rglob("*"))
    manifest = json.loads((path / "manifest.json").read_bytes())
    MALICE[kind](manifest)
    data = json.dumps(manifest).encode()
    (path / "manifest.json").write_bytes(data)
    (path / "complete").write_bytes(complete_text(data))
    assert io.verify(path)
    target = torch.zeros(4, 4)
    with pytest.raises(CheckpointError):
        io.load(path, [Shard.whole("w", target)])
    assert not target.any()
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("text", [b"[" * 100_000, b"1" * 100_000, b"\xff\xfe", b"{", b"[]", b'{"format": NaN}'])
def test_json_made_to_harm(tmp_path: Path, text: bytes) -> None:
    path = io.save(tmp_path, 1, whole(state()), {})
    (path / "manifest.json").write_bytes(text)
    (path / "complete").write_bytes(complete_text(text))
    with pytest.raises(CheckpointError, match="manifest.json"):
        io.load(path, whole(blank(state())))


def test_links_pipes_and_giant_files_are_not_opened(tmp_path: Path) -> None:
    path = io.save(tmp_path / "run", 1, whole(state()), {})
    name = path / "rank-00000-00000.safetensors"
    shutil.copy(name, tmp_path / "outside")
    name.unlink()
    name.symlink_to(tmp_path / "outside")
    with pytest.raises(CheckpointError, match="cannot be opened"):
        io.load(path, whole(blank(state())))
    name.unlink()
    os.mkfifo(name)
    with pytest.raises(CheckpointError, match="not a regular file"):
        io.load(path, whole(blank(state())))
    os.truncate(path / "manifest.json", 1 << 40)  # sparse
    with pytest.raises(CheckpointError, match="larger than"):
        io.load(path, whole(blank(state())))


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    """A pickle under our names is refused as what it is not."""
    path = io.save(tmp_path, 1, whole(state()), {})
    torch.save({"w": torch.ones(2)}, path / "manifest.json")
    with pytest.raises(CheckpointError, match="manifest.json"):
        io.load(path, whole(blank(state())))
    assert not bits(blank(state())["counter"]).any()
