"""Bytes moved per layer with sequence parallelism, counted at run time (counter.py); the docs quote ``table``.

The figure of a layer is the difference of a three-layer and a two-layer model, so that embedding, head and loss drop out.
Counted are torch's own collectives, which the CPU replaces by messages of the same bytes (the last test).
"""

from collections import Counter
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megnorm.config import RunConfig
from megnorm.parallel import messages
from megnorm.parallel.layout import reduce_replicated_grads
from megnorm.plan import make_plan
from megnorm.train.build import build_stages, flatten, mesh_of
from tests.distributed import cases
from tests.distributed.counter import Message, counting
from tests.marks import thinned
from tools import parity

S, B, D = 8, 2, 32
STREAM = S * B * D  # elements of the residual stream
TOKENS = S * B
# torch 2.13 renamed these; older versions have the old names only
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def count(rank: int, world: int, config: RunConfig, native: bool = True) -> tuple[Counter[Message], Counter[Message]]:
    """Collectives of one forward and backward pass, and of the sum of replicated parameters' gradients after it.

    native: torch's own collectives, as on a GPU.
    """
    with mock.patch.object(messages, "serve", lambda x: not native):
        return _count(world, config)


def _count(world: int, config: RunConfig) -> tuple[Counter[Message], Counter[Message]]:
    plan = make_plan(config, world)
    mesh = mesh_of(plan, torch.device("cpu"))
    stages, _ = build_stages(plan, mesh)
    flat = flatten(plan, mesh, stages)
    batch = parity.random_batch(config, 0, 0)
    with counting() as passes:
        stages[0](batch).backward()
    with counting() as sums:
        reduce_replicated_grads(flat.params, mesh)
    return passes.messages, sums.messages


def per_layer(ranks: Any, scheme: str, **options: Any) -> tuple[Counter[Message], int]:
    """Messages of one layer's forward and backward, and the bytes that it adds to the step's gradient sums."""
    tp = options.setdefault("tp", 2)
    config = cases.config(scheme, precision="fp32", **options)
    found = []
    for layers in (2, 3):
        one = replace(config, model=replace(config.model, layers=layers))
        every = ranks(tp).run(count, one)
        assert all(answer == every[0] for answer in every), "the ranks differ in what they send"
        found.append(every[0])
    (two, sums_two), (three, sums_three) = found
    assert not two - three, "a layer more and a message less"
    assert sums_two.total() == sums_three.total() <= 2, "the gradient sums are one message an axis, however many layers"
    return three - two, _bytes(sums_three) - _bytes(sums_two)


def table(ranks: Any) -> str:
    """Markdown: messages of one layer's forward and backward at tp=2, and their size as multiples of s b d elements."""
    lines = ["| scheme | inputs | all-gather | reduce-scatter | statistics (all-reduce) |", "|---|---|---|---|---|"]
    for scheme, kind in SCHEMES:
        for keep in (True, False):
            found, _ = per_layer(ranks, scheme, kind=kind, keep_gathered=keep)
            cells = [_stream_cell(found, "all-gather"), _stream_cell(found, "reduce-scatter"), _statistics_cell(found)]
            lines.append(f"| {scheme}, {kind} | {'kept' if keep else 'gathered again'} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _stream_cell(found: Counter[Message], kind: str) -> str:
    return " + ".join(f"{n} x {m.elements / STREAM:g} sbd" for m, n in found.items() if m.kind == kind)


def _statistics_cell(found: Counter[Message]) -> str:
    cells = (f"{n} x {m.elements / TOKENS:g} sb" for m, n in found.items() if m.kind == "all-reduce")
    return " + ".join(cells) or "none"


def _bytes(messages: Counter[Message]) -> int:
    return sum(message.bytes * times for message, times in messages.items())


def test_the_counter_counts(ranks: Any) -> None:
    """Against calls whose size is known, through torch's public functions."""
    assert ranks(2).run(_known_calls)[1] == Counter(
        {
            Message("all-reduce", 10, 4): 2,
            Message("all-gather", 6, 8): 1,
            Message("reduce-scatter", 8, 4): 1,
            Message("broadcast", 5, 4): 1,
            Message("all-reduce", 1, 8): 1,
        }
    )


def _known_calls(rank: int, world: int) -> Counter[Message]:
    with counting() as wire:
        dist.all_reduce(torch.ones(10))
        dist.all_reduce(torch.ones(2, 5))
        _all_gather(torch.empty(6, dtype=torch.float64), torch.ones(3, dtype=torch.float64))
        _reduce_scatter(torch.empty(4), torch.ones(8))
        dist.broadcast(torch.ones(5), 0)
        x = torch.ones((), dtype=torch.float64, requires_grad=True)
        (_InBackward.apply(x) * 2).backward()
        dist.barrier()
    assert wire.total("all-reduce") == 2 * 40 + 8
    return wire.messages


class _InBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad


SCHEMES = (("preln", "rmsnorm"), ("hybridnorm", "rmsnorm"), ("normformer", "layernorm"), ("normformer", "rmsnorm"),
           ("olmo2", "rmsnorm"), ("subln", "layernorm"))  # fmt: skip
GATHERS = {True: 4, False: 6}


@pytest.mark.parametrize("keep", (True, False))
@pytest.mark.parametrize("scheme", thinned(("preln", "postln", "hybridnorm", "sandwich"), 2))
def test_a_layer_moves_the_stream_and_nothing_else(ranks: Any, scheme: str, keep: bool) -> None:
    """Two sub-layers: gather and scatter forward, gather and scatter backward; and a gather again of each input."""
    found, _ = per_layer(ranks, scheme, keep_gathered=keep)
    assert found == {Message("all-gather", STREAM, 4): GATHERS[keep], Message("reduce-scatter", STREAM, 4): 4}


@pytest.mark.parametrize("model", tuple(cases.MODELS))
def test_whatever_the_model(ranks: Any, model: str) -> None:
    found, _ = per_layer(ranks, "preln", keep_gathered=True, model=model, kv=1)
    assert found == {Message("all-gather", STREAM, 4): 4, Message("reduce-scatter", STREAM, 4): 4}


# numbers of one statistic per token: forward, then the message of backward
STATISTICS = [
    ("normformer", "rmsnorm", {1: 2}),  # sum x^2; sum of g x
    ("normformer", "layernorm", {1: 2, 2: 1}),  # sum, squares about the mean; both means of backward together
    ("subln", "rmsnorm", {1: 4}),  # context and inner
    ("subln", "layernorm", {1: 4, 2: 2}),
    ("olmo2", "rmsnorm", {1: 4}),  # full-width q and k
]


@pytest.mark.parametrize(("scheme", "kind", "numbers"), thinned(STATISTICS, 3))
@pytest.mark.parametrize("keep", (True, False))
def test_sharded_norms_add_their_statistics(
    ranks: Any, scheme: str, kind: str, numbers: dict[int, int], keep: bool
) -> None:
    found, _ = per_layer(ranks, scheme, kind=kind, keep_gathered=keep)
    stream = {Message("all-gather", STREAM, 4): GATHERS[keep], Message("reduce-scatter", STREAM, 4): 4}
    assert found == {**stream, **{Message("all-reduce", n * TOKENS, 4): times for n, times in numbers.items()}}


# scheme, modes: gathers, scatters, sums of a statistic
RECOMPUTED = [
    ("preln", "attention+norms+activations", 6, 4, 0),
    ("preln", "block", 8, 5, 0),  # the last scatter is not needed again
    ("normformer", "norms", 6, 4, 3),  # the inner norm's, forward and again
    ("sandwich", "projections", 6, 6, 0),
]


@pytest.mark.parametrize(("scheme", "modes", "gathers", "scatters", "sums"), RECOMPUTED)
def test_recompute_moves_again_what_it_needs(
    ranks: Any, scheme: str, modes: str, gathers: int, scatters: int, sums: int
) -> None:
    found, _ = per_layer(ranks, scheme, recompute=modes)
    wanted = {Message("all-gather", STREAM, 4): gathers, Message("reduce-scatter", STREAM, 4): scatters}
    assert found == wanted | ({Message("all-reduce", TOKENS, 4): sums} if sums else {})


def test_without_sequence_parallelism_the_stream_is_reduced(ranks: Any) -> None:
    found, extra = per_layer(ranks, "preln", sequence_parallel=False)
    assert found == {Message("all-reduce", STREAM, 4): 4}
    assert extra == 0


def test_gradient_sums_of_a_layer(ranks: Any) -> None:
    """Once a step, whatever the number of micro-batches: the two gains of the stream."""
    assert per_layer(ranks, "preln")[1] == 2 * D * 4
    head_gains = 3 * (D // 4)
    assert per_layer(ranks, "hybridnorm")[1] == (head_gains + D) * 4


@pytest.mark.full
def test_four_ranks_gather_as_often(ranks: Any) -> None:
    for keep in (True, False):
        found, _ = per_layer(ranks, "preln", tp=4, keep_gathered=keep)
        assert found == {Message("all-gather", STREAM, 4): GATHERS[keep], Message("reduce-scatter", STREAM, 4): 4}


def test_the_table_of_the_docs(ranks: Any) -> None:
    text = table(ranks)
    print(text)
    assert "| preln, rmsnorm | kept | 4 x 1 sbd | 4 x 1 sbd | none |" in text.splitlines()
    assert (
        "| normformer, layernorm | gathered again | 6 x 1 sbd | 4 x 1 sbd | 2 x 1 sb + 1 x 2 sb |" in text.splitlines()
    )


@pytest.mark.parametrize("tp", thinned((2, 4), 2))
def test_messages_carry_the_same_bytes(ranks: Any, tp: int) -> None:
    """On the CPU: to each other rank of a gathered tensor this rank's share, of a scattered one that rank's share."""
    config = cases.config("preln", tp=tp, precision="fp32", keep_gathered=False)
    found = []
    for layers in (2, 3):
        every = ranks(tp).run(count, replace(config, model=replace(config.model, layers=layers)), native=False)
        assert all(answer == every[0] for answer in every)
        found.append(every[0][0])
    shares = (GATHERS[False] + 4) * (tp - 1)
    assert found[1] - found[0] == {Message(kind, STREAM // tp, 4): shares for kind in ("send", "recv")}
