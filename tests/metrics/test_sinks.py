"""The record survives what runs survive, and the other sinks show the same numbers."""

import io
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megnorm.metrics.config import MetricsConfig
from megnorm.metrics.record import Record, Writer, cut
from megnorm.metrics.sinks import Sinks, _Bar, _Lines

QUIET = MetricsConfig(tensorboard=False, progress=False)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def train(folder: Path, first: int, last: int, *, scale: float = 1.0) -> None:
    with Sinks(QUIET, folder, 10, resume_step=first) as sinks:
        for step in range(first + 1, last + 1):
            sinks.log(step, {"loss": scale / step, "tokens": 8 * step})


def test_a_line_is_in_the_file_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    sinks = Sinks(QUIET, tmp_path / "run", 10)
    sinks.log(1, {"loss": torch.tensor(2.5), "tokens": 8})
    assert lines(tmp_path / "run") == [{"step": 1, "loss": 2.5, "tokens": 8.0}]
    sinks.close()


def test_resume_drops_what_the_interrupted_run_did_after_its_checkpoint(tmp_path: Path) -> None:
    train(tmp_path / "whole", 0, 10)
    train(tmp_path / "cut", 0, 8, scale=1.0)
    train(tmp_path / "cut", 5, 10)
    assert (tmp_path / "cut/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()
    assert [path.name for path in (tmp_path / "cut").iterdir()] == ["metrics.jsonl"]
    train(tmp_path / "cut", 0, 1)
    assert [row["step"] for row in lines(tmp_path / "cut")] == [1]


def test_a_torn_last_line_is_dropped_but_a_broken_one_inside_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert [row["step"] for row in Record.read(path).rows] == [1]
    train(tmp_path, 1, 2)
    assert [row["step"] for row in lines(tmp_path)] == [1, 2]
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        cut(path, 3)
    with pytest.raises(ValueError, match="line 2"):
        Record.read(tmp_path)
    assert path.read_bytes() == before


def test_cutting_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path, 0, 6)
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def fails(_: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", fails)
    with pytest.raises(OSError, match="no space"):
        cut(tmp_path / "metrics.jsonl", 3)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_numbers_that_are_not_finite_stay_valid_json(tmp_path: Path) -> None:
    with Sinks(QUIET, tmp_path, 3) as sinks:
        sinks.log(1, {"loss": math.nan, "grad_norm": math.inf, "lr": 0.1})
    assert lines(tmp_path) == [{"step": 1, "loss": None, "grad_norm": None, "lr": 0.1}]
    row = Record.read(tmp_path).rows[0]
    assert math.isnan(row["loss"]) and row["lr"] == 0.1


def test_only_rank_0_writes(tmp_path: Path) -> None:
    with Sinks(MetricsConfig(wandb=True), tmp_path / "run", 10, rank=1) as sinks:
        sinks.log(1, {"loss": 1.0})
    assert not (tmp_path / "run").exists()


def test_record_gives_series_and_merges_a_step_logged_twice(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "metrics.jsonl")
    writer.log(1, {"loss": 3.0, "tokens": 8.0})
    writer.log(2, {"loss": 2.0, "tokens": 16.0})
    writer.log(2, {"valid_loss": 2.5})
    writer.close()
    record = Record.read(tmp_path)
    assert record.name == tmp_path.name
    assert record.series("valid_loss", "tokens") == ([16.0], [2.5])
    assert record.series("loss") == ([1, 2], [3.0, 2.0])
    assert record.keys("valid") == ["valid_loss"]


def test_a_run_without_a_record_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"metrics\.jsonl: there is no such file"):
        Record.read(tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match="nothing was logged yet"):
        Record.read(tmp_path)


@pytest.mark.parametrize(
    ("config", "module"),
    [
        (MetricsConfig(tensorboard=True, progress=False), "torch.utils.tensorboard"),
        (MetricsConfig(tensorboard=False, progress=False, wandb=True), "wandb"),
    ],
)
def test_a_missing_package_is_one_sentence_with_the_remedy(
    config: MetricsConfig, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=r"metrics\.\w+: the package '\w+' is not installed; pip install"):
        Sinks(config, tmp_path, 10)


def test_tensorboard_shows_the_record_without_what_was_dropped(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = MetricsConfig(progress=False)
    for first, last, value in ((0, 4, 1.0), (2, 4, 2.0)):
        with Sinks(config, tmp_path, 4, resume_step=first) as sinks:
            for step in range(first + 1, last + 1):
                sinks.log(step, {"loss": value})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]


def test_wandb_goes_on_under_the_same_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []
    begun: list[dict[str, Any]] = []

    def init(**options: Any) -> SimpleNamespace:
        begun.append(options)
        return SimpleNamespace(
            id=options["id"] or "fresh",
            log=sent.append,
            define_metric=lambda *_, **__: None,
            finish=lambda: sent.append("finished"),
        )

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    config = MetricsConfig(tensorboard=False, progress=False, wandb=True, wandb_project="norms")
    for first in (0, 1):
        with Sinks(config, tmp_path / "deep", 2, resume_step=first, run_config={"seed": 1}) as sinks:
            sinks.log(first + 1, {"loss": 1.0})
    assert [options["id"] for options in begun] == [None, "fresh"]
    assert begun[0]["project"] == "norms" and begun[0]["name"] == "deep" and begun[0]["config"] == {"seed": 1}
    assert sent == [{"step": 1, "loss": 1.0}, "finished", {"step": 2, "loss": 1.0}, "finished"]


def test_the_bar_and_the_lines_show_what_a_person_watches() -> None:
    values = {"loss": 2.34567, "tokens_per_second": 12_345.0, "mfu": 0.3125, "grad_norm/layer.0": 9.0}
    bar_text, line_text = io.StringIO(), io.StringIO()
    bar = _Bar(100, 20, bar_text)
    bar.log(30, values | {"valid_loss": 2.5})
    bar.log(40, values)
    bar._bar.refresh()
    bar.close()
    last = bar_text.getvalue().split("\r")[-1]
    assert "40/100" in last and "valid=2.5000" in last
    rows = _Lines(100, 20, line_text)
    rows._begin -= 20.0
    rows.log(40, values)
    assert line_text.getvalue() == "step 40/100  loss 2.3457  tok/s 12.3k  MFU 31.2%  01:00 left\n"
    for text in ("loss=2.3457", "tok/s=12.3k", "MFU=31.2%"):
        assert text in last


def test_an_impossible_config_is_refused() -> None:
    with pytest.raises(ValueError, match=r"metrics\.probe_every"):
        MetricsConfig(probe_every=-1)
