"""Idle time of the pipeline executor against the simulator's: real ranks and messages, stages that only sleep.

    python tools/bench/pipeline.py [--ranks 2 4 8] [--micro-batches 4 8 16 32] [--seconds 0.02] [--repeats 5]

Idle is what all ranks together do not sleep between the first action's begin and the last one's end, in ms: measured (median
of the repetitions), and simulated with actions of that many seconds.

bare: the simulator's, where turns and messages take no time, and the measured one's ratio to it.
told: the simulator's, where they take what they took in that run, and the measured one's ratio to that (the median of the
runs, the least and the most). turn us: until a rank begins its next action, when its input is there. hand us: from the end of
an action until another rank, which waits for its output, begins. Their medians are shown; the simulator draws each turn and
each hand by chance from all those of the run (the median of 9 times), because where ranks wait for each other the slower of two
counts, which means do not tell. held: the most activations of a rank, counted and simulated.
"""

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from megnorm.parallel.collectives import gather_objects
from megnorm.parallel.mesh import Mesh, build_mesh
from megnorm.parallel.pipeline import Pipeline
from megnorm.parallel.schedule import NAMES, Action, Schedule, Timeline, make_schedule, simulate

CPU = torch.device("cpu")
SIZE = 8  # elements of the first micro-batch's messages; each of the next has one more


@dataclass
class Ledger:
    """What a rank did: actions with begin and end in seconds, and how many activations it held at most."""

    spans: list[tuple[Action, float, float]] = field(default_factory=list)
    live: int = 0
    peak: int = 0

    def work(self, action: Action, seconds: float) -> None:
        begin = time.monotonic()
        time.sleep(seconds)
        self.spans.append((action, begin, time.monotonic()))


class Held:
    """A tensor that autograd keeps for backward, counted as long as it is kept."""

    def __init__(self, ledger: Ledger, tensor: Tensor) -> None:
        self.ledger, self.tensor = ledger, tensor
        ledger.live += 1
        ledger.peak = max(ledger.peak, ledger.live)

    def __del__(self) -> None:
        self.ledger.live -= 1


@dataclass(frozen=True)
class Part:
    """A micro-batch: its number, and what the first stage reads."""

    index: int
    x: Tensor


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stage: "Sleeper", part: Part) -> Tensor:
        ctx.stage, ctx.part, ctx.factor = stage, part, float(weight)
        ctx.save_for_backward(x)
        stage.ledger.work(Action("F", stage.index, part.index), stage.seconds)
        return x * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (x,) = ctx.saved_tensors
        ctx.stage.ledger.work(Action("B", ctx.stage.index, ctx.part.index), ctx.stage.seconds)
        return grad * ctx.factor, (grad * x).sum(), None, None


class Sleeper(nn.Module):
    """Stage ``index`` of ``count``: multiplies by index + 2, and sleeps in both directions. The last one sums."""

    def __init__(self, index: int, count: int, seconds: float, ledger: Ledger) -> None:
        super().__init__()
        self.index, self.count, self.seconds, self.ledger = index, count, seconds, ledger
        self.weight = nn.Parameter(torch.tensor(index + 2.0, dtype=torch.float64))

    def edge(self, batch: Part, *, into: bool) -> tuple[tuple[int, ...], torch.dtype]:
        return tuple(batch.x.shape), batch.x.dtype

    def forward(self, batch: Part, carry: Tensor | None) -> Tensor:
        with saved_tensors_hooks(lambda tensor: Held(self.ledger, tensor), lambda held: held.tensor):
            y: Tensor = _Scale.apply(batch.x if carry is None else carry, self.weight, self, batch)
        return y.sum() if self.index == self.count - 1 else y


def parts(count: int) -> list[Part]:
    return [Part(i, torch.full((SIZE + i,), i + 1.0, dtype=torch.float64)) for i in range(count)]


def sleepers(schedule: Schedule, mesh: Mesh, seconds: float) -> tuple[Pipeline, Ledger]:
    """This rank's pipeline of stages that sleep."""
    ledger = Ledger()
    held = schedule.stages_of(mesh.pp.rank)
    return Pipeline({index: Sleeper(index, schedule.stages, seconds, ledger) for index in held}, mesh), ledger


@dataclass(frozen=True)
class Run:
    """One run, over all ranks. idle: seconds of all ranks together. peak: most activations that one of them held.

    turns: seconds between two actions of a rank, where the second one's input was there. hands: from the end of an action to
    the begin of the one on another rank that was waiting for it.
    """

    idle: float
    peak: int
    turns: tuple[float, ...]
    hands: tuple[float, ...]

    @staticmethod
    def of(schedule: Schedule, ledgers: Sequence[Ledger], seconds: float) -> "Run":
        begin = {action: start for one in ledgers for action, start, _ in one.spans}
        end = {action: stop for one in ledgers for action, _, stop in one.spans}
        turns, hands = [], []
        for row in schedule.actions:
            for before, action in pairwise(row):
                source = schedule.source(action)
                ready = end[source] if source is not None else 0.0
                if ready > end[before]:
                    hands.append(begin[action] - ready)
                elif ready < end[before] - seconds / 4:
                    turns.append(begin[action] - end[before])
        idle = schedule.ranks * (max(end.values()) - min(begin.values())) - sum(end[a] - begin[a] for a in begin)
        return Run(idle, max(one.peak for one in ledgers), tuple(turns), tuple(hands))


def measure(mesh: Mesh, schedule: Schedule, seconds: float) -> Run:
    pipeline, ledger = sleepers(schedule, mesh, seconds)
    dist.barrier(mesh.pp.group)
    pipeline.run(schedule, parts(schedule.micro_batches))
    return Run.of(schedule, gather_objects(ledger, mesh.pp), seconds)


def _rank(rank: int, world: int, store: str, counts: Sequence[int], seconds: float, repeats: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    mesh = build_mesh(tp=1, pp=world, dp=1, kv_heads=1, device=CPU)
    measure(mesh, make_schedule("interleaved", world, 2, world), seconds)  # all connections, and what is lazy
    for name in NAMES:
        for count in counts:
            if name == "interleaved" and count % world:
                continue  # it takes micro-batches in groups of its ranks
            schedule = make_schedule(name, world, 2 if name == "interleaved" else 1, count)
            runs = [measure(mesh, schedule, seconds) for _ in range(repeats)]
            if rank == 0:
                print(line(schedule, runs, seconds), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def idle_of(timeline: Timeline, seconds: float) -> float:
    """What all ranks together do not sleep."""
    schedule = timeline.schedule
    return schedule.ranks * timeline.end - seconds * sum(map(len, schedule.actions))


def told(schedule: Schedule, run: Run, seconds: float) -> float:
    """The simulated idle time with turns and hands drawn from those of the run."""
    chance, found = random.Random(0), []
    for _ in range(9):
        timeline = simulate(
            schedule,
            forward=seconds,
            backward=seconds,
            turn=lambda _: chance.choice(run.turns),
            send=lambda _: chance.choice(run.hands),
        )
        found.append(idle_of(timeline, seconds))
    return statistics.median(found)


def line(schedule: Schedule, runs: Sequence[Run], seconds: float) -> str:
    """A row of the table."""
    timeline = simulate(schedule, forward=seconds, backward=seconds)
    bare, middle = idle_of(timeline, seconds), statistics.median(run.idle for run in runs)
    expected = [told(schedule, run, seconds) for run in runs]
    ratios = sorted(run.idle / one for run, one in zip(runs, expected, strict=True))
    turn = statistics.median([one for run in runs for one in run.turns])
    hand = statistics.median([one for run in runs for one in run.hands])
    return (
        f"{schedule.name:<14}{schedule.ranks:>5}{schedule.micro_batches:>7}{1e3 * middle:>10.1f}{1e3 * bare:>8.0f}"
        f"{middle / bare:>8.3f}{1e3 * statistics.median(expected):>10.1f}{statistics.median(ratios):>8.3f}{ratios[0]:>8.3f}"
        f"{ratios[-1]:>8.3f}{1e6 * turn:>9.0f}{1e6 * hand:>9.0f}"
        f"{max(run.peak for run in runs):>7}{max(timeline.peak):>4}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--seconds", type=float, default=0.02, help="of every action")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    print(
        f"{'schedule':<14}{'ranks':>5}{'parts':>7}{'measured':>10}{'bare':>8}{'ratio':>8}{'told':>10}{'ratio':>8}{'least':>8}"
        f"{'most':>8}{'turn us':>9}{'hand us':>9}{'held':>11}"
    )
    for world in args.ranks:
        with tempfile.TemporaryDirectory() as folder:
            store = os.path.join(folder, "store")
            mp.spawn(_rank, (world, store, args.micro_batches, args.seconds, args.repeats), nprocs=world)
    return 0


if __name__ == "__main__":
    sys.exit(main())
