"""Packed rows equal separate rows: losses and gradients in float64, attention included, also under tensor parallelism."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megnorm.config import RunConfig
from megnorm.data.config import DataConfig
from megnorm.models.causal import Tokens
from megnorm.parallel.layout import full_tensor, named_matrices
from megnorm.parallel.mesh import Mesh
from megnorm.plan import Plan, make_plan
from megnorm.train.build import build_stages, flatten, mesh_of, open_data
from megnorm.train.rows import micro_batches
from tests.data.helpers import numbered
from tests.distributed import cases
from tests.distributed.pool import Pool
from tools.parity import serial_of

ROWS = 8


def gradients(plan: Plan, mesh: Mesh, parts: list[Tokens]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The loss of every part, and the gradient of their sum as full logical tensors."""
    stages, _ = build_stages(plan, mesh)
    flat = flatten(plan, mesh, stages)
    flat.zero()
    losses = []
    for part in parts:
        loss = stages[0](part)
        loss.backward()
        losses.append(loss.detach())
    flat.finish()
    return losses, {n.name: full_tensor(n, n.param.main_grad, mesh) for n in named_matrices(*stages.values())}


def separate(config: RunConfig, parts: list[Tokens]) -> list[Tokens]:
    """Each document piece of packed rows as a batch of its own, with positions counted by the model."""
    found = []
    for part in parts:
        columns = (part.tokens, part.labels, part.loss_mask)
        pieces = zip(*(column.split(part.documents) for column in columns), strict=True)
        found += [Tokens(*piece) for piece in pieces]
    return found


def worst_difference(rank: int, world: int, config: RunConfig) -> float:
    """The largest relative difference of losses and gradients; tools/parity.py measures in the same way."""
    plan = make_plan(config, world)
    batch = open_data(plan, "train").batch(0, ROWS)
    packed = list(micro_batches(batch, config.train, torch.device("cpu")))
    assert len(packed) == ROWS // config.train.micro_batch and max(len(part.documents) for part in packed) > 4
    losses, grads = gradients(plan, mesh_of(plan, torch.device("cpu")), packed)
    alone, wanted = gradients(make_plan(serial_of(config), 1), Mesh(), separate(config, packed))
    counts = [len(part.documents) for part in packed]
    sums = [
        torch.stack(part).sum() for part in [alone[sum(counts[:i]) : sum(counts[: i + 1])] for i in range(len(counts))]
    ]
    found = [float((a - b).abs() / b) for a, b in zip(losses, sums, strict=True)]
    whole = float(torch.stack([grad.norm() for grad in wanted.values()]).norm())
    for name, grad in wanted.items():
        found.append(float((grads[name] - grad).norm()) / max(float(grad.norm()), 1e-3 * whole))
    return max(found)


def config(path: str, order: str, model: str, **parallel: object) -> RunConfig:
    base = cases.config("hybridnorm", kind="layernorm", model=model, **parallel)
    data = DataConfig(path=path, split=(1, 0, 0), order=order, separate_documents=True)
    train = replace(base.train, sequence_length=16, micro_batch=2, global_batch=ROWS, eval_batches=0)
    return replace(base, data=data, train=train)


@pytest.mark.parametrize("order", ("default", "megatron"))
@pytest.mark.parametrize("model", ("gpt2", "llama"))
def test_packed_rows_equal_separate_rows(tmp_path: Path, order: str, model: str) -> None:
    path = numbered(tmp_path / "x", 600, documents=90, vocab=97)
    assert worst_difference(0, 1, config(path, order, model)) < 1e-10


@pytest.mark.parametrize(
    "layout", ({"tp": 2}, pytest.param({"tp": 2, "sequence_parallel": False}, marks=pytest.mark.full))
)
def test_packed_rows_equal_separate_rows_across_ranks(
    tmp_path: Path, ranks: Callable[[int], Pool], layout: dict[str, object]
) -> None:
    path = numbered(tmp_path / "x", 600, documents=90, vocab=97)
    for model in ("gpt2", "llama"):
        assert max(ranks(2).run(worst_difference, config(path, "default", model, **layout))) < 1e-10
