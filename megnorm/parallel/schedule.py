"""Pipeline schedules as data: which rank runs which action, in which order, and what that costs. Nothing runs here.

The model is cut into stages 0, 1, ...; a schedule says which rank holds each of them. An action is one stage on one
micro-batch: F forward, B backward, W the gradients of weights, for schedules that part them from B (zero-bubble).
Stages run their backwards in the order 0, 1, ... of micro-batches under every schedule, so gradients are added in the
same order and have the same bits.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, product
from typing import Literal

Kind = Literal["F", "B", "W"]
Cost = float | Sequence[float]  # of every stage alike, or by stage
NAMES = ("1f1b", "gpipe", "interleaved")


class ScheduleError(ValueError):
    """A schedule that leaves work out, does it twice, mixes up messages, or never ends."""


@dataclass(frozen=True)
class Action:
    """One stage (counted over all ranks) on one micro-batch."""

    kind: Kind
    stage: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.kind}{self.micro_batch}@{self.stage}"


@dataclass(frozen=True)
class Schedule:
    """placement: the rank of each stage. actions: of each rank, in its order."""

    name: str
    placement: tuple[int, ...]
    actions: tuple[tuple[Action, ...], ...]

    @property
    def ranks(self) -> int:
        return len(self.actions)

    @property
    def stages(self) -> int:
        return len(self.placement)

    @property
    def micro_batches(self) -> int:
        return 1 + max((action.micro_batch for action in chain(*self.actions)), default=-1)

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages that a rank holds, from the first to the last of the model."""
        return tuple(stage for stage, holder in enumerate(self.placement) if holder == rank)

    def source(self, action: Action) -> Action | None:
        """The action of the stage before (F) or behind (B) whose output this one takes; None where there is none."""
        return self._beside(action, {"F": -1, "B": 1, "W": 0}[action.kind])

    def target(self, action: Action) -> Action | None:
        """The action that takes this one's output; None where there is none."""
        return self._beside(action, {"F": 1, "B": -1, "W": 0}[action.kind])

    def _beside(self, action: Action, step: int) -> Action | None:
        stage = action.stage + step
        return Action(action.kind, stage, action.micro_batch) if step and 0 <= stage < self.stages else None


def check_sizes(name: str, ranks: int, chunks: int, micro_batches: int, sequences: int | None = None) -> None:
    """Raises ValueError for sizes that a schedule cannot serve.

    chunks: stages a rank. sequences: of one micro-batch over all data-parallel ranks, to name fitting global batches.
    """
    if name not in NAMES:
        raise ValueError(f"parallel.schedule={name} is none of {', '.join(NAMES)}")
    for key, value in (("parallel.pp", ranks), ("parallel.virtual_stages", chunks), ("micro-batches", micro_batches)):
        if value < 1:
            raise ValueError(f"{key} is {value}; it must be at least 1")
    if chunks > 1 and ranks == 1:
        raise ValueError(
            f"parallel.virtual_stages={chunks} has no meaning with parallel.pp=1; use parallel.virtual_stages=1, or a "
            "parallel.pp of 2 or more"
        )
    if chunks > 1 and name != "interleaved":
        raise ValueError(
            f"parallel.virtual_stages={chunks} does not go with parallel.schedule={name}; use parallel.virtual_stages=1, "
            "or parallel.schedule=interleaved"
        )
    if name == "interleaved" and ranks > 1:
        if chunks == 1:
            raise ValueError(
                "parallel.schedule=interleaved needs several stages a rank, but parallel.virtual_stages is 1; use 2 or "
                "more, or parallel.schedule=1f1b"
            )
        if micro_batches % ranks:
            counts = [n for n in (micro_batches // ranks * ranks, -(-micro_batches // ranks) * ranks) if n]
            totals = [n * sequences for n in counts] if sequences else []
            named = f" (train.global_batch={' or '.join(map(str, totals))})" if totals else ""
            raise ValueError(
                f"train.global_batch makes {micro_batches} micro-batches, but parallel.schedule=interleaved takes them in "
                f"groups of parallel.pp={ranks}; use {' or '.join(map(str, counts))} micro-batches{named}"
            )


def make_schedule(name: str, ranks: int, chunks: int, micro_batches: int) -> Schedule:
    """The schedule ``name`` over pipeline ranks that hold ``chunks`` stages each; chunk c of rank r is stage c*ranks + r.

    gpipe: all forwards, then all backwards (arXiv:1811.06965). 1f1b: a rank runs ahead by as many micro-batches as
    there are ranks behind it, then forward and backward take turns. interleaved: the same over several stages a rank,
    which parts the bubble by their number (arXiv:2104.04473). Raises ValueError as ``check_sizes`` does.
    """
    check_sizes(name, ranks, chunks, micro_batches)
    total = chunks * micro_batches
    order = tuple(_order(ranks, chunks, micro_batches))
    rows = []
    for rank in range(ranks):
        forwards = [Action("F", chunk * ranks + rank, i) for chunk, i in order]
        backwards = [Action("B", (chunks - 1 - chunk) * ranks + rank, i) for chunk, i in order]
        ahead = ranks - 1 - rank if chunks == 1 else 2 * (ranks - 1 - rank) + (chunks - 1) * ranks
        warm = total if name == "gpipe" else min(ahead, total)
        turns = chain(*zip(forwards[warm:], backwards, strict=False))
        rows.append((*forwards[:warm], *turns, *backwards[total - warm :]))
    return Schedule(name, _placement(ranks, chunks), tuple(rows))


def forward_only(ranks: int, chunks: int, micro_batches: int) -> Schedule:
    """Forwards alone, for evaluation; any number of micro-batches.

    Every rank runs its chunks in one common order, in which an F comes after the F it waits for: no deadlock.
    """
    for key, value in (("ranks", ranks), ("chunks", chunks), ("micro-batches", micro_batches)):
        if value < 1:
            raise ValueError(f"{value} {key}; there must be at least 1")
    order = tuple(_order(ranks, chunks, micro_batches))
    rows = (tuple(Action("F", chunk * ranks + rank, i) for chunk, i in order) for rank in range(ranks))
    return Schedule("forward", _placement(ranks, chunks), tuple(rows))


def _placement(ranks: int, chunks: int) -> tuple[int, ...]:
    return tuple(range(ranks)) * chunks


def _order(ranks: int, chunks: int, micro_batches: int) -> Iterator[tuple[int, int]]:
    """(chunk, micro-batch) in groups of ``ranks`` micro-batches: a group fills the pipeline once per chunk."""
    for first in range(0, micro_batches, ranks):
        yield from product(range(chunks), range(first, min(first + ranks, micro_batches)))


def check(schedule: Schedule) -> None:
    """Raises ScheduleError unless every action is there once, on the rank of its stage, and messages keep their order.

    Order: point-to-point messages carry no name that a receiver could choose by (NCCL ignores tags), so between two
    ranks the n-th receive takes the n-th send. F and B run in opposite directions of the pipeline but, with chunks on
    two ranks, between the same pair of ranks: their order holds by kind only, and each kind needs a channel of its own.
    """
    counts = Counter(chain(*schedule.actions))
    kinds = {action.kind for action in counts}
    wanted: tuple[Kind, ...] = ("F", "B", "W") if "W" in kinds else ("F", "B") if "B" in kinds else ("F",)
    for kind, stage, i in product(wanted, range(schedule.stages), range(schedule.micro_batches)):
        times = counts.pop(Action(kind, stage, i), 0)
        if times != 1:
            raise ScheduleError(f"{schedule.name}: {Action(kind, stage, i)} is there {times} times instead of once")
    if counts:
        raise ScheduleError(f"{schedule.name}: {next(iter(counts))} lies outside the {schedule.stages} stages")
    for rank, row in enumerate(schedule.actions):
        for action in row:
            if schedule.placement[action.stage] != rank:
                raise ScheduleError(
                    f"{schedule.name}: rank {rank} runs {action}, whose stage lies on rank {schedule.placement[action.stage]}"
                )
    _check_messages(schedule)


def _check_messages(schedule: Schedule) -> None:
    """Messages by sender, receiver and kind, each named by the action that takes it."""
    place = schedule.placement
    sent: dict[tuple[int, int, Kind], list[Action]] = defaultdict(list)
    taken: dict[tuple[int, int, Kind], list[Action]] = defaultdict(list)
    for rank, row in enumerate(schedule.actions):
        for action in row:
            target, source = schedule.target(action), schedule.source(action)
            if target is not None:
                sent[rank, place[target.stage], action.kind].append(target)
            if source is not None:
                taken[place[source.stage], rank, action.kind].append(action)
    for (sender, receiver, kind), messages in sent.items():
        if sender == receiver:
            continue
        for one, other in zip(messages, taken[sender, receiver, kind], strict=True):
            if one != other:
                raise ScheduleError(
                    f"{schedule.name}: rank {sender} sends for {one} when rank {receiver} waits for what {other} takes"
                )


@dataclass(frozen=True)
class Timeline:
    """A schedule in time, from 0. peak: by rank, the largest number of stages' activations held (F done, B not yet)."""

    schedule: Schedule
    start: Mapping[Action, float]
    finish: Mapping[Action, float]
    peak: tuple[int, ...]

    @property
    def end(self) -> float:
        return max(self.finish.values(), default=0.0)

    @property
    def busy(self) -> tuple[float, ...]:
        return tuple(sum(self.finish[a] - self.start[a] for a in row) for row in self.schedule.actions)

    @property
    def idle(self) -> tuple[float, ...]:
        return tuple(self.end - busy for busy in self.busy)

    @property
    def bubble(self) -> float:
        """The idle share of all ranks' time, 0 to 1."""
        return sum(self.idle) / (self.end * self.schedule.ranks) if self.end else 0.0


Delay = float | Callable[[Action], float]
"""Always the same, or what comes before this action."""


def simulate(
    schedule: Schedule,
    forward: Cost = 1.0,
    backward: Cost = 2.0,
    weight: Cost = 0.0,
    send: Delay = 0.0,
    turn: Delay = 0.0,
) -> Timeline:
    """Run a schedule on paper: a rank runs its actions in order, one at a time, each as soon as its inputs are there.

    forward, backward, weight: costs of F, B and W, in any unit. send: from the end of an action until one that takes its
    output on another rank can begin; sending keeps nobody busy. turn: from the end of an action until the next one of its
    rank can begin. Raises ScheduleError where the ranks wait for each other.
    """
    costs: dict[Kind, Cost] = {"F": forward, "B": backward, "W": weight}
    place = schedule.placement
    start: dict[Action, float] = {}
    finish: dict[Action, float] = {}
    done, clock = [0] * schedule.ranks, [0.0] * schedule.ranks
    moved = True
    while moved:
        moved = False
        for rank, row in enumerate(schedule.actions):
            while done[rank] < len(row):
                action = row[done[rank]]
                inputs = _inputs(schedule, action)
                if not all(one in finish for one in inputs):
                    break
                ready = [finish[one] + _delay(send, action) * (place[one.stage] != rank) for one in inputs]
                cost = costs[action.kind]
                free = clock[rank] + _delay(turn, action) if done[rank] else 0.0
                start[action] = max(free, *ready, 0.0)
                clock[rank] = start[action] + (cost if isinstance(cost, int | float) else cost[action.stage])
                finish[action] = clock[rank]
                done[rank] += 1
                moved = True
    stuck = []
    for rank, row in enumerate(schedule.actions):
        if done[rank] < len(row):
            action = row[done[rank]]
            missing = ", ".join(str(one) for one in _inputs(schedule, action) if one not in finish)
            stuck.append(f"rank {rank} at {action} for {missing}")
    if stuck:
        raise ScheduleError(f"{schedule.name}: deadlock; these wait: {'; '.join(stuck)}")
    return Timeline(schedule, start, finish, tuple(_peak(row) for row in schedule.actions))


def _delay(delay: Delay, action: Action) -> float:
    return delay if isinstance(delay, int | float) else delay(action)


def _inputs(schedule: Schedule, action: Action) -> list[Action]:
    """What must be done before an action, beside the actions before it on its rank."""
    source = schedule.source(action)
    own: dict[Kind, Kind] = {"B": "F", "W": "B"}
    before = [Action(own[action.kind], action.stage, action.micro_batch)] if action.kind in own else []
    return before + ([source] if source is not None else [])


def _peak(row: Sequence[Action]) -> int:
    live = peak = 0
    for action in row:
        live += {"F": 1, "B": -1, "W": 0}[action.kind]
        peak = max(peak, live)
    return peak
