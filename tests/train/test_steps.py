"""Micro-batches of packed rows, and what a run that goes on takes over from before."""

import json
from pathlib import Path

import pytest
import torch

from megnorm.checkpoint import io
from megnorm.cli import main
from megnorm.data.batch import Batch
from megnorm.train import loop
from megnorm.train.config import TrainConfig
from megnorm.train.guard import DivergedError
from megnorm.train.rows import micro_batches
from megnorm.train.signals import EXIT_STOPPED
from tests.train.tiny import losses, write_config, write_data


def test_packed_rows_are_cut_into_micro_batches() -> None:
    """Three rows of 4 tokens, documents ending inside rows and at their ends; two rows a micro-batch."""
    places = torch.arange(12)[:, None]
    batch = Batch(
        places, places + 1, torch.ones(12, 1), places % 4, torch.tensor([0, 3, 4, 8, 9, 12], dtype=torch.int32)
    )
    train = TrainConfig(sequence_length=4, micro_batch=2)
    parts = list(micro_batches(batch, train, torch.device("cpu")))
    assert [part.documents for part in parts] == [(3, 1, 4), (1, 3)]
    assert [part.tokens.flatten().tolist() for part in parts] == [list(range(8)), list(range(8, 12))]
    assert parts[1].positions is not None and parts[1].positions.flatten().tolist() == [0, 1, 2, 3]


def test_packed_micro_batches_do_not_change_the_step(tmp_path: Path) -> None:
    prefix, curves = write_data(tmp_path / "text"), []
    for size in (1, 4):
        path = write_config(tmp_path, prefix)
        changes = ["data.separate_documents=true", f"train.micro_batch={size}", "train.precision=fp64", "train.steps=3"]
        assert main(["train", "--config", str(path), *changes, f"train.out={tmp_path / str(size)}"]) == 0
        curves.append(losses(tmp_path / str(size)))
    assert curves[0] == pytest.approx(curves[1], rel=1e-10)


def test_a_run_goes_on_in_fp16_with_a_loss_scale_of_its_own(tmp_path: Path) -> None:
    path = write_config(tmp_path, write_data(tmp_path / "text"))
    assert main(["train", "--config", str(path), "train.stop_after=2"]) == EXIT_STOPPED
    changes = ["train.precision=fp16", "optim.loss_scale=256", "train.steps=4", "optim.warmup_steps=0"]
    assert main(["train", "--config", str(path), *changes]) == 0
    assert io.read_meta(io.latest(tmp_path / "run/checkpoints"))["loss_scale"]["scale"] == 256.0


def test_dropout_and_batch_may_change_in_a_run(tmp_path: Path) -> None:
    path = write_config(tmp_path, write_data(tmp_path / "text"))
    assert main(["train", "--config", str(path), "train.stop_after=2"]) == EXIT_STOPPED
    assert main(["train", "--config", str(path), "model.dropout=0.1", "train.global_batch=8"]) == 0
    lines = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    tokens = [line["tokens"] for line in lines if "tokens" in line]
    assert tokens == [64, 128, *(128 + 128 * i for i in range(1, 7))]


def test_recompute_does_not_change_a_run(tmp_path: Path) -> None:
    """Two micro-batches a step with dropout; a checkpoint is continued under other modes."""
    path, curves = write_config(tmp_path, write_data(tmp_path / "text")), []
    for name, first, then in (("kept", "[]", "[]"), ("again", "[block]", "[attention,norms,activations]")):
        changes = [f"train.out={tmp_path / name}", "model.dropout=0.1", "model.attention_dropout=0.1", "train.steps=4"]
        changes.append("train.precision=bf16")
        stop = ["train.stop_after=2", f"train.recompute={first}"]
        assert main(["train", "--config", str(path), *changes, *stop]) == EXIT_STOPPED
        assert main(["train", "--config", str(path), *changes, f"train.recompute={then}"]) == 0
        curves.append(losses(tmp_path / name))
    assert curves[0] == curves[1] and len(curves[0]) == 4


def test_divergence_lets_the_save_under_way_finish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the process groups would be taken from under it."""
    waits: list[int] = []
    wait = loop.Saver.wait
    monkeypatch.setattr(loop.Saver, "wait", lambda self: (waits.append(1), wait(self))[1])

    def diverge(run: object) -> None:
        raise DivergedError("step 1")

    monkeypatch.setattr(loop, "train_step", diverge)
    assert main(["train", "--config", str(write_config(tmp_path, write_data(tmp_path / "text")))]) == 1
    assert waits
