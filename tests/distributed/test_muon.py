"""Muon under every layout is Muon on one rank: logical matrices are orthogonalized whole, each once, wherever they lie."""

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from megnorm.checkpoint.saver import Saver
from megnorm.config import RunConfig
from megnorm.optim import muon
from megnorm.optim.config import MuonConfig
from megnorm.optim.muon import Muon, Part, Route
from megnorm.parallel import data_parallel
from megnorm.parallel.layout import Matrix, Named, full_tensor, named_matrices
from megnorm.parallel.mesh import Axis
from megnorm.plan import make_plan
from megnorm.train import state
from megnorm.train.build import Run, build
from megnorm.train.step import train_step
from tests.distributed import tiny
from tests.marks import thinned

STEPS = 5
MATRICES = tuple(f".{role}.weight" for role in muon.ROLES)
TINY = 1e-3  # MB: a bucket is a few rows, and its ranges begin and end inside rows
SERIAL: dict[str, dict[str, Tensor]] = {}  # one serial run serves all layouts


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One path for all, because the order of samples depends on it."""
    return tiny.write_data(tmp_path_factory.mktemp("muon") / "data")


def config(data: str, out: Path | None = None, *, precision: str = "fp64", kv: int = 2, **parallel: Any) -> RunConfig:
    base = tiny.config(data, out or Path("unused"), "preln", steps=STEPS, precision=precision, kv=kv, **parallel)
    return replace(base, optim=replace(base.optim, name="muon"))


def whole(run: Run) -> dict[str, Tensor]:
    """Every logical tensor of this rank's stages."""
    run.flat.wait_weights()
    held = named_matrices(*run.pipeline.stages.values())  # type: ignore[arg-type]
    return {n.name: full_tensor(n, n.param.detach(), run.mesh) for n in held}


def train(rank: int, world: int, config: RunConfig, change: str | None = None) -> dict[str, Tensor]:
    """The weights after STEPS steps, under a change of the code."""
    with CHANGES[change]() if change else nullcontext():
        run = build(make_plan(config, world), torch.device("cpu"))
        for _ in range(STEPS):
            train_step(run)
        return whole(run)


def run(ranks: Any, config: RunConfig, function: Callable[..., Any] = train, *args: Any) -> dict[str, Tensor]:
    """The whole model; what several ranks hold must be equal on all of them, bit for bit."""
    p = config.parallel
    found: dict[str, Tensor] = {}
    for answer in ranks(p.tp * p.pp * (p.dp or 1)).run(function, config, *args):
        for name, tensor in answer.items():
            assert torch.equal(found.setdefault(name, tensor), tensor), f"replicas of {name} differ"
    return found


def serial(ranks: Any, data: str, **options: Any) -> dict[str, Tensor]:
    alone = config(data, dp=1, **options)
    if repr(alone) not in SERIAL:
        SERIAL[repr(alone)] = run(ranks, alone)
    return SERIAL[repr(alone)]


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert set(a) == set(b)
    return max(float((a[name] - b[name]).norm() / a[name].norm().clamp_min(1e-3)) for name in a)


def _fused() -> AbstractContextManager[Any]:
    """The optimizer sees q, k and v as the one matrix in which they are stored."""

    def broken(*models: Any) -> Any:
        for n in named_matrices(*models):
            if n.name.endswith("attention.q.weight"):
                shape = tuple(n.param.shape)
                yield Named(n.name, Matrix("q", "q", shape, (0, 0), shape), n.param)
            elif not n.name.endswith(("attention.k.weight", "attention.v.weight")):
                yield n

    return mock.patch.object(data_parallel, "named_matrices", broken)


def _slices() -> AbstractContextManager[Any]:
    """Every rank orthogonalizes the slice that it holds."""
    of, stack = Part.of, ExitStack()
    stack.enter_context(mock.patch.object(muon, "stage_axis", lambda mesh: Axis("stage")))
    local = staticmethod(lambda piece: replace(of(piece), shape=of(piece).local, offset=(0, 0), owner=True))
    stack.enter_context(mock.patch.object(Part, "of", local))
    return stack


def _scale_of_slices() -> AbstractContextManager[Any]:
    """The size of an update follows the shape of a slice."""
    right = Muon._apply

    def broken(self: Muon, route: Route, message: Any, lr: float) -> None:
        sliced = [replace(part, shape=part.local) for part in route.back.parts]
        right(self, replace(route, back=replace(route.back, parts=sliced)), message, lr)

    return mock.patch.object(Muon, "_apply", broken)


def _many_rounds() -> AbstractContextManager[Any]:
    """No mistake: few matrices at a time."""
    return mock.patch.object(Muon, "__init__", partialmethod(Muon.__init__, limit=1000))


CHANGES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "fused q, k and v": _fused,
    "slices orthogonalized": _slices,
    "scale of slices": _scale_of_slices,
    "many rounds": _many_rounds,
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp 2": {"tp": 2},
    "tp 2, one kv head": {"tp": 2, "kv": 1},
    "dp 2": {"dp": 2, "zero": 0},
    "dp 2, sharded": {"dp": 2, "zero": 1},
    "dp 4, sharded, tiny buckets": {"dp": 4, "zero": 1, "bucket_mb": TINY},
    "pp 2": {"pp": 2},
}
LARGE: dict[str, dict[str, Any]] = {
    f"tp 2, pp 2, dp 2, zero {zero}, {kv} kv heads": {
        "tp": 2, "pp": 2, "dp": 2, "zero": zero, "kv": kv, "bucket_mb": TINY,
    }
    for zero, kv in ((0, 2), (1, 2), (1, 1))
}  # fmt: skip


FAST = ("tp 2", "dp 2, sharded", "pp 2")


@pytest.mark.parametrize("layout", thinned([*LAYOUTS, *LARGE], FAST.__contains__))
def test_a_layout_changes_nothing(ranks: Any, data: str, layout: str) -> None:
    case = {**LAYOUTS, **LARGE}[layout]
    alone = serial(ranks, data, kv=case.get("kv", 2))
    assert difference(alone, run(ranks, config(data, **{"dp": 1, **case}))) <= 1e-10


@pytest.mark.full
def test_rounds_change_nothing(ranks: Any, data: str) -> None:
    case = config(data, tp=2, dp=2, bucket_mb=TINY)
    assert difference(serial(ranks, data), run(ranks, case, train, "many rounds")) <= 1e-10


@pytest.mark.parametrize(
    ("change", "layout"),
    thinned([("fused q, k and v", "dp 2, sharded"), ("slices orthogonalized", "tp 2"), ("scale of slices", "tp 2")], 3),
)
def test_mistakes_are_seen(ranks: Any, data: str, change: str, layout: str) -> None:
    case = config(data, **{"dp": 1, **LAYOUTS[layout]})
    answers = ranks(2).run(train, case, change)
    alone = serial(ranks, data)
    assert difference({name: alone[name] for name in answers[0]}, answers[0]) > 1e-4


def shares(rank: int, world: int, config: RunConfig) -> tuple[list[str], int, int]:
    """(matrices that this rank computes, rounds, messages of a step)."""
    started = []
    start = muon.start_all_to_all

    def counted(*args: Any) -> Any:
        started.append(args)
        return start(*args)

    run = build(make_plan(config, world), torch.device("cpu"))
    with mock.patch.object(muon, "start_all_to_all", counted):
        train_step(run)
    assert run.optimizer.muon is not None
    routes = run.optimizer.muon.routes
    return [name for route in routes for name in route.shapes], len(routes), len(started)


@pytest.mark.parametrize(
    "layout",
    (
        {"tp": 2, "dp": 2, "zero": 1},
        pytest.param({"tp": 2, "dp": 2, "zero": 0}, marks=pytest.mark.full),
        pytest.param({"tp": 4, "dp": 1}, marks=pytest.mark.full),
    ),
)
def test_each_matrix_is_computed_once(ranks: Any, data: str, layout: dict[str, int]) -> None:
    answers = ranks(4).run(shares, config(data, kv=2, **layout))
    names = list(itertools.chain(*(answer[0] for answer in answers)))
    parts = [f"attention.{m}" for m in "qkvo"] + [f"ffn.{m}" for m in ("up", "gate", "down")]
    assert sorted(names) == sorted(f"blocks.{layer}.{part}.weight" for layer in range(2) for part in parts)
    assert all(len(answer[0]) >= 2 for answer in answers), "14 matrices are shared by 4 ranks"
    assert all(answer[1:] == (1, 2) for answer in answers), "one message brings all matrices, one the results"


def saved(rank: int, world: int, config: RunConfig, steps: int) -> dict[str, Tensor]:
    run = build(make_plan(config, world), torch.device("cpu"))
    for _ in range(steps):
        train_step(run)
    folder = Path(config.train.out) / "checkpoints"
    saver = Saver(config.checkpoint, folder, rank=rank, world=world, barrier=run.barrier)
    saver.save(run.step, state.shards(run, owned=True), state.meta(run))
    saver.wait()
    return whole(run)


def resumed(rank: int, world: int, config: RunConfig) -> dict[str, Tensor]:
    run = build(make_plan(config, world), torch.device("cpu"))
    state.resume(run, Path(config.train.out) / "checkpoints")
    while run.step < STEPS:
        train_step(run)
    return whole(run)


@pytest.mark.parametrize(
    "first", (pytest.param({"tp": 2, "kv": 1, "dp": 1}, marks=pytest.mark.full), {"dp": 2, "bucket_mb": TINY})
)
def test_a_checkpoint_goes_on_in_any_layout(ranks: Any, data: str, tmp_path: Path, first: dict[str, Any]) -> None:
    kv = first.get("kv", 2)
    one = config(data, tmp_path, **first)
    through = run(ranks, one)
    run(ranks, one, saved, 2)
    again = run(ranks, one, resumed)
    assert all(torch.equal(through[name], again[name]) for name in through), "the same layout gives the same bits"
    for other in ({"dp": 1}, {"dp": 2, "zero": 0}, {"tp": 2, "dp": 2}):
        assert difference(through, run(ranks, config(data, tmp_path, **{"kv": kv, **other}), resumed)) <= 1e-10


def test_low_precision_keeps_replicas_equal(ranks: Any, data: str, tmp_path: Path) -> None:
    """bf16 weights, messages and iteration; ``run`` compares what several ranks hold."""
    base = config(data, tmp_path, precision="bf16", tp=2, dp=2, kv=1, bucket_mb=TINY)
    before = run(ranks, base, saved, 0)
    after = run(ranks, replace(base, optim=replace(base.optim, muon=MuonConfig(precision="bf16"))))
    assert all(after[name].isfinite().all() for name in after)
    assert all(not torch.equal(before[name], after[name]) for name in after if name.endswith(MATRICES))
