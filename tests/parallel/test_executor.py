"""The executor on real ranks: order, values, activations held, messages. (Its idle time: tools/bench/pipeline.py.)"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef

from megnorm.parallel import pipeline
from megnorm.parallel.mesh import Mesh, build_mesh
from megnorm.parallel.schedule import Action, Schedule, forward_only, make_schedule, simulate
from tests.distributed.pool import keep
from tools.bench.pipeline import CPU, SIZE, Part, Sleeper, parts, sleepers

SCHEDULES = (("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("interleaved", 3))
WEIGHT, SCALE = 0.25, 4.0


@dataclass
class Seen:
    """What a rank did in one run. wire: every "send" and "recv" with the ranks between which it goes, its tag and
    elements. log: actions as they begin and receives as they are posted. in_memory: most messages sent and not yet freed.
    """

    actions: list[Action] = field(default_factory=list)
    final: list[Action] = field(default_factory=list)
    computed: list[Action] = field(default_factory=list)
    wire: list[tuple[str, int, int, int, int]] = field(default_factory=list)
    log: list[Any] = field(default_factory=list)
    total: float = 0.0
    grads: dict[int, float] = field(default_factory=dict)
    peak: int = 0
    live: int = 0
    in_memory: int = 0
    left: int = 0


@contextmanager
def wired(seen: Seen, sent: list[StorageWeakRef], rank: int) -> Iterator[None]:
    """Record what the executor sends and receives."""
    isend, irecv = dist.isend, dist.irecv

    def send(tensor: Any, *, group_dst: int, group: Any, tag: int) -> Any:
        seen.wire.append(("send", rank, group_dst, tag, tensor.numel()))
        sent.append(StorageWeakRef(tensor.untyped_storage()))
        return isend(tensor, group_dst=group_dst, group=group, tag=tag)

    def recv(tensor: Any, *, group_src: int, group: Any, tag: int) -> Any:
        seen.wire.append(("recv", group_src, rank, tag, tensor.numel()))
        seen.log.append(tag)
        return irecv(tensor, group_src=group_src, group=group, tag=tag)

    with mock.patch.object(pipeline.dist, "isend", send), mock.patch.object(pipeline.dist, "irecv", recv):
        yield


def mesh_of(world: int) -> Mesh:
    return keep("line", lambda: build_mesh(tp=1, pp=world, dp=1, kv_heads=1, device=CPU))


def drive(rank: int, world: int, schedules: list[Schedule], train: bool = True) -> list[Seen]:
    """Run the schedules one after the other."""
    mesh, found = mesh_of(world), []
    for schedule in schedules:
        seen, sent = Seen(), []
        line, ledger = sleepers(schedule, mesh, 0.0)

        def before(action: Action, final: bool, seen: Seen = seen, sent: list[StorageWeakRef] = sent) -> None:
            seen.actions.append(action)
            seen.log.append(action)
            seen.final += [action] * final
            seen.in_memory = max(seen.in_memory, sum(not one.expired() for one in sent))

        with wired(seen, sent, rank), torch.set_grad_enabled(train):
            total = line.run(schedule, parts(schedule.micro_batches), weight=WEIGHT, scale=SCALE, before=before)
        seen.total, seen.peak, seen.live = float(total), ledger.peak, ledger.live
        seen.computed = [action for action, _, _ in ledger.spans]
        stages = {index: stage for index, stage in line.stages.items() if isinstance(stage, Sleeper)}
        seen.grads = {
            index: float(stage.weight.grad) for index, stage in stages.items() if stage.weight.grad is not None
        }
        seen.left = sum(not one.expired() for one in sent)
        found.append(seen)
    return found


def check(schedule: Schedule, ranks_saw: list[Seen]) -> None:
    """Everything about one run that does not depend on time."""
    peaks = simulate(schedule).peak
    product = math.prod(stage + 2.0 for stage in range(schedule.stages))
    total = WEIGHT * product * sum((SIZE + i) * (i + 1.0) for i in range(schedule.micro_batches))
    for rank, seen in enumerate(ranks_saw):
        row = list(schedule.actions[rank])
        assert seen.actions == row and seen.computed == row
        assert seen.peak == peaks[rank], "activations held"
        assert seen.live == 0 and seen.left == 0, "something is still in memory"
        assert seen.total == (pytest.approx(total, rel=1e-12) if rank == schedule.ranks - 1 else 0.0)
        backwards = [action for action in row if action.kind == "B"]
        assert sorted(seen.final, key=row.index) == [
            action for i, action in enumerate(backwards) if action.stage not in {b.stage for b in backwards[i + 1 :]}
        ]
        wanted = {stage: SCALE * total / (stage + 2.0) for stage in schedule.stages_of(rank)} if backwards else {}
        assert seen.grads == pytest.approx(wanted, rel=1e-12)
        _check_ahead(schedule, row, seen)
    wire = [message for seen in ranks_saw for message in seen.wire]
    sent = sorted(rest for kind, *rest in wire if kind == "send")
    taken = sorted(rest for kind, *rest in wire if kind == "recv")
    edges = schedule.micro_batches * (schedule.stages - 1)
    assert sent == taken and len(sent) == edges * len({action.kind for action in schedule.actions[0]})
    assert len({(source, to, tag) for source, to, tag, _ in sent}) == len(sent), "two messages of one name"


def _check_ahead(schedule: Schedule, row: list[Action], seen: Seen) -> None:
    """The receive of every action is posted before the action begins that takes the message before it."""
    takers = [action for action in row if schedule.source(action) is not None]
    posted = [i for i, entry in enumerate(seen.log) if not isinstance(entry, Action)]
    assert len(posted) == len(takers)
    for i in range(1, len(takers)):
        assert posted[i] < seen.log.index(takers[i - 1])


def every(world: int, counts: tuple[int, ...]) -> list[Schedule]:
    return [make_schedule(name, world, chunks, n) for name, chunks in SCHEDULES for n in counts
            if name != "interleaved" or n % world == 0]  # fmt: skip


@pytest.mark.parametrize(("world", "counts"), [(2, (1, 2, 5, 8)), (4, (1, 4, 6, 8))])
def test_it_does_what_the_schedule_says(ranks: Any, world: int, counts: tuple[int, ...]) -> None:
    schedules = every(world, counts)
    answers = ranks(world).run(drive, schedules)
    for i, schedule in enumerate(schedules):
        check(schedule, [answer[i] for answer in answers])


@pytest.mark.full
@pytest.mark.parametrize(("world", "counts"), [(2, (4, 16, 32)), (4, (16, 32)), (8, (4, 8, 16, 32))])
def test_it_does_so_on_many_ranks(ranks: Any, world: int, counts: tuple[int, ...]) -> None:
    schedules = every(world, counts)
    answers = ranks(world).run(drive, schedules)
    for i, schedule in enumerate(schedules):
        check(schedule, [answer[i] for answer in answers])


def test_forwards_alone_keep_nothing(ranks: Any) -> None:
    """Evaluation: no activations, and few messages on their way, however many micro-batches."""
    schedules = [forward_only(4, chunks, count) for chunks in (1, 2) for count in (3, 24)]
    answers = ranks(4).run(drive, schedules, train=False)
    for i, schedule in enumerate(schedules):
        found = [answer[i] for answer in answers]
        for rank, seen in enumerate(found):
            assert seen.computed == list(schedule.actions[rank]) and seen.grads == {}
            assert seen.peak == seen.left == 0 and seen.in_memory <= pipeline.BEHIND
        whole = WEIGHT * math.prod(stage + 2.0 for stage in range(schedule.stages))
        assert found[-1].total == pytest.approx(
            whole * sum((SIZE + n) * (n + 1.0) for n in range(schedule.micro_batches)), rel=1e-12
        )


@pytest.mark.parametrize(("name", "chunks"), [("1f1b", 1), ("interleaved", 2)])
def test_messages_in_memory_do_not_grow_with_the_batch(ranks: Any, name: str, chunks: int) -> None:
    """What has arrived is freed at once, although a send on gloo never says that it is complete; so is a stage's output,
    of which backward needs the place in the graph alone."""
    schedules = [make_schedule(name, 4, chunks, count) for count in (16, 32)]
    peaks = simulate(schedules[0]).peak
    for peak, (few, many) in zip(peaks, ranks(4).run(drive, schedules), strict=True):
        assert few.in_memory == many.in_memory <= peak + chunks - 1


def run_ahead(rank: int, world: int, count: int) -> list[str]:
    """The first stage of two does all its forwards before the second one begins its first."""
    mesh = mesh_of(world)
    schedule = make_schedule("gpipe", world, 1, count)
    line, _ = sleepers(schedule, mesh, 0.0)
    word, gate = torch.zeros(1), 1 << 20

    def before(action: Action, final: bool) -> None:
        if rank == 0 and action == Action("F", 0, count - 1):
            dist.send(word, group_dst=1, group=mesh.pp.group, tag=gate)

    class Late(Sleeper):
        def forward(self, batch: Part, carry: Any) -> Any:
            if batch.index == 0:
                dist.recv(word, group_src=0, group=mesh.pp.group, tag=gate)
            return super().forward(batch, carry)

    if rank == 1:
        stage = line.stages[1]
        assert isinstance(stage, Sleeper)
        line.stages = {1: Late(1, 2, 0.0, stage.ledger)}
    total = line.run(schedule, parts(count), before=before)
    return [f"{float(total):.0f}"]


def test_sends_are_not_waited_for(ranks: Any) -> None:
    expected = 6 * sum((SIZE + i) * (i + 1) for i in range(8))
    assert ranks(2).run(run_ahead, 8, timeout=60.0) == [["0"], [str(expected)]]


def test_steps_do_not_mix(ranks: Any) -> None:
    """Steps of other schedules and sizes follow one another without a barrier."""
    schedules = [make_schedule(*case) for case in (("1f1b", 2, 1, 5), ("interleaved", 2, 2, 4), ("gpipe", 2, 1, 3)) * 2]
    answers = ranks(2).run(drive, schedules)
    for i, schedule in enumerate(schedules):
        check(schedule, [answer[i] for answer in answers])
