"""The whole training loop in stages: the losses, evaluations and probes of one rank; resumed on its layout and on others."""

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from megnorm.checkpoint import io
from megnorm.config import RunConfig
from megnorm.data.config import DataConfig
from megnorm.metrics.config import MetricsConfig, Probe
from megnorm.parallel.launch import World
from megnorm.plan import make_plan
from megnorm.train import state
from megnorm.train.build import build
from megnorm.train.config import WatchdogConfig
from megnorm.train.main import _fit
from megnorm.train.signals import EXIT_STOPPED
from tests.distributed import tiny
from tests.marks import thinned

STEPS = 6
LAYOUTS: dict[str, dict[str, Any]] = {
    "serial": {},
    "pp2": {"pp": 2},
    "pp2 gpipe": {"pp": 2, "schedule": "gpipe"},
    "pp2 interleaved": {"pp": 2, "schedule": "interleaved", "virtual_stages": 2},
    "tp2 pp2": {"tp": 2, "pp": 2},
    "pp2 dp2": {"pp": 2, "dp": 2},
    "pp2 dp2 plain": {"pp": 2, "dp": 2, "zero": 0},
    "pp2 dp2 interleaved": {"pp": 2, "dp": 2, "schedule": "interleaved", "virtual_stages": 2},
    "pp4 uneven": {"pp": 4, "stage_layers": (1, 2, 1, 1)},
}
FAST = ("pp2 dp2 interleaved",)
Lines = dict[int, dict[str, float]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.write_data(tmp_path_factory.mktemp("data") / "text")


def config_of(data: str, out: Path, layout: str, *, steps: int = STEPS, **train: Any) -> RunConfig:
    """Five layers with everything that stages share or send; evaluated and probed every other step."""
    sizes = LAYOUTS[layout]
    base = tiny.config(data, out, "hybridnorm", steps=steps, **{"model": "gpt2", "precision": "fp64", **sizes})
    return replace(
        base,
        model=replace(base.model, layers=5),
        data=DataConfig(path=data, split=(0.8, 0.2, 0.0), mask_end=True, eod=tiny.END),
        train=replace(
            base.train, eval_every=2, eval_batches=2, log_every=1, watchdog=WatchdogConfig(timeout=0.0), **train
        ),
        metrics=MetricsConfig(tensorboard=False, progress=False, probe_every=2, probes=get_args(Probe)),
    )


def train(rank: int, world: int, config: RunConfig) -> int:
    """Start a run or continue it, as the command does; its exit code."""
    folder = Path(config.train.out) / "checkpoints"
    goes_on = folder.is_dir()  # before the ranks meet: the first to be done makes the folder
    run = build(make_plan(config, world), torch.device("cpu"))
    if goes_on:
        state.resume(run, folder)
    return _fit(run, World(rank, world))


def start(ranks: Any, config: RunConfig) -> int:
    sizes = config.parallel
    world = sizes.tp * sizes.pp * (sizes.dp or 1)
    codes = [train(0, 1, config)] if world == 1 else ranks(world).run(train, config)
    assert len(set(codes)) == 1
    return int(codes[0])


def lines(out: Path) -> Lines:
    """What was logged, by step; without times."""
    found = map(json.loads, (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    quiet = {"step", "time", "tokens_per_second", "mfu"}
    return {line["step"]: {k: v for k, v in line.items() if k not in quiet} for line in found}


@pytest.fixture(scope="module")
def record(ranks: Any, data: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """record(layout): the run of that layout, once; its folder."""

    @functools.cache
    def of(layout: str) -> Path:
        out = tmp_path_factory.mktemp(layout.replace(" ", "-"))
        assert start(ranks, config_of(data, out, layout)) == 0
        return out

    return of


def assert_same(found: Lines, wanted: Lines, rel: float) -> None:
    assert found.keys() == wanted.keys()
    for step in wanted:
        assert found[step].keys() == wanted[step].keys()
        for name, value in wanted[step].items():
            # a gradient that is zero but for rounding (k's bias: softmax does not see it) has no relative precision
            assert found[step][name] == pytest.approx(value, rel=rel, abs=1e-12), f"step {step}: {name}"


@pytest.mark.parametrize("layout", thinned((name for name in LAYOUTS if name != "serial"), FAST.__contains__))
def test_losses_evaluations_and_probes_are_those_of_one_rank(record: Any, layout: str) -> None:
    serial = lines(record("serial"))
    assert list(serial) == list(range(1, STEPS + 1))
    names = serial[2]
    assert "valid_loss" in names and "grad_norm" in names
    assert {f"{probe}/{at}" for probe, at in PROBED} <= names.keys()
    assert_same(lines(record(layout)), serial, 1e-9)


PROBED = (
    ("grad_norm", "embed.token.weight"), ("weight_norm", "blocks.3.attention.q.weight"), ("update_norm", "role.q"),
    ("update_ratio", "layer.4"), ("norm_gain", "final_norm.weight"), ("stream_rms", "blocks.4.ffn"),
    ("stream_rms", "embed"), ("branch_rms", "blocks.0.attention"), ("norm_rms", "blocks.2.attention.q_norm.input"),
)  # fmt: skip


@pytest.mark.parametrize("layout", thinned(("pp2", "pp2 dp2 interleaved", "pp2 dp2 plain"), FAST.__contains__))
def test_resume_on_the_same_layout_is_bitwise(ranks: Any, data: str, tmp_path: Path, layout: str) -> None:
    """In bf16 with dropout: masters, moments and random streams of every stage continue."""
    outs = [tmp_path / "whole", tmp_path / "parts"]
    for out in outs:
        config = config_of(data, out, layout)
        config = replace(
            config,
            model=replace(config.model, dropout=0.1, attention_dropout=0.1),
            train=replace(config.train, precision="bf16"),
        )
        if out.name == "parts":
            stopped = replace(config, train=replace(config.train, stop_after=3))
            assert start(ranks, stopped) == EXIT_STOPPED
        assert start(ranks, config) == 0
    whole, parts = map(lines, outs)
    assert whole == parts
    a, b = (io.latest(out / "checkpoints") for out in outs)
    assert a is not None and b is not None
    one, other = (io.read_full(path, list(io.available(path))) for path in (a, b))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.full
def test_a_run_may_change_its_layout_at_every_stop(ranks: Any, data: str, tmp_path: Path) -> None:
    order = [
        "serial",
        "pp2 dp2",
        "tp2 pp2",
        "pp2 interleaved",
        "pp2 dp2 plain",
        "pp4 uneven",
        "pp2 dp2 interleaved",
        "serial",
    ]
    steps = len(order)
    whole = tmp_path / "whole"
    assert start(ranks, config_of(data, whole, "serial", steps=steps)) == 0
    moving = tmp_path / "moving"
    for i, layout in enumerate(order):
        code = start(ranks, config_of(data, moving, layout, steps=steps, stop_after=1))
        assert code == (0 if i == steps - 1 else EXIT_STOPPED)
    assert_same(lines(moving), lines(whole), 1e-10)
