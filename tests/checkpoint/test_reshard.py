"""Any layout goes on from any other's checkpoint: the next losses are the same number, of the same samples.

A layout is a line of LAYOUTS; one that the plan refuses is left out, by its own word.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megnorm import config as configs
from megnorm.checkpoint import io
from megnorm.config import RunConfig
from megnorm.plan import make_plan
from megnorm.refuse import PlanError
from megnorm.train import state
from megnorm.train.build import Run, build
from megnorm.train.step import train_step
from tests.distributed import tiny
from tests.distributed.pool import Pool

SCHEMES = ("preln", "deepnorm", "normformer", "hybridnorm_star")
TOLERANCE = 1e-10  # relative; float64, whose sums the layouts only order differently
BEFORE = 2  # steps in the layout that saves
# name -> (ranks, settings of section parallel). Two kv heads: tp=4 holds each of them twice. ZeRO-1 is the default;
# "odd": buckets so small that a rank's part of a matrix begins and ends within rows, many times.
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one": (1, ()),
    "tp2": (2, ("tp=2",)),
    "tp2-plain": (2, ("tp=2", "sequence_parallel=false")),
    "tp4": (4, ("tp=4",)),
    "tp4-kept": (4, ("tp=4", "keep_gathered=true")),
    "dp2": (2, ("dp=2",)),
    "dp2-replicated": (2, ("dp=2", "zero=0")),
    "dp4-odd": (4, ("dp=4", "bucket_mb=0.003")),
    "tp2-dp2": (4, ("tp=2", "dp=2")),
    "tp2-dp2-odd": (4, ("tp=2", "dp=2", "bucket_mb=0.003", "sequence_parallel=false")),
    "pp2": (2, ("pp=2",)),
    "pp2-interleaved": (2, ("pp=2", "schedule=interleaved", "virtual_stages=2")),
    "pp4": (4, ("pp=4", "schedule=gpipe")),
    "tp2-pp2": (4, ("tp=2", "pp=2")),
    "pp2-dp2": (4, ("pp=2", "dp=2")),
    "pp2-dp2-replicated": (4, ("pp=2", "dp=2", "zero=0")),
    "tp2-pp2-dp2": (8, ("tp=2", "pp=2", "dp=2")),
}

Curve = tuple[list[float], list[list[int]]]  # losses; sample ids of each step


def config(folder: Path, scheme: str, layout: str) -> RunConfig:
    """Four layers, so that four stages have one each."""
    base = tiny.config(str(folder / "data"), folder / "run", scheme, steps=40, kv=2, precision="fp64")
    return configs.load(tiny.write_config(folder / "run.yaml", base), overrides(layout))


def overrides(layout: str) -> list[str]:
    """One micro-batch a step, where no pipeline asks for more."""
    _, settings = LAYOUTS[layout]
    size = 2 if any(one.startswith("pp=") for one in settings) else 8 // (4 if "dp=4" in settings else 2)
    return ["model.layers=4", f"train.micro_batch={size}", *(f"parallel.{one}" for one in settings)]


def refusal(layout: str) -> str | None:
    """Why the plan does not take a layout; None if it does."""
    try:
        make_plan(configs.load(None, ["train.global_batch=8", *overrides(layout)]), LAYOUTS[layout][0])
    except PlanError as error:
        return str(error)
    return None


TAKEN = [layout for layout in LAYOUTS if refusal(layout) is None]


def write(rank: int, world: int, config: RunConfig, start: Path | None, out: Path, steps: int) -> Curve:
    """Go on from ``start`` (None: from the beginning) for BEFORE steps, save, and go on for ``steps`` more."""
    run = build(make_plan(config, world), torch.device("cpu"))
    if start is not None:
        state.resume(run, start)
    for _ in range(BEFORE):
        train_step(run)
    barrier = dist.barrier if world > 1 else io.alone
    io.save(out, run.step, state.shards(run, owned=True), state.meta(run), rank=rank, world=world, barrier=barrier)
    return curve(run, steps)


def read(rank: int, world: int, config: RunConfig, sources: Sequence[Path], steps: int) -> list[Curve]:
    """Go on from each of the checkpoints in turn, with nothing left of the one before."""
    run, curves = build(make_plan(config, world), torch.device("cpu")), []
    for source in sources:
        for shard in state.shards(run, owned=False):
            shard.tensor.fill_(math.nan)
        state.resume(run, source)
        curves.append(curve(run, steps))
    return curves


def curve(run: Run, steps: int) -> Curve:
    order: Any = run.train_data.order  # type: ignore[attr-defined]
    drawn: list[int] = []
    rows, ids = order.rows, []

    def watch(wanted: Any) -> Any:
        drawn.extend(wanted.tolist())
        return rows(wanted)

    order.rows = watch
    losses = []
    for _ in range(steps):
        losses.append(train_step(run).loss)
        ids.append(sorted(drawn))
        drawn.clear()
    order.rows = rows
    return losses, ids


def merged(curves: Sequence[Curve]) -> Curve:
    """One curve of all ranks': they agree on the loss, and share the samples."""
    losses = curves[0][0]
    assert all(found == losses for found, _ in curves)
    return losses, [sorted({i for _, ids in curves for i in ids[step]}) for step in range(len(losses))]


Pairs = Mapping[str, Sequence[str]]  # layout -> those whose checkpoints it goes on from


def check(ranks: Callable[[int], Pool], folder: Path, scheme: str, pairs: Pairs, steps: int) -> None:
    """Save in every layout, go on in every layout."""
    tiny.write_data(folder / "data")
    alone = config(folder, scheme, "one")
    ranks(1).run(write, alone, None, folder / "start", 0)
    truth = merged(ranks(1).run(write, alone, folder / "start", folder / "truth", steps))
    assert len({i for ids in truth[1] for i in ids}) == 8 * steps, "every step has its own samples"
    for layout in sorted({source for sources in pairs.values() for source in sources}):
        ranks(LAYOUTS[layout][0]).run(write, config(folder, scheme, layout), folder / "start", folder / layout, 0)
    for layout, sources in pairs.items():
        paths = [folder / source for source in sources]
        answers = ranks(LAYOUTS[layout][0]).run(read, config(folder, scheme, layout), paths, steps)
        for i, source in enumerate(sources):
            losses, ids = merged([answer[i] for answer in answers])
            assert losses == pytest.approx(truth[0], rel=TOLERANCE), f"{layout} from {source}"
            assert ids == truth[1], f"{layout} from {source}: other samples"


@pytest.mark.full
@pytest.mark.parametrize("number", range(len(SCHEMES)), ids=SCHEMES)
def test_layouts_go_on_from_each_other(ranks: Callable[[int], Pool], tmp_path: Path, number: int) -> None:
    """Every layout saves once and goes on once for ten steps, in a ring of those that fall to a scheme."""
    layouts = TAKEN[number :: len(SCHEMES)]
    pairs = {layout: [source] for layout, source in zip(layouts, layouts[1:] + layouts[:1], strict=True)}
    check(ranks, tmp_path, SCHEMES[number], pairs, 10)


@pytest.mark.full
@pytest.mark.parametrize("number", range(len(SCHEMES)), ids=SCHEMES)
def test_every_layout_goes_on_from_every_other(ranks: Callable[[int], Pool], tmp_path: Path, number: int) -> None:
    """All pairs, dealt to the schemes; in the exhaustive set every scheme has all pairs."""
    pairs = {
        layout: [source for j, source in enumerate(TAKEN) if (i + j) % len(SCHEMES) == number]
        for i, layout in enumerate(TAKEN)
    }
    check(ranks, tmp_path, SCHEMES[number], pairs, 10)


@pytest.mark.exhaustive
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_pair_of_layouts_in_every_scheme(ranks: Callable[[int], Pool], tmp_path: Path, scheme: str) -> None:
    check(ranks, tmp_path, scheme, dict.fromkeys(TAKEN, TAKEN), 10)


def test_there_are_enough_layouts() -> None:
    assert len(TAKEN) >= 12, {layout: refusal(layout) for layout in LAYOUTS}
