"""A trace of training steps: when buckets of gradients and weights start to travel, and when they are waited for; and what
ZeRO-1 leaves in a rank's memory."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from megnorm.config import RunConfig
from megnorm.data.batch import Batch
from megnorm.layers.env import Env
from megnorm.models.causal import build_model
from megnorm.models.config import ModelConfig
from megnorm.optim.clip import global_norm
from megnorm.parallel import data_parallel, pipeline
from megnorm.parallel.config import ParallelConfig
from megnorm.parallel.mesh import Mesh
from megnorm.plan import make_plan
from megnorm.train.build import Run, build
from megnorm.train.config import TrainConfig
from megnorm.train.step import train_step
from tests.distributed import cases
from tests.marks import thinned

Event = tuple[Any, ...]  # what, and on which bucket, stage or unit
STARTS = ("start_all_reduce", "start_reduce_scatter", "start_all_gather")
CPU = torch.device("cpu")


class Tokens:
    """Random tokens, a function of the sample."""

    def __init__(self, config: RunConfig) -> None:
        self.length, self.vocab = config.train.sequence_length, config.model.vocab_size

    def batch(self, first_sample: int, count: int, dp_rank: int = 0, dp_size: int = 1) -> Batch:
        generator = torch.Generator().manual_seed(first_sample * 64 + dp_rank)
        tokens = torch.randint(0, self.vocab, (self.length + 1, count // dp_size), generator=generator)
        return Batch(tokens[:-1], tokens[1:], torch.ones(self.length, count // dp_size))

    def state(self, consumed_samples: int) -> dict[str, Any]:
        return {}


def started(rank: int, world: int, config: RunConfig) -> Run:
    return build(make_plan(config, world), CPU, Tokens(config))


class Noted:
    """A collective under way that notes who waits for it."""

    def __init__(self, work: Any, note: Callable[[], None]) -> None:
        self.work, self.note = work, note

    def wait(self) -> None:
        self.note()
        self.work.wait()


@contextmanager
def traced(run: Run, events: list[Event]) -> Iterator[None]:
    """Note collectives of buckets, their waits, backwards, gradients, and units before and behind the hooks that wait."""
    flat = run.flat

    def bucket_of(tensor: Tensor) -> int:
        whole = flat.weights if tensor.dtype == flat.weights.dtype and _inside(tensor, flat.weights) else flat.grads
        at = (tensor.data_ptr() - whole.data_ptr()) // whole.element_size()
        return next(i for i, bucket in enumerate(flat.buckets) if bucket.start == at)

    def start(name: str, real: Callable[..., Any], x: Tensor, *rest: Any) -> Any:
        what, index = "gather" if name == "start_all_gather" else "reduce", bucket_of(x)
        events.append((f"{what} starts", index))
        found = real(x, *rest)
        note = partial(events.append, (f"{what} is waited for", index))
        return Noted(found, note)

    real_backward, real_run = torch.autograd.backward, pipeline.Pipeline.run

    def backward(*args: Any) -> None:
        real_backward(*args)
        events.append(("backward ends",))

    def running(self: Any, schedule: Any, parts: Any, *, before: Any, **options: Any) -> Tensor:
        def noted(action: Any, final: bool) -> None:
            events.append(("begins", action.kind, action.stage, final))
            before(action, final)

        return real_run(self, schedule, parts, before=noted, **options)

    handles = [p.register_post_accumulate_grad_hook(lambda p: events.append(("gradient", id(p)))) for p in flat.params]
    for index, stage in run.pipeline.stages.items():
        for i, unit in enumerate(stage.units()):  # type: ignore[attr-defined]
            for what, first in (("enters", True), ("computes", False)):
                note = lambda *_, e=(what, index, i): events.append(e)  # noqa: E731
                handles.append(unit.register_forward_pre_hook(note, prepend=first))
    patches = [mock.patch.object(data_parallel, n, partial(start, n, getattr(data_parallel, n))) for n in STARTS]
    patches += [mock.patch.object(torch.autograd, "backward", backward)]
    patches += [mock.patch.object(pipeline.Pipeline, "run", running)]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for one in (*patches, *handles):
            one.stop() if hasattr(one, "stop") else one.remove()


def _inside(tensor: Tensor, whole: Tensor) -> bool:
    return 0 <= tensor.data_ptr() - whole.data_ptr() < whole.numel() * whole.element_size()


def trace(rank: int, world: int, config: RunConfig, steps: int = 2) -> dict[str, Any]:
    """Events of each step, and what the flat storage looks like."""
    run = started(rank, world, config)
    found: list[list[Event]] = []
    events: list[Event] = []
    with traced(run, events):
        for _ in range(steps):
            train_step(run)
            found.append(list(events))
            events.clear()
    flat = run.flat
    bucket_of = {id(p): i for i, bucket in enumerate(flat.buckets) for p in bucket.params}
    return {
        "steps": found,
        "stage": [bucket.stage for bucket in flat.buckets],
        "deferred": [bucket.deferred for bucket in flat.buckets],
        "bucket of": bucket_of,
        "units": {
            (index, i): sorted({bucket_of[id(p)] for p in unit.parameters()})
            for index, stage in run.pipeline.stages.items()
            for i, unit in enumerate(stage.units())  # type: ignore[attr-defined]
        },
        "place": (run.mesh.pp.rank, run.mesh.tp.rank),
    }


def config_of(model: str = "llama", **parallel: Any) -> RunConfig:
    """Four layers in buckets of a few kilobytes; 8 rows a step, one a micro-batch."""
    base = cases.config("preln", model=model, precision="fp32", bucket_mb=0.006, **parallel)
    return replace(
        base,
        model=replace(base.model, layers=4),
        train=replace(base.train, micro_batch=1, eval_batches=0),
    )


LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {"dp": 2},
    "dp2 plain": {"dp": 2, "zero": 0},
    "pp2 dp2": {"pp": 2, "dp": 2},
    "pp2 dp2 tied": {"pp": 2, "dp": 2, "model": "gpt2"},
    "pp2 dp2 interleaved": {"pp": 2, "dp": 2, "schedule": "interleaved", "virtual_stages": 2},
    "pp2 dp2 gpipe plain": {"pp": 2, "dp": 2, "zero": 0, "schedule": "gpipe"},
    "tp2 dp2": {"tp": 2, "dp": 2},
}
FAST = ("dp2", "dp2 plain", "pp2 dp2 tied", "tp2 dp2")
FOUND: dict[str, list[dict[str, Any]]] = {}


def seen(ranks: Any, name: str) -> list[dict[str, Any]]:
    if name not in FOUND:
        sizes = LAYOUTS[name]
        world = sizes.get("tp", 1) * sizes.get("pp", 1) * sizes["dp"]
        FOUND[name] = ranks(world).run(trace, config_of(**sizes))
    return FOUND[name]


def places(events: list[Event], what: str) -> dict[int, int]:
    """Where each bucket's event stands; each happens once."""
    found = [(event[1], i) for i, event in enumerate(events) if event[0] == what]
    assert len(dict(found)) == len(found), f"'{what}' twice"
    return dict(found)


@pytest.mark.parametrize("name", thinned(LAYOUTS, FAST.__contains__))
def test_gradients_start_inside_the_last_backward(ranks: Any, name: str) -> None:
    for rank in seen(ranks, name):
        assert len(rank["stage"]) >= 4, "too few buckets to show anything"
        assert any(rank["deferred"]) == ("tied" in name)
        for events in rank["steps"]:
            starts, waits = places(events, "reduce starts"), places(events, "reduce is waited for")
            assert set(starts) == set(waits) == set(range(len(rank["stage"])))
            ends = [i for i, event in enumerate(events) if event[0] == "backward ends"]
            for bucket, at in starts.items():
                begin = max(
                    i for i, e in enumerate(events) if e[:3] == ("begins", "B", rank["stage"][bucket])
                )  # the stage's last backward, whatever the trace calls it
                assert events[begin][3], "the executor calls another one the last"
                end = min(i for i in ends if i > begin)
                if rank["deferred"][bucket]:
                    assert at > max(ends)
                else:
                    assert begin < at < end
                    last = max(
                        i for i, e in enumerate(events) if e[0] == "gradient" and rank["bucket of"][e[1]] == bucket
                    )
                    assert at <= last + 1, "started later than when its last gradient was there"
            assert max(starts.values()) < min(waits.values()), "a wait holds up a start"
            assert min(waits.values()) > max(ends)


@pytest.mark.parametrize("name", thinned(LAYOUTS, FAST.__contains__))
def test_all_but_the_last_bucket_overlap_with_backward(ranks: Any, name: str) -> None:
    """Other gradients are computed after a bucket has started."""
    for rank in seen(ranks, name):
        for events in rank["steps"]:
            starts = places(events, "reduce starts")
            gradients = [i for i, event in enumerate(events) if event[0] == "gradient"]
            for stage in set(rank["stage"]):
                mine = [b for b, s in enumerate(rank["stage"]) if s == stage and not rank["deferred"][b]]
                assert all(starts[bucket] < max(gradients) for bucket in mine[:-1])


@pytest.mark.parametrize("name", thinned(LAYOUTS, FAST.__contains__))
def test_ranks_that_share_a_bucket_start_alike(ranks: Any, name: str) -> None:
    orders: dict[Any, list[Any]] = {}
    for rank in seen(ranks, name):
        order = [[e for e in events if e[0] in ("reduce starts", "gather starts")] for events in rank["steps"]]
        orders.setdefault(rank["place"], []).append(order)
    assert all(len(group) == 2 and group[0] == group[1] for group in orders.values())


@pytest.mark.parametrize("name", thinned((name for name in LAYOUTS if "plain" not in name), FAST.__contains__))
def test_weights_are_waited_for_where_they_are_first_used(ranks: Any, name: str) -> None:
    for rank in seen(ranks, name):
        first, second = rank["steps"]
        gathers = [event[1] for event in first if event[0] == "gather starts"]
        assert gathers == sorted(gathers, reverse=True) and set(gathers) == set(range(len(rank["stage"])))
        assert not places(first, "gather is waited for"), "waited for before any use"
        waits = places(second, "gather is waited for")
        assert set(waits) == set(gathers)
        for bucket, at in waits.items():
            used = [(i, e) for i, e in enumerate(second) if e[0] == "enters" and bucket in rank["units"][e[1:]]]
            enter, (_, stage, unit) = min(used)
            assert enter < at < second.index(("computes", stage, unit))
            assert all(event[0] == "gather is waited for" for event in second[enter + 1 : at]), "waited for too early"


def test_plain_data_parallelism_gathers_nothing(ranks: Any) -> None:
    for rank in seen(ranks, "dp2 plain"):
        assert not [event for events in rank["steps"] for event in events if event[0].startswith("gather")]


# Memory

SIZES = ModelConfig(layers=2, width=128, heads=4, ffn=352, vocab_size=1024, max_positions=16)  # no padding
BYTES: dict[str, Callable[[int], float]] = {
    "bf16": lambda dp: 2 + 4 + 12 / dp,  # weights, gradients; masters and two moments
    "fp16": lambda dp: 2 + 4 + 12 / dp,
    "fp32": lambda dp: 4 + 4 + 8 / dp,
    "fp64": lambda dp: 8 + 8 + 16 / dp,
}


def live_bytes() -> int:
    """Of all tensors that Python can see, each storage once."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if issubclass(type(x), Tensor)]  # isinstance would wake lazy attributes
    storages = {s._cdata: s.nbytes() for s in (x.untyped_storage() for x in tensors)}
    return sum(storages.values())


def memory(rank: int, world: int, config: RunConfig) -> tuple[int, int, int]:
    """Bytes that a run holds after a step; parameters of this rank; buckets."""
    before = live_bytes()
    run = started(rank, world, config)
    train_step(run)
    run.flat.wait_weights()
    return live_bytes() - before, sum(p.numel() for p in run.flat.params), len(run.flat.buckets)


def memory_config(precision: str, **parallel: Any) -> RunConfig:
    return RunConfig(
        model=SIZES,
        parallel=ParallelConfig(bucket_mb=0.5, **parallel),
        train=TrainConfig(sequence_length=8, global_batch=8, micro_batch=1, precision=precision, eval_batches=0),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("precision", "dp"),
    thinned([("bf16", 1), ("bf16", 2), ("bf16", 4), ("fp32", 1), ("fp32", 4), ("fp16", 2), ("fp64", 2)], 4),
)
def test_memory_of_zero_falls_as_the_formula_says(ranks: Any, precision: str, dp: int) -> None:
    config = memory_config(precision, dp=dp)
    for held, parameters, buckets in ranks(dp).run(memory, config) if dp > 1 else [memory(0, 1, config)]:
        assert buckets == 1 if dp == 1 else buckets > 2
        formula = BYTES[precision](dp) * parameters
        assert formula <= held <= 1.01 * formula


def test_without_zero_every_rank_holds_all(ranks: Any) -> None:
    for held, parameters, _ in ranks(2).run(memory, memory_config("bf16", dp=2, zero=0)):
        assert 18 * parameters <= held <= 1.01 * 18 * parameters


def test_stages_share_the_memory(ranks: Any) -> None:
    """pp 2: what each rank holds is its own stage's."""
    found = ranks(4).run(memory, memory_config("bf16", pp=2, dp=2))
    whole = sum(p.numel() for p in build_model(SIZES, Env()).parameters())
    assert found[0][1] + found[2][1] == whole
    for held, parameters, _ in found:
        assert 12 * parameters <= held <= 1.01 * 12 * parameters


def test_a_rank_without_a_slice_of_its_own_has_norm_zero() -> None:
    assert float(global_norm([], Mesh(), sharded=True)) == 0.0
