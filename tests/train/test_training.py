"""Training as a user starts it: it learns, resumes bit for bit, accumulates exactly, and refuses what is wrong."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megnorm import config as configs
from megnorm.checkpoint import io
from megnorm.cli import main
from megnorm.norms.resolve import resolve
from megnorm.refuse import PlanError
from megnorm.train import main as main_module
from megnorm.train.signals import EXIT_STOPPED
from tests.marks import thinned
from tests.train.tiny import losses, write_config, write_data


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    return write_data(tmp_path / "text")


def test_a_run_learns_and_leaves_its_record(tmp_path: Path, prefix: Path) -> None:
    config = write_config(tmp_path, prefix, train=_train(tmp_path, "run", steps=60))
    assert main(["train", "--config", str(config)]) == 0
    curve = losses(tmp_path / "run")
    assert len(curve) == 60 and curve[60] < 0.7 * curve[1]
    assert configs.load(tmp_path / "run/config.yaml") == configs.load(config)
    record = io.read_meta(io.latest(tmp_path / "run/checkpoints"))
    assert (record["step"], record["consumed_samples"], record["updates"]) == (60, 240, 60)


@pytest.mark.parametrize("precision", thinned(("bf16", "fp32", "fp16"), 3))
def test_resume_is_bit_for_bit(tmp_path: Path, prefix: Path, precision: str) -> None:
    """Dropout, schedule, data order, masters, moments and the loss scale all continue."""
    model = {"dropout": 0.1, "attention_dropout": 0.1}
    whole = write_config(tmp_path, prefix, train=_train(tmp_path, "whole", precision=precision))
    overrides = [f"model.{key}={value}" for key, value in model.items()]
    assert main(["train", "--config", str(whole), *overrides]) == 0
    parts = [*overrides, f"train.out={tmp_path / 'parts'}"]
    assert main(["train", "--config", str(whole), *parts, "train.stop_after=5"]) == EXIT_STOPPED
    assert main(["train", "--config", str(whole), *parts]) == 0
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    a, b = (io.latest(tmp_path / name / "checkpoints") for name in ("whole", "parts"))
    names = list(io.available(a))
    one, other = io.read_full(a, names), io.read_full(b, names)
    assert all(torch.equal(one[name], other[name]) for name in names)


@pytest.mark.full
def test_a_signal_saves_and_the_next_start_continues(tmp_path: Path, prefix: Path) -> None:
    config = write_config(tmp_path, prefix, train=_train(tmp_path, "run", steps=400), checkpoint={"every": 0})
    command = [sys.executable, "-m", "megnorm", "train", "--config", str(config)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    record = tmp_path / "run/metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (record.exists() and record.read_text().count("\n") >= 5):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == EXIT_STOPPED
    stopped = io.read_meta(io.latest(tmp_path / "run/checkpoints"))["step"]
    assert 5 <= stopped < 400
    assert main(["train", "--config", str(config)]) == 0
    other = ["train", "--config", str(config), f"train.out={tmp_path / 'whole'}"]
    assert main(other) == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_a_new_run_may_start_from_weights_alone(tmp_path: Path, prefix: Path) -> None:
    first = write_config(tmp_path, prefix, train=_train(tmp_path, "first", precision="bf16"))
    assert main(["train", "--config", str(first)]) == 0
    again = ["train", "--config", str(first), f"train.out={tmp_path / 'again'}", "train.steps=1", "optim.lr=1e-30"]
    assert main([*again, "optim.warmup_steps=0", f"checkpoint.init_from={tmp_path / 'first'}"]) == 0
    old, new = (io.latest(tmp_path / name / "checkpoints") for name in ("first", "again"))
    assert io.read_meta(new)["step"] == 1 and io.read_meta(new)["consumed_samples"] == 4
    names = [name for name in io.available(old) if not name.startswith("optim.")]
    a, b = io.read_full(old, names), io.read_full(new, names)
    assert all(torch.allclose(a[name], b[name], rtol=1e-6, atol=1e-20) for name in names)


def test_torchrun_does_not_restart_what_was_stopped(
    tmp_path: Path, prefix: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in {"RANK": 0, "WORLD_SIZE": 1, "TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_MAX_RESTARTS": 2}.items():
        monkeypatch.setenv(key, str(value))
    assert main(["train", "--config", str(write_config(tmp_path, prefix)), "train.stop_after=2"]) == 0


def test_micro_batches_do_not_change_the_step(tmp_path: Path, prefix: Path) -> None:
    curves = []
    for size in (1, 2, 4):
        train = _train(tmp_path, f"by{size}", micro_batch=size, precision="fp64")
        assert main(["train", "--config", str(write_config(tmp_path, prefix, train=train))]) == 0
        curves.append(losses(tmp_path / f"by{size}"))
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], rel=1e-10)


def test_packed_documents_train(tmp_path: Path, prefix: Path) -> None:
    data = {"path": str(prefix), "split": [0.8, 0.2, 0.0], "separate_documents": True}
    config = write_config(tmp_path, prefix, data=data, train=_train(tmp_path, "run", steps=3))
    assert main(["train", "--config", str(config)]) == 0


def test_divergence_stops_and_is_not_saved(tmp_path: Path, prefix: Path, capsys: pytest.CaptureFixture[str]) -> None:
    optim = {"lr": 1e30, "warmup_steps": 0, "clip": 0.0}
    config = write_config(tmp_path, prefix, optim=optim, checkpoint={"every": 1})
    assert main(["train", "--config", str(config)]) == 1
    assert "Lower optim.lr" in capsys.readouterr().err
    found = io.latest(tmp_path / "run/checkpoints")
    weights = io.read_full(found, list(io.available(found)))
    assert all(bool(torch.isfinite(weight).all()) for weight in weights.values())


REFUSALS = {
    "wrong key": (["model.layer=3"], "unknown key 'model.layer'; did you mean 'model.layers'?"),
    "wrong section": (["modle.layers=3"], "unknown key 'modle'; did you mean 'model'?"),
    "wrong value": (["optim.lr=fast"], "optim.lr"),
    "wrong choice": (["model.norm.kind=batchnorm"], "model.norm.kind"),
    "unknown scheme": (["model.norm.scheme=hybridnrm"], "did you mean 'hybridnorm'?"),
    "unknown option": (["model.norm.options.heads=1"], "norm.options.heads"),
    "too long a sequence": (["train.sequence_length=32"], "model.max_positions=16"),
    "uneven batch": (["train.global_batch=3"], "use 2 or 4"),
    "vocabulary too small": (["model.vocab_size=40"], "model.vocab_size is 40"),
    "missing data": (["data.path=nowhere"], "nowhere"),
    "missing tokenizer": (["data.tokenizer=nowhere"], "nowhere"),
    "warm-up beyond the end": (["optim.warmup_steps=50"], "optim.warmup_steps"),
    "unknown backend": (["kernels.prefer.norm=cudnn"], "kernels.prefer.norm"),
    "unknown operation": (["kernels.prefer.nrm=torch"], "kernels.prefer.nrm"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_are_one_sentence(name: str, tmp_path: Path, prefix: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides, expected = REFUSALS[name]
    config = write_config(tmp_path, prefix)
    assert main(["train", "--config", str(config), *overrides]) == 2
    message = capsys.readouterr().err.strip()
    assert expected in message and "Traceback" not in message and "\n" not in message.split("megnorm train: ", 1)[1]
    assert not (tmp_path / "run/checkpoints").exists()


def test_a_truncated_index_is_named(tmp_path: Path, prefix: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = prefix.with_suffix(".idx")
    index.write_bytes(index.read_bytes()[:-5])
    assert main(["train", "--config", str(write_config(tmp_path, prefix))]) == 2
    assert "text.idx" in capsys.readouterr().err


def test_another_model_does_not_continue(tmp_path: Path, prefix: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path, prefix)
    assert main(["train", "--config", str(config), "train.stop_after=1"]) == EXIT_STOPPED
    assert main(["train", "--config", str(config), "model.ffn=32"]) == 2
    assert "model.ffn is 32" in capsys.readouterr().err


def _train(folder: Path, name: str, **changes: object) -> dict[str, object]:
    base = {
        "out": str(folder / name), "steps": 8, "sequence_length": 16, "global_batch": 4, "micro_batch": 2,
        "eval_batches": 1, "threads": 1,
    }  # fmt: skip
    return base | changes


def test_a_checkpoint_older_than_an_option_goes_on_with_its_default() -> None:
    config = configs.RunConfig()
    record = {"config": configs.to_dict(config), "resolved": resolve(config.model.norm, config.model.layers).to_json()}
    del record["config"]["model"]["attention"], record["config"]["model"]["logit_scale"]
    assert main_module._continued(record, config, None).scheme == config.model.norm.scheme
    scaled = replace(config, model=replace(config.model, logit_scale=2.0))
    with pytest.raises(PlanError, match="model.logit_scale is 2.0, but None was trained with 1.0"):
        main_module._continued(record, scaled, None)
