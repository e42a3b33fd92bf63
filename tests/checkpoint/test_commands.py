"""``megnorm checkpoint inspect | verify | diff``."""

import argparse
import json
from pathlib import Path

import pytest

from megnorm.checkpoint import commands, io
from megnorm.checkpoint.io import CheckpointError, Shard
from tests.checkpoint.helpers import save_ranks, state, whole


def run(*words: object) -> int:
    parser = argparse.ArgumentParser()
    commands.add_checkpoint_arguments(parser)
    return commands.run_checkpoint(parser.parse_args([str(word) for word in words]))


def test_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    io.save(tmp_path / "checkpoints", 3, whole(state()), {"config": {"model": {"width": 5}}})
    assert run("inspect", tmp_path) == 0
    text = capsys.readouterr().out
    assert "step 3, written by 1 rank(s)" in text
    assert "config.model.width: 5" in text
    assert "blocks.0.ffn.up.weight  float32   [6, 5]  1 slice(s)" in text
    assert run("inspect", tmp_path, "--json", "--match", "ffn") == 0
    assert list(json.loads(capsys.readouterr().out)["tensors"]) == ["blocks.0.ffn.up.weight"]


def test_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = io.save(tmp_path, 3, whole(state()), {})
    assert run("verify", tmp_path) == 0
    assert "whole: step 3" in capsys.readouterr().out
    file = path / "rank-00000-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x55")
    assert run("verify", path) == 1
    assert "of tensor blocks.0.norm.weight are damaged" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="not a folder"):
        run("verify", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        run("verify", tmp_path / "empty")


def test_diff(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = state()
    first = io.save(tmp_path / "a", 3, whole(tensors), {"seed": 1})
    up = tensors.pop("blocks.0.ffn.up.weight").nan_to_num(0.0, 0.0, 0.0)
    first = io.save(tmp_path / "a", 3, [*whole(tensors), Shard.whole("up", up)], {"seed": 1})
    halves = [[Shard("up", up[:, :2], (6, 5), (0, 0)), *whole(tensors)], [Shard("up", up[:, 2:], (6, 5), (0, 2))]]
    second = save_ranks(tmp_path / "b", 3, halves, {"seed": 2})
    assert run("diff", first, second) == 0  # another layout, the same tensors
    assert capsys.readouterr().out == "meta seed: 1 -> 2\n0 tensor(s) differ, of 3\n"
    up[1, 1] += 1 + up[1, 1].abs()
    third = io.save(tmp_path / "c", 3, [Shard.whole("up", up), Shard.whole("counter", tensors["counter"])], {"seed": 1})
    assert run("diff", first, third) == 1
    text = capsys.readouterr().out
    assert f"blocks.0.norm.weight: only in {first}" in text
    assert "up: largest difference" in text
