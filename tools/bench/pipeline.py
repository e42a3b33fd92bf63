"""Idle time of the pipeline executor against the simulator's: real ranks and messages, stages that only sleep.

    python tools/bench/pipeline.py [--ranks 2 4 8] [--micro-batches 4 8 16 32] [--seconds 0.02] [--repeats 5]

Idle is what all ranks together do not sleep between the first action's begin and the last one's end. Its first figure is
the simulator's for actions of that many seconds and messages that take no time; the second one is measured (median of the
repetitions), the third their ratio. ``held`` is the most activations that a rank held, counted, and the simulator's.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from megnorm.parallel.mesh import Mesh, build_mesh
from megnorm.parallel.pipeline import Pipeline
from megnorm.parallel.schedule import NAMES, Action, Schedule, make_schedule, simulate

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


def measure(mesh: Mesh, schedule: Schedule, seconds: float) -> tuple[float, list[int]] | None:
    """Idle seconds of all ranks together, and each one's most activations; on the first rank."""
    pipeline, ledger = sleepers(schedule, mesh, seconds)
    dist.barrier(mesh.pp.group)
    pipeline.run(schedule, parts(schedule.micro_batches))
    found: list[Ledger | None] = [None] * mesh.pp.size
    dist.all_gather_object(found, ledger, mesh.pp.group)
    ledgers = [one for one in found if one is not None]
    spans = list(chain.from_iterable(one.spans for one in ledgers))
    length = max(end for _, _, end in spans) - min(begin for _, begin, _ in spans)
    busy = sum(end - begin for _, begin, end in spans)
    return (schedule.ranks * length - busy, [one.peak for one in ledgers]) if mesh.pp.rank == 0 else None


def _rank(rank: int, world: int, store: str, counts: Sequence[int], seconds: float, repeats: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    mesh = build_mesh(tp=1, pp=world, dp=1, kv_heads=1, device=CPU)
    for name in NAMES:
        for count in counts:
            schedule = make_schedule(name, world, 2 if name == "interleaved" else 1, count)
            found = [measure(mesh, schedule, seconds) for _ in range(repeats)]
            if rank == 0:
                _print(schedule, [one for one in found if one is not None], seconds)
    dist.barrier()
    dist.destroy_process_group()


def _print(schedule: Schedule, found: Sequence[tuple[float, list[int]]], seconds: float) -> None:
    timeline = simulate(schedule, forward=seconds, backward=seconds)
    expected, idle = sum(timeline.idle), sorted(idle for idle, _ in found)
    ratios = f"{statistics.median(idle) / expected:>7.3f}{idle[0] / expected:>8.3f} to {idle[-1] / expected:.3f}"
    figures = f"{1e3 * expected:>12.0f}{1e3 * statistics.median(idle):>12.1f}"
    held = f"{max(max(peaks) for _, peaks in found)} {max(timeline.peak)}"
    print(f"{schedule.name:<14}{schedule.ranks:>5}{schedule.micro_batches:>7}{figures}{ratios:<25}  {held}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--seconds", type=float, default=0.02, help="of every action")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    print(f"{'schedule':<14}{'ranks':>5}{'parts':>7}{'simulated':>12}{'measured ms':>12}{'ratio':>7}{'':>18}  held")
    for world in args.ranks:
        with tempfile.TemporaryDirectory() as folder:
            store = os.path.join(folder, "store")
            mp.spawn(_rank, (world, store, args.micro_batches, args.seconds, args.repeats), nprocs=world)
    return 0


if __name__ == "__main__":
    sys.exit(main())
