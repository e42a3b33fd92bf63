"""Schedules against the formulas of the papers they come from; the simulator against its own definition."""

import graphlib
from collections import defaultdict
from dataclasses import replace
from itertools import chain
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megnorm.parallel.schedule import (
    Action,
    Kind,
    Schedule,
    ScheduleError,
    check,
    check_sizes,
    forward_only,
    make_schedule,
    simulate,
)
from megnorm.parallel.schedule_text import draw

Sizes = tuple[str, int, int, int]  # name, ranks, chunks, micro-batches


@st.composite
def sizes(choose: Any, names: tuple[str, ...] = ("1f1b", "gpipe", "interleaved")) -> Sizes:
    name, ranks = choose(st.sampled_from(names)), choose(st.integers(1, 8))
    if name == "interleaved" and ranks > 1:
        return name, ranks, choose(st.integers(2, 4)), ranks * choose(st.integers(1, 4))
    return name, ranks, 1, choose(st.integers(1, 24))


def parse(text: str) -> tuple[Action, ...]:
    """ "F0@1 B2@3" -> actions: kind, micro-batch, stage."""
    words = (word.split("@") for word in text.split())
    kinds: dict[str, Kind] = {"F": "F", "B": "B", "W": "W"}
    return tuple(Action(kinds[head[0]], int(stage), int(head[1:])) for head, stage in words)


def inputs(schedule: Schedule, action: Action) -> list[Action]:
    """What an action needs, written down once more."""
    kind, stage, i = action.kind, action.stage, action.micro_batch
    if kind == "F":
        return [Action("F", stage - 1, i)] if stage else []
    if kind == "W":
        return [Action("B", stage, i)]
    behind = [Action("B", stage + 1, i)] if stage + 1 < len(schedule.placement) else []
    return [Action("F", stage, i), *behind]


def is_sound(schedule: Schedule) -> bool:
    """No circle of waiting, and every channel gives out messages in the order in which they went in."""
    graph: dict[Action, set[Action]] = defaultdict(set)
    into: dict[tuple[int, int, str], list[tuple[int, int]]] = defaultdict(list)
    out: dict[tuple[int, int, str], list[tuple[int, int]]] = defaultdict(list)
    for rank, row in enumerate(schedule.actions):
        for action, before in zip(row, (None, *row), strict=False):
            graph[action].update([*inputs(schedule, action), *([before] if before else [])])
            step = 1 if action.kind == "F" else -1
            for stage, channels in ((action.stage + step, into), (action.stage - step, out)):
                if 0 <= stage < len(schedule.placement) and schedule.placement[stage] != rank:
                    ends = (rank, schedule.placement[stage])
                    edge = (action.micro_batch, max(action.stage, stage))
                    channels[(*(ends if channels is into else ends[::-1]), action.kind)].append(edge)
    try:
        tuple(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError:
        return False
    return into == out


def accepted(schedule: Schedule) -> bool:
    try:
        check(schedule)
        simulate(schedule)
    except ScheduleError:
        return False
    return True


@given(sizes(), st.floats(0.1, 5), st.floats(0.1, 5), st.floats(0, 3), st.floats(0, 2), st.integers(0, 99))
def test_no_schedule_deadlocks_and_each_action_starts_as_soon_as_it_can(
    size: Sizes, forward: float, backward: float, send: float, turn: float, seed: int
) -> None:
    schedule = make_schedule(*size)
    check(schedule)
    forwards = [forward * (1 + (seed * (stage + 1)) % 7) for stage in range(schedule.stages)]

    def late(action: Action) -> float:
        return send * (1 + action.micro_batch % 3)

    timeline = simulate(schedule, forward=forwards, backward=backward, send=late, turn=turn)
    for rank, row in enumerate(schedule.actions):
        free = 0.0
        for action in row:
            waits = [
                timeline.finish[one] + (late(action) if schedule.placement[one.stage] != rank else 0.0)
                for one in inputs(schedule, action)
            ]
            assert timeline.start[action] == max([free, *waits])
            cost = forwards[action.stage] if action.kind == "F" else backward
            free = timeline.finish[action]
            assert free == timeline.start[action] + cost
            free += turn
        assert timeline.busy[rank] + timeline.idle[rank] == pytest.approx(timeline.end)
    assert timeline.end == max(timeline.finish.values())


@given(sizes(), st.sampled_from((1.0, 2.0)))
def test_the_bubble_is_the_papers(size: Sizes, backward: float) -> None:
    _, ranks, chunks, micro_batches = size
    timeline = simulate(make_schedule(*size), backward=backward)
    assert timeline.bubble == pytest.approx((ranks - 1) / (chunks * micro_batches + ranks - 1))
    assert timeline.end == pytest.approx((chunks * micro_batches + ranks - 1) * (1 + backward))


@given(sizes())
def test_activations_held_at_once(size: Sizes) -> None:
    name, ranks, chunks, micro_batches = size
    peak = simulate(make_schedule(*size)).peak
    for rank in range(ranks):
        if name == "gpipe":
            expected = micro_batches
        elif chunks == 1:
            expected = min(micro_batches, ranks - rank)
        else:  # Megatron's warm-up, and one
            expected = min(2 * (ranks - rank - 1) + (chunks - 1) * ranks + 1, chunks * micro_batches)
        assert peak[rank] == expected


@given(sizes())
def test_every_stage_adds_its_gradients_in_the_order_of_micro_batches(size: Sizes) -> None:
    schedule = make_schedule(*size)
    for rank in range(schedule.ranks):
        assert schedule.stages_of(rank) == tuple(range(rank, size[1] * size[2], size[1]))
        for stage in schedule.stages_of(rank):
            order = [a.micro_batch for a in schedule.actions[rank] if a.kind == "B" and a.stage == stage]
            assert order == list(range(size[3]))


def test_schedules_written_out() -> None:
    assert make_schedule("1f1b", 1, 1, 2).actions == (parse("F0@0 B0@0 F1@0 B1@0"),)
    assert make_schedule("gpipe", 1, 1, 2).actions == (parse("F0@0 F1@0 B0@0 B1@0"),)
    assert make_schedule("interleaved", 1, 1, 2).actions == make_schedule("1f1b", 1, 1, 2).actions
    assert make_schedule("1f1b", 2, 1, 3).actions == (
        parse("F0@0 F1@0 B0@0 F2@0 B1@0 B2@0"),
        parse("F0@1 B0@1 F1@1 B1@1 F2@1 B2@1"),
    )
    # arXiv:2104.04473, figure 4, last device: two chunks on four devices, eight micro-batches.
    last = "F0@3 F1@3 F2@3 F3@3 F0@7 B0@7 F1@7 B1@7 F2@7 B2@7 F3@7 B3@7 F4@3 B0@3 F5@3 B1@3 F6@3 B2@3 F7@3 B3@3 "
    last += "F4@7 B4@7 F5@7 B5@7 F6@7 B6@7 F7@7 B7@7 B4@3 B5@3 B6@3 B7@3"
    assert make_schedule("interleaved", 4, 2, 8).actions[3] == parse(last)


@given(st.integers(1, 8), st.integers(1, 4), st.integers(1, 24))
def test_evaluation_takes_any_number_of_micro_batches(ranks: int, chunks: int, micro_batches: int) -> None:
    schedule = forward_only(ranks, chunks, micro_batches)
    check(schedule)
    assert {action.kind for action in chain(*schedule.actions)} == {"F"}
    assert schedule.micro_batches == micro_batches and schedule.stages == ranks * chunks
    # A last group that is not full waits for its own outputs between chunks.
    turns = chunks * ranks * -(-micro_batches // ranks) if chunks > 1 else micro_batches
    assert simulate(schedule).end <= turns + ranks - 1


@settings(max_examples=300)
@given(sizes(), st.data())
def test_a_changed_schedule_is_found(size: Sizes, data: st.DataObject) -> None:
    """An action left out, doubled, on another rank, or moved where it does harm (a move may also be harmless)."""
    schedule = make_schedule(*size)
    rank = data.draw(st.integers(0, schedule.ranks - 1))
    row = schedule.actions[rank]
    at = data.draw(st.integers(0, len(row) - 1))
    to = data.draw(st.integers(0, len(row) - 1))
    rest = row[:at] + row[at + 1 :]

    def changed(row: tuple[Action, ...], **others: Any) -> Schedule:
        return replace(schedule, actions=(*schedule.actions[:rank], row, *schedule.actions[rank + 1 :]), **others)

    assert not accepted(changed(rest)) or size[3] == 1 == schedule.stages  # of two actions, F alone is an evaluation
    assert not accepted(changed((*row[:to], row[at], *row[to:])))
    if schedule.ranks > 1:
        held = schedule.placement[row[at].stage]
        placement = tuple(
            (held + 1) % schedule.ranks if s == row[at].stage else r for s, r in enumerate(schedule.placement)
        )
        assert not accepted(replace(schedule, placement=placement))
    moved = changed((*rest[:to], row[at], *rest[to:]))
    assert accepted(moved) == is_sound(moved)


def test_a_harmful_move_is_found_and_named() -> None:
    good = make_schedule("1f1b", 2, 1, 3)
    crossed = replace(good, actions=(good.actions[0], parse("F1@1 B1@1 F0@1 B0@1 F2@1 B2@1")))
    with pytest.raises(ScheduleError, match="rank 0 sends for F0@1 when rank 1 waits for what F1@1 takes"):
        check(crossed)
    early = replace(good, actions=(parse("F0@0 B0@0 F1@0 B1@0 F2@0 B2@0"), parse("F0@1 F1@1 B0@1 B1@1 F2@1 B2@1")))
    check(early)
    with pytest.raises(ScheduleError, match="deadlock; these wait: rank 0 at B0@0 for B0@1; rank 1 at F1@1 for F1@0"):
        simulate(early)
    with pytest.raises(ScheduleError, match="rank 1 runs F0@0, whose stage lies on rank 0"):
        check(replace(good, actions=(good.actions[0][1:], (good.actions[0][0], *good.actions[1]))))
    with pytest.raises(ScheduleError, match="F0@2 lies outside the 2 stages"):
        check(replace(good, actions=(good.actions[0], (*good.actions[1], Action("F", 2, 0)))))


def test_weight_gradients_fill_the_bubble() -> None:
    """A backward parted in B and W: rank 0 computes weights' gradients while it would wait."""
    rows = (parse("F0@0 F1@0 B0@0 W0@0 B1@0 W1@0"), parse("F0@1 B0@1 F1@1 B1@1 W0@1 W1@1"))
    parted = Schedule("parted", (0, 1), rows)
    check(parted)
    timeline = simulate(parted, forward=1, backward=1, weight=1)
    assert timeline.end == 7 and timeline.peak == (2, 1)
    assert timeline.end < simulate(make_schedule("1f1b", 2, 1, 2), backward=2).end
    with pytest.raises(ScheduleError, match="rank 0 at W0@0 for B0@0"):
        simulate(replace(parted, actions=(parse("F0@0 F1@0 W0@0 B0@0 B1@0 W1@0"), rows[1])))
    with pytest.raises(ScheduleError, match="W1@1 is there 0 times"):
        check(replace(parted, actions=(rows[0], rows[1][:-1])))


REFUSED: dict[Sizes, str] = {
    ("zigzag", 2, 1, 4): "parallel.schedule=zigzag is none of 1f1b, gpipe, interleaved",
    ("1f1b", 0, 1, 4): "parallel.pp is 0; it must be at least 1",
    ("1f1b", 2, 0, 4): "parallel.virtual_stages is 0",
    ("1f1b", 2, 1, 0): "micro-batches is 0",
    ("interleaved", 1, 2, 4): "parallel.virtual_stages=2 has no meaning with parallel.pp=1",
    ("gpipe", 2, 2, 4): "parallel.virtual_stages=2 does not go with parallel.schedule=gpipe",
    ("interleaved", 2, 1, 4): "parallel.virtual_stages is 1; use 2 or more, or parallel.schedule=1f1b",
    ("interleaved", 4, 2, 6): "groups of parallel.pp=4; use 4 or 8 micro-batches",
    ("interleaved", 4, 2, 3): "groups of parallel.pp=4; use 4 micro-batches",
}


@pytest.mark.parametrize("size", REFUSED)
def test_sizes_that_a_schedule_cannot_serve(size: Sizes) -> None:
    with pytest.raises(ValueError) as error:
        make_schedule(*size)
    assert REFUSED[size] in str(error.value)


def test_a_fitting_global_batch_is_named() -> None:
    with pytest.raises(ValueError, match=r"use 4 or 8 micro-batches \(train.global_batch=24 or 48\)"):
        check_sizes("interleaved", 4, 2, 6, sequences=6)


def test_the_picture() -> None:
    legend = "        0-9 forward, a-j backward of the micro-batch with that last digit, . idle"
    timeline = simulate(make_schedule("1f1b", 2, 1, 3))
    assert draw(timeline).splitlines() == ["rank 0  01..aa2bb.cc", "rank 1  .0aa1bb2cc..", legend]
    assert draw(timeline, columns=5).splitlines() == [
        "rank 0  01..a ...",
        "rank 1  .0aa1 ...",
        f"{legend}; 5 of 12 columns",
    ]
    assert draw(simulate(forward_only(2, 1, 11))).splitlines()[1] == "rank 1  .01234567890"


@given(sizes(), st.floats(1, 4))
def test_the_picture_shows_every_action(size: Sizes, backward: float) -> None:
    timeline = simulate(make_schedule(*size), backward=backward)
    rows = draw(timeline, columns=10**6).splitlines()[:-1]
    for row, actions in zip(rows, timeline.schedule.actions, strict=True):
        for kind, digits in (("F", "0123456789"), ("B", "abcdefghij")):
            for digit, mark in enumerate(digits):
                count = sum(1 for a in actions if a.kind == kind and a.micro_batch % 10 == digit)
                assert (row[8:].count(mark) >= count) if kind == "B" else row[8:].count(mark) == count
