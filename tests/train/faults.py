"""Faults put into training on purpose, and runs of one or two ranks that meet them."""

import contextlib
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from megnorm.checkpoint.saver import Saver
from megnorm.config import RunConfig
from megnorm.layers.ffn import FeedForward
from megnorm.metrics.sinks import Sinks
from megnorm.plan import make_plan
from megnorm.train import loop
from megnorm.train.build import Run, build
from megnorm.train.config import TrainConfig
from megnorm.train.guard import DivergedError
from megnorm.train.profile import Profile
from megnorm.train.watchdog import Watchdog
from tests.distributed import launching

PROJECT = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True)
class Fault:
    """The down projection of a layer gives ``factor`` times its output (nan: not finite) on one rank, in these steps.

    at: "down"; "body": behind the projection, outside of any module; "weight": one of its weights; "head": the logits.
    passing: only the first time that such a step is made. backward: its gradient, not its output. micro_batch: only in this
    one; None: in all.
    """

    steps: tuple[int, ...]
    rank: int = 0
    layer: int = 1
    at: str = "down"
    factor: float = float("nan")
    passing: bool = False
    backward: bool = False
    micro_batch: int | None = None


@contextlib.contextmanager
def hurt(run: Run, fault: Fault | None) -> Iterator[None]:
    """Put the fault into a run that was built."""
    if fault is None or run.mesh.rank != fault.rank:
        yield
        return
    modules = {path: module for stage in run.stages.values() for path, module in stage.named_modules()}
    ffn = modules[f"blocks.{fault.layer}.ffn"]
    assert isinstance(ffn, FeedForward)
    places = {"body": (ffn, "body"), "head": (modules["head"], "forward")}
    target, name = places.get(fault.at, (ffn.down, "forward"))
    right, train_step, per_step = getattr(target, name), loop.train_step, run.plan.micro_batches
    begun: set[int] = set()
    state = SimpleNamespace(passes=0, again=False)

    def broken(*args: Any) -> Tensor:
        step, place = run.step + 1, state.passes
        if step not in fault.steps or not torch.is_grad_enabled():
            return right(*args)
        state.passes += 1
        if fault.at == "weight":
            ffn.down.weight.data[0, 0] = fault.factor
            return right(*args)
        passed = fault.passing and (state.again or place >= per_step)  # the passes of a step may be made again
        spared = fault.micro_batch is not None and place % per_step != fault.micro_batch
        y = right(*args)
        if passed or spared:
            return y
        return _Backward.apply(y, fault.factor) if fault.backward else y * fault.factor

    def counted(run: Run) -> Any:
        state.passes, state.again = 0, run.step + 1 in begun
        begun.add(run.step + 1)
        return train_step(run)

    with mock.patch.object(target, name, broken), mock.patch.object(loop, "train_step", counted):
        yield


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


@dataclass(frozen=True)
class Told:
    """What a rank can tell of its run. curve: losses by step; ended: the exit code or the message of the error."""

    ended: int | str
    step: int
    consumed: int
    updates: int
    curve: dict[int, float]
    skipped: list[int]
    log: str
    weights: dict[str, Tensor]


def train(rank: int, world: int, config: RunConfig, fault: Fault | None = None) -> Told:
    """Train through the real loop in a rank of the pool; without signals and watchdog, which belong to a process."""
    run, results, folder = build(make_plan(config, world), torch.device("cpu")), list[Any](), Path(config.train.out)
    lines, step = Lines(), loop.train_step

    def noted(run: Run) -> Any:
        result = step(run)
        results.append((run.step, result))
        return result

    watchdog = Watchdog(
        replace(config.train.watchdog, timeout=0.0), rank=rank, people=[], store=None, keeper=None, patience=1.0,
        folder=folder,
    )  # fmt: skip
    saver = Saver(config.checkpoint, folder / "checkpoints", rank=rank, world=world, barrier=run.barrier)
    with (
        lines.listening(),
        mock.patch.object(loop, "StopRequest", lambda: SimpleNamespace(asked=False)),
        mock.patch.object(loop, "train_step", noted),
        hurt(run, fault),
        Sinks(config.metrics, folder, config.train.steps, rank=rank) as sinks,
    ):
        try:
            ended: int | str = loop.fit(run, saver, sinks, watchdog, Profile(config.train, rank))
        except DivergedError as error:
            ended = str(error)
    return Told(
        ended, run.step, run.consumed, run.updates,
        {number: result.loss for number, result in results}, [number for number, result in results if result.skipped],
        "\n".join(lines.said), {n.name: n.view().clone() for n in run.named},
    )  # fmt: skip


class Lines(logging.Handler):
    """What megnorm logs."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        log = logging.getLogger("megnorm")
        before = log.level
        log.addHandler(self)
        log.setLevel(logging.INFO)
        yield
        log.removeHandler(self)
        log.setLevel(before)


def with_train(config: RunConfig, **changes: Any) -> RunConfig:
    """The config with other options of training; those of train.guard, train.watchdog and train.profile are named as
    guard_..., watchdog_... and profile_...."""
    t: TrainConfig = config.train
    for name, value in changes.items():
        section, _, key = name.partition("_")
        if section in ("guard", "watchdog", "profile"):
            t = replace(t, **{section: replace(getattr(t, section), **{key: value})})
        else:
            t = replace(t, **{name: value})
    return replace(config, train=t)


def start(config: Path, overrides: Sequence[str] = (), *, world: int = 2) -> list[subprocess.Popen[str]]:
    """Ranks as processes of their own, without a launcher, so that each one's exit code is seen."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(launching.OURS)}
    common = {**clean, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(launching.free_port()), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "megnorm.train", "--config", str(config), *overrides],
            env={**common, "RANK": str(rank), "WORLD_SIZE": str(world), "PYTHONPATH": str(PROJECT)},
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip


@contextlib.contextmanager
def ended_at_last(jobs: list[subprocess.Popen[str]]) -> Iterator[None]:
    """Whatever a test finds, its processes end."""
    try:
        yield
    finally:
        for job in jobs:
            job.kill()
            job.wait()


Ranks = Callable[[int], Any]
