"""Batch-size ramp-up: sizes by consumed samples, what is refused, every sample once, exact resume."""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megnorm import config as configs
from megnorm.checkpoint import io
from megnorm.cli import main
from megnorm.config import RunConfig
from megnorm.data.loader import Loader
from megnorm.metrics.record import Record
from megnorm.plan import make_plan
from megnorm.refuse import PlanError
from megnorm.train import loop, step
from megnorm.train.build import build, open_data
from megnorm.train.commands import describe
from megnorm.train.config import BatchRamp, TrainConfig
from megnorm.train.signals import EXIT_STOPPED
from megnorm.train.step import train_step
from tests.distributed import tiny
from tests.train.tiny import losses, write_config, write_data

RAMP = BatchRamp(start=4, increment=4, samples=24)  # of tiny's 16: steps of 4, 4, 8, 12, then 16
SIZES = [4, 4, 8, 12, 16, 16]


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 9), st.integers(1, 500), st.integers(0, 600))
def test_sizes_are_megatrons(start: int, increment: int, count: int, samples: int, consumed: int) -> None:
    whole = start + increment * count
    config = TrainConfig(global_batch=whole, batch_ramp=BatchRamp(start, increment, samples))
    stage = Fraction(consumed) // (Fraction(samples) / count)  # each size below the last has as many samples
    assert config.batch_at(consumed) == (whole if consumed > samples else min(start + stage * increment, whole))
    steps, used = consumed % 50, 0
    for _ in range(steps):
        used += config.batch_at(used)
    assert config.consumed_after(steps) == used
    assert config.consumed_after(3, used) == config.consumed_after(steps + 3)


def test_without_a_ramp_every_step_is_whole() -> None:
    config = TrainConfig(global_batch=6)
    assert config.batch_at(0) == 6 and config.consumed_after(7) == 42


REFUSED = {
    "start=6 increment=4 samples=9": "train.batch_ramp.start=6 is not a multiple of dp=2 x train.micro_batch=2; use 4 or 8",
    "start=2 increment=4 samples=9": "use 4",
    "start=4 increment=6 samples=9": "train.batch_ramp.increment=6 is not a multiple of dp=2 x train.micro_batch=2; use 4",
    "start=8 increment=16 samples=9": "from start=8 to train.global_batch=32; use 12 or 24",
    "start=32 increment=4 samples=9": "train.batch_ramp.start=32 is not below train.global_batch=32",
    "start=4 samples=9": "train.batch_ramp.increment is missing",
    "start=4 increment=4 samples=0": "train.batch_ramp.samples is 0",
}
SMALL = ["train.global_batch=32", "train.micro_batch=2", "train.sequence_length=64"]


@pytest.mark.parametrize("ramp", REFUSED)
def test_a_ramp_that_no_layout_takes_is_refused(ramp: str) -> None:
    with pytest.raises(ValueError) as error:
        make_plan(configs.load(None, [*SMALL, *(f"train.batch_ramp.{part}" for part in ramp.split())]), 2)
    assert REFUSED[ramp] in str(error.value)


def test_an_interleaved_schedule_asks_for_groups_of_micro_batches() -> None:
    base = configs.load(None, [*SMALL, "parallel.pp=2", "parallel.virtual_stages=2", "parallel.schedule=interleaved"])
    for start, increment, refused in ((8, 8, None), (4, 8, "start=4"), (8, 4, "increment=4")):
        train = replace(base.train, batch_ramp=BatchRamp(start, increment, 64))
        if refused is None:
            make_plan(replace(base, train=train), 4)
        else:
            with pytest.raises(PlanError, match=f"{refused} is not a multiple of dp=2 .* x parallel.pp=2 .*; use 8"):
                make_plan(replace(base, train=train), 4)


def test_plan_counts_the_tokens_of_the_ramp() -> None:
    ramp = ["train.batch_ramp.start=8", "train.batch_ramp.increment=8", "train.batch_ramp.samples=24"]
    text = describe(make_plan(configs.load(None, [*SMALL, *ramp, "train.steps=5"]), 1))
    assert "5 steps, 7,680 tokens, batches from 8 by 8 over the first 24 samples" in text  # 8, 16, 32, 32, 32


def steps_of(config: RunConfig) -> RunConfig:
    return replace(config, train=replace(config.train, global_batch=16, batch_ramp=RAMP))


def seen(rank: int, world: int, config: RunConfig) -> tuple[list[Tensor], list[float], list[int], int]:
    """(tokens [rows, s] of this rank by step, losses, micro-batches by step, samples that the loader was told of)."""
    told: list[int] = []
    init, cut = Loader.__init__, step.micro_batches

    def opened(self: Loader, *args: Any, **options: Any) -> None:
        told.append(options["samples"])
        init(self, *args, **options)

    rows: list[Tensor] = []
    counts: list[int] = []

    def counted(batch: Any, *args: Any) -> Any:
        rows.append(batch.tokens.t().clone())
        parts = list(cut(batch, *args))
        counts.append(len(parts))
        return parts

    with mock.patch.object(Loader, "__init__", opened), mock.patch.object(step, "micro_batches", counted):
        run = build(make_plan(config, world), torch.device("cpu"))
        results = [train_step(run) for _ in range(len(SIZES))]
    assert run.consumed == sum(SIZES) and [result.sequences for result in results] == SIZES
    return rows, [result.loss for result in results], counts, told[0]


def test_every_sample_once_and_in_order(ranks: Any, tmp_path: Path) -> None:
    data = tiny.write_data(tmp_path / "data")
    alone = steps_of(tiny.config(data, tmp_path, steps=len(SIZES), precision="fp64", dp=1))
    both = steps_of(tiny.config(data, tmp_path, steps=len(SIZES), precision="fp64", dp=2))
    want = open_data(make_plan(alone, 1), "train").batch(0, sum(SIZES)).tokens.t()
    (rows, curve, counts, told), two = seen(0, 1, alone), ranks(2).run(seen, both)
    assert torch.equal(torch.cat(rows), want)
    assert torch.equal(torch.cat([torch.cat(pair) for pair in zip(two[0][0], two[1][0], strict=True)]), want)
    assert counts == [size // 2 for size in SIZES] and two[0][2] == [size // 4 for size in SIZES]
    assert told == two[0][3] == sum(SIZES)
    assert two[0][1] == pytest.approx(curve, rel=1e-10)
    staged = steps_of(tiny.config(data, tmp_path, steps=len(SIZES), precision="fp64", dp=1, pp=2))
    assert ranks(2).run(seen, staged)[0][1] == pytest.approx(curve, rel=1e-10), (
        "a pipeline of more and more micro-batches"
    )


def test_a_stop_in_the_ramp_changes_nothing(tmp_path: Path) -> None:
    prefix = write_data(tmp_path / "text")
    ramp = {"start": 2, "increment": 2, "samples": 12}  # steps of 2, 2, 2, 4, 4, then 6
    train = {
        "steps": 8, "sequence_length": 16, "global_batch": 6, "micro_batch": 2, "eval_batches": 2, "eval_every": 4,
        "threads": 1, "batch_ramp": ramp,
    }  # fmt: skip
    base = write_config(tmp_path, prefix, train={**train, "out": str(tmp_path / "through")}, model={"dropout": 0.1})
    assert main(["train", "--config", str(base)]) == 0
    sizes = [16 * n for n in (2, 2, 2, 4, 4, 6, 6, 6)]
    record = Record.read(tmp_path / "through")
    assert dict(zip(*record.series("tokens_per_step"), strict=True)) == dict(enumerate(sizes, 1))
    assert record.series("tokens")[1][-1] == sum(sizes)
    parts = [f"train.out={tmp_path / 'parts'}"]
    asked: list[int] = []
    rows = step.own_rows

    def watched(run: Any, data: Any, first: int, sequences: int) -> Any:
        asked.append(sequences)
        return rows(run, data, first, sequences)

    for stop in (1, 2):
        again = ["train", "--config", str(base), *parts, f"train.stop_after={stop}"]
        assert main(again) == EXIT_STOPPED
    with mock.patch.object(step, "own_rows", watched):
        assert main(["train", "--config", str(base), *parts]) == 0
    assert asked == [4, 6, 6, 4, 6, 6, 6, 6, 6], (
        "five steps that were left; behind the first and the last whole batches"
    )
    assert losses(tmp_path / "through") == losses(tmp_path / "parts")
    one, other = (io.latest(tmp_path / name / "checkpoints") for name in ("through", "parts"))
    assert one is not None and other is not None
    a, b = (io.read_full(path, list(io.available(path))) for path in (one, other))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert io.read_meta(other)["consumed_samples"] == sum(sizes) // 16


def test_speed_counts_the_samples_of_the_steps(tmp_path: Path) -> None:
    data = tiny.write_data(tmp_path / "data")
    run = build(make_plan(steps_of(tiny.config(data, tmp_path, steps=6, dp=1)), 1), torch.device("cpu"))
    with mock.patch.object(loop, "peak_flops", lambda *_: 1e12):
        pace = loop.Pace(run)
    with mock.patch.object(loop.time, "perf_counter", lambda: 100.0):
        pace.restart()
    results = [train_step(run) for _ in range(4)]
    for result in results:
        pace.add(result)
    with mock.patch.object(loop.time, "perf_counter", lambda: 102.0):
        values = pace.values(results[-1])
    assert values["tokens_per_second"] == sum(SIZES[:4]) * 8 / 2.0 and values["tokens_per_step"] == 12 * 8
    assert values["mfu"] == pytest.approx(values["tokens_per_second"] * pace.flops / 1e12)


def test_another_optimizer_does_not_continue(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path, write_data(tmp_path / "text"))
    assert main(["train", "--config", str(config), "optim.name=muon", "train.stop_after=1"]) == EXIT_STOPPED
    assert main(["train", "--config", str(config)]) == 2
    assert "optim.name is adamw" in capsys.readouterr().err
    assert main(["train", "--config", str(config), "optim.name=muon"]) == 0
