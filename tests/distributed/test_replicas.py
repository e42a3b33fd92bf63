"""What several ranks hold stays the same on all of them, bit for bit, through 50 steps of the real training loop."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megnorm.config import RunConfig
from megnorm.parallel.layout import named_matrices
from megnorm.plan import make_plan
from megnorm.train.build import Run, build
from megnorm.train.step import train_step
from tests.distributed import tiny
from tests.marks import thinned

STEPS = 50
Slice = tuple[str, str, tuple[int, ...], tuple[int, ...]]  # kind, name, offset, shape


def digest(x: Tensor) -> str:
    return hashlib.sha256(x.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def slices(run: Run) -> dict[Slice, str]:
    """A digest of everything that this rank holds of weights, masters and moments, by the logical slice it is."""
    run.flat.wait_weights()
    found = {}
    for n in named_matrices(*run.stages.values()):
        found["weight", n.name, n.matrix.offset, n.matrix.local] = digest(n.view())
    held = [("master", piece, piece.master) for piece in run.flat.pieces]
    held += [(state.kind, state.piece, state.tensor) for state in run.optimizer.states()]
    for kind, piece, tensor in held:
        for offset, view in piece.boxes(tensor):
            found[kind, piece.named.name, offset, tuple(view.shape)] = digest(view)
    return found


def train(rank: int, world: int, config: RunConfig, steps: int) -> tuple[dict[Slice, str], dict[Slice, str], float]:
    """(digests before, digests after, last loss) of this rank."""
    run = build(make_plan(config, world), torch.device("cpu"))
    before = slices(run)
    results = [train_step(run) for _ in range(steps)]
    return before, slices(run), results[-1].loss


def check(ranks: Any, folder: Path, scheme: str, *, steps: int = STEPS, **case: Any) -> dict[Slice, int]:
    """Train, and compare every slice over the ranks that hold it; how many hold each."""
    tp, dp = case.get("tp", 1), case.setdefault("dp", 1)
    data = tiny.write_data(folder / "data")
    config = tiny.config(data, folder / "run", scheme, steps=steps, **case)
    # Two micro-batches a step at most: each costs every collective once more.
    config = replace(config, train=replace(config.train, micro_batch=4))
    answers = ranks(tp * dp).run(train, config, steps)
    holders: dict[Slice, list[int]] = {}
    for rank, (_, after, _) in enumerate(answers):
        for place in after:
            holders.setdefault(place, []).append(rank)
    different = [
        (place, held) for place, held in holders.items() if len({answers[rank][1][place] for rank in held}) > 1
    ]
    assert not different, different[:5]
    before, after, loss = answers[0]
    still = [place for place in after if place[0] == "weight" and before[place] == after[place] and 0 not in place[3]]
    assert not still, f"training changed nothing in {still}"
    assert len({answer[2] for answer in answers}) == 1 and loss < 4.4, "the loss is one number, and falls from ln 97"
    return {place: len(held) for place, held in holders.items()}


def held_by(holders: dict[Slice, int], name: str) -> set[int]:
    """On how many ranks the weight slices of a logical tensor lie."""
    return {count for place, count in holders.items() if place[:2] == ("weight", name)}


EVERYTHING = ("normformer+post_projection+resscale", "gpt2", "layernorm")  # biases, positions, residual and head scales
HEADS = ("hybridnorm", "llama", "rmsnorm")  # head norms
WIDTHS = ("olmo2", "llama", "rmsnorm")  # k's gain is split, and replicated with its head


@pytest.mark.parametrize(
    ("scheme", "model", "kind", "precision"),
    [
        pytest.param(*EVERYTHING, "bf16", marks=pytest.mark.full),
        pytest.param(*WIDTHS, "fp32", marks=pytest.mark.full),
        pytest.param(*EVERYTHING, "fp32", marks=pytest.mark.full),
        pytest.param(*WIDTHS, "bf16", marks=pytest.mark.full),
        pytest.param(*HEADS, "fp32", marks=pytest.mark.full),
        pytest.param(*HEADS, "bf16", marks=pytest.mark.full),
    ],
)
def test_replicas_stay_equal(ranks: Any, tmp_path: Path, scheme: str, model: str, kind: str, precision: str) -> None:
    holders = check(ranks, tmp_path, scheme, model=model, kind=kind, precision=precision, tp=2, kv=1)
    assert held_by(holders, "blocks.0.attention.k.weight") == {2}
    assert held_by(holders, "blocks.0.attention.q.weight") == {1}
    if scheme == "hybridnorm":
        assert held_by(holders, "blocks.1.attention.q_norm.weight") == {2}
    if scheme == "olmo2":
        assert held_by(holders, "blocks.1.attention.k_norm.weight") == {2}
        assert held_by(holders, "blocks.1.attention.q_norm.weight") == {1}


def on_four_ranks() -> list[Any]:
    """Every combination: in the full set every pair of a model, a split of heads and a precision; the rest is exhaustive."""
    found = []
    for i, model in enumerate((EVERYTHING, HEADS, WIDTHS)):
        for j, split in enumerate(((1, True), (2, True), (1, False))):
            for k, precision in enumerate(("fp32", "bf16")):
                mark = pytest.mark.full if (i + j + k) % 2 == 0 else pytest.mark.exhaustive
                found.append(pytest.param(*model, *split, precision, marks=mark))
    return found


@pytest.mark.parametrize(("scheme", "model", "kind", "kv", "sequence_parallel", "precision"), on_four_ranks())
def test_replicas_stay_equal_on_four_ranks(
    ranks: Any, tmp_path: Path, scheme: str, model: str, kind: str, kv: int, sequence_parallel: bool, precision: str
) -> None:
    holders = check(
        ranks, tmp_path, scheme, model=model, kind=kind, precision=precision, tp=4, kv=kv,
        sequence_parallel=sequence_parallel,
    )  # fmt: skip
    assert held_by(holders, "blocks.0.attention.k.weight") == {4 // kv}
    assert held_by(holders, "blocks.0.attention.q.weight") == {1}


@pytest.mark.parametrize(("precision", "zero"), thinned((("bf16", 1), ("fp32", 1), ("bf16", 0)), 3))
def test_data_parallel_replicas_stay_equal(ranks: Any, tmp_path: Path, precision: str, zero: int) -> None:
    holders = check(ranks, tmp_path, "hybridnorm", precision=precision, dp=2, zero=zero)
    assert {count for place, count in holders.items() if place[0] == "weight"} == {2}
    assert {count for place, count in holders.items() if place[0] != "weight"} == {2 - zero}


@pytest.mark.full
@pytest.mark.parametrize("precision", ("fp32", "bf16"))
def test_replicas_stay_equal_in_both_directions(ranks: Any, tmp_path: Path, precision: str) -> None:
    holders = check(ranks, tmp_path, "hybridnorm", precision=precision, tp=2, dp=2, kv=1)
    assert held_by(holders, "blocks.0.attention.k.weight") == {4}
    assert held_by(holders, "blocks.0.attention.q.weight") == {2}


@pytest.mark.parametrize("layout", ({"dp": 2}, {"tp": 2}))
def test_uneven_loss_masks_weigh_by_tokens(ranks: Any, tmp_path: Path, layout: dict[str, int]) -> None:
    """The training step itself: rows with fewer tokens under the loss weigh less, on any number of ranks."""
    data = tiny.write_data(tmp_path / "data")
    alone = ranks(1).run(train, tiny.config(data, tmp_path, steps=5, precision="fp64", dp=1), 5)[0][2]
    loss = ranks(2).run(train, tiny.config(data, tmp_path, steps=5, precision="fp64", **layout), 5)[0][2]
    assert abs(loss - alone) < 1e-9 * alone
