"""Switches for looking closely, off by default; and what is said when memory runs out."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megnorm import config as configs
from megnorm.cli import main
from megnorm.parallel.recorder import RECORDER
from megnorm.train import loop, profile
from megnorm.train.config import ProfileConfig, TrainConfig
from megnorm.train.memory import out_of_memory
from tests.train.tiny import write_config, write_data


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_config(tmp_path, write_data(tmp_path / "text"))


def test_off_leaves_nothing(tmp_path: Path, path: Path) -> None:
    assert main(["train", "--config", str(path), "train.steps=2"]) == 0
    assert not (tmp_path / "run/profile").exists() and not (tmp_path / "run/crash").exists()


def test_a_trace_of_the_steps_that_were_asked_for(tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = loop.train_step

    def marked(run: Any) -> Any:
        with torch.profiler.record_function(f"step {run.step + 1}"):
            return step(run)

    monkeypatch.setattr(loop, "train_step", marked)
    command = ["train", "--config", str(path), "train.profile.trace=[3, 5]", "train.profile.flight_recorder=true"]
    assert main([*command, "train.stop_after=5"]) == 75
    (trace,) = (tmp_path / "run/profile").glob("*.json")
    assert trace.name == "trace-steps-3-to-4-rank-00000.json"
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"step 3", "step 4"} <= names and not {"step 2", "step 5"} & names
    assert any("addmm" in str(name) or "aten::mm" in str(name) for name in names)
    ring = (tmp_path / "run/profile/collectives-rank-00000.jsonl").read_text().splitlines()
    assert json.loads(ring[0]) == {"rank": 0} and len(ring) == 1 + len(RECORDER.entries())
    trace.unlink()
    assert main(command) == 0
    assert not trace.exists(), "a run that goes on behind those steps traces nothing"


def test_a_trace_that_the_run_ends_in_is_written(tmp_path: Path, path: Path) -> None:
    assert main(["train", "--config", str(path), "train.profile.trace=[2, 50]", "train.steps=4"]) == 0
    assert (tmp_path / "run/profile/trace-steps-2-to-49-rank-00000.json").stat().st_size > 1000


REFUSED = {
    "train.profile.trace=[5, 5]": "train.profile.trace is [5, 5]; set it to [a, b] with 1 <= a < b",
    "train.profile.trace=[0, 5]": "train.profile.trace is [0, 5]",
    "train.profile.trace=3": "train.profile.trace",
    "train.profile.memory_snapshot=true": "this run is on the CPU; set it to false",
    "train.profile.flightrecorder=true": "did you mean 'train.profile.flight_recorder'?",
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="one of them is refused on the CPU only")
@pytest.mark.parametrize("override", REFUSED)
def test_refusals_are_one_sentence(
    tmp_path: Path, path: Path, capsys: pytest.CaptureFixture[str], override: str
) -> None:
    assert main(["train", "--config", str(path), override]) == 2
    said = capsys.readouterr().err.strip()
    assert REFUSED[override] in said and said.count("\n") == 0, said
    assert not (tmp_path / "run").exists()


def test_options_survive_the_saved_config(tmp_path: Path) -> None:
    config = configs.load(None, ["train.profile.trace=[3, 5]", "train.guard.on_spike=skip", "train.watchdog.timeout=5"])
    configs.save(config, tmp_path / "saved.yaml")
    assert configs.load(tmp_path / "saved.yaml") == config and config.train.profile.trace == (3, 5)


def test_nccl_keeps_a_record_of_its_own(tmp_path: Path) -> None:
    with mock.patch.dict(os.environ):  # taken back whole
        for key in ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE", "TORCH_NCCL_DUMP_ON_TIMEOUT"):
            os.environ.pop(key, None)
        os.environ["TORCH_NCCL_DEBUG_INFO_TEMP_FILE"] = "mine"
        train = TrainConfig(out=str(tmp_path), profile=ProfileConfig(flight_recorder=True))
        profile.prepare(train, torch.device("cpu"))
        assert "TORCH_FR_BUFFER_SIZE" not in os.environ, "gloo has none"
        profile.prepare(train, torch.device("cuda"))
        assert os.environ["TORCH_FR_BUFFER_SIZE"] == "2000" and os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
        assert os.environ["TORCH_NCCL_DEBUG_INFO_TEMP_FILE"] == "mine", "what the user has set stays"


# Out of memory


def test_memory_that_has_run_out_is_said_with_the_remedy(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loop, "train_step", lambda run: torch.empty(1 << 60, dtype=torch.uint8))
    assert main(["train", "--config", str(path)]) == 1
    said = capsys.readouterr().err
    assert (
        "out of main memory (1152921504606846976 bytes more were asked for): lower train.micro_batch (now 2), or"
        in said
    )
    assert "parallel.tp" in said and "Traceback" not in said


def test_what_counts_as_memory_that_has_run_out() -> None:
    train = TrainConfig(micro_batch=1)
    cuda = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB"
    )
    said = out_of_memory(cuda, train)
    assert said is not None and said.startswith("out of accelerator memory (2.00 GiB more were asked for): set")
    assert "micro_batch" not in said, "it is 1 already"
    assert "recompute=[block]" in said
    assert "recompute" not in str(out_of_memory(cuda, TrainConfig(recompute=("block",)))), "it is on already"
    assert out_of_memory(MemoryError(), train)
    assert out_of_memory(
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: not enough memory"), train
    )
    assert out_of_memory(RuntimeError("Connection closed by peer"), train) is None
    assert out_of_memory(ValueError("out of memory"), train) is None


KEPT = """
import resource, sys, torch
from megnorm.parallel.pages import keep_pages
sys.argv[1] == "kept" and keep_pages()
for i in range(6):  # steps of tensors of several sizes, some larger than what the allocator keeps by itself
    begun = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [torch.ones((1 << 22) * k) for k in (2, 9, 1, 12, 3)]
    more = held[1] + 1
    del held
    last = torch.ones(1 << 24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - begun)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_pages_are_kept_for_the_next_step() -> None:
    """Tensors like those of the step before cost next to no page faults; without it, one for every page."""
    asked, kept = (
        int(subprocess.run([sys.executable, "-c", KEPT, how], check=True, capture_output=True, text=True).stdout)
        for how in ("asked", "kept")
    )
    assert kept < asked / 4
