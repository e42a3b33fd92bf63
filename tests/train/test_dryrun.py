"""Memory by rank, counted without ranks: as real ranks hold it, and even for a model of 175 billion parameters."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from megnorm import config as configs
from megnorm.cli import main
from megnorm.optim.muon import takes
from megnorm.parallel.mesh import Axis, Mesh
from megnorm.plan import make_plan
from megnorm.train.build import build_stages, flatten
from megnorm.train.dryrun import memory
from tests.distributed import cases
from tests.marks import thinned

GPT_175B = (
    "model.layers=96", "model.width=12288", "model.heads=96", "model.ffn=49152", "model.vocab_size=50257",
    "model.max_positions=2048", "model.positions=learned", "model.activation=gelu", "model.bias=true",
    "model.tied_head=true", "model.norm.kind=layernorm", "train.global_batch=2048", "train.micro_batch=1",
    "train.sequence_length=2048", "train.precision=bf16", "train.eval_batches=0", "parallel.tp=8", "parallel.pp=16",
)  # fmt: skip


def test_the_fullest_rank_of_175b_is_not_10_percent_above_the_mean_of_its_stage() -> None:
    plan = make_plan(configs.load(None, list(GPT_175B)), 8 * 16 * 128)
    places = list(memory(plan))
    assert {(place.pp, place.tp) for place in places} == {(p, t) for p in range(16) for t in range(8)}
    assert sum(place.weights for place in places) == pytest.approx(2 * plan.parameters, rel=0.005)  # 2 bytes each
    for pp in range(16):
        stage = [place for place in places if place.pp == pp]
        assert all(len(place.state) == 128 for place in stage)
        totals = np.array([place.totals for place in stage])
        assert totals.max() <= 1.1 * totals.mean()
        state = np.array([place.state for place in stage])  # it must be even by itself too: the rest hides it
        assert state.max() <= 1.1 * state.mean()
        assert state.sum() == pytest.approx(12 * sum(place.grads for place in stage) / 4, rel=0.005)  # 12 bytes each


@pytest.mark.parametrize(
    ("precision", "optimizer"), thinned([("bf16", "adamw"), ("fp32", "adamw"), ("bf16", "muon")], 3)
)
@pytest.mark.parametrize(
    "layout",
    [
        {"tp": 2, "pp": 2, "dp": 3, "model": "gpt2"},
        {"pp": 2, "dp": 2, "schedule": "interleaved", "virtual_stages": 2},
        {"tp": 4, "dp": 2, "kv": 2, "model": "fairseq"},
        {"dp": 3, "zero": 0},
        {"dp": 4, "ep": 2, "tp": 2, "moe": "sigmoid"},
        {"dp": 4, "ep": 2, "pp": 2, "moe": "capacity", "zero": 0},
    ],
    ids=str,
)
def test_it_is_what_ranks_hold(layout: dict[str, Any], precision: str, optimizer: str) -> None:
    """Against flat storage and pieces as a run builds them, for every rank."""
    base = cases.config("normformer", precision=precision, bucket_mb=0.004, **layout)
    world = base.parallel.tp * base.parallel.pp * (base.parallel.dp or 1)
    base = replace(
        base,
        model=replace(base.model, layers=4),
        train=replace(base.train, global_batch=24),
        optim=replace(base.optim, name=optimizer),  # type: ignore[arg-type]
    )
    plan = make_plan(base, world)
    replicas = max(1, base.parallel.tp // base.model.kv)
    for place in memory(plan):
        for rank, total in enumerate(place.totals):
            mesh = Mesh(
                pp=Axis("pp", base.parallel.pp, place.pp),
                dp=Axis("dp", plan.dp, rank),
                tp=Axis("tp", base.parallel.tp, place.tp),
                kv=Axis("kv", replicas, place.tp % replicas),
                ep=Axis("ep", base.parallel.ep, rank % base.parallel.ep),
                edp=Axis("edp", plan.dp // base.parallel.ep, rank // base.parallel.ep),
                sequence_parallel=plan.sequence_parallel,
            )
            stages, _ = build_stages(plan, mesh)
            flat = flatten(plan, mesh, stages)
            assert tuple(stages) == place.stages
            one = [optimizer == "muon" and takes(piece.named.matrix) for piece in flat.pieces]
            moments = sum((2 - less) * p.master.nbytes for p, less in zip(flat.pieces, one, strict=True))
            masters = {m.untyped_storage()._cdata: m.untyped_storage().nbytes() for m in flat._masters}
            masters.pop(flat.weights.untyped_storage()._cdata, None)
            assert total == flat.weights.nbytes + flat.grads.nbytes + moments + sum(masters.values())


def test_the_plan_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = [
        "model.layers=2",
        "model.width=64",
        "model.heads=4",
        "model.ffn=128",
        "parallel.pp=2",
        "train.global_batch=16",
    ]
    assert main(["plan", "--ranks", "4", "--memory", *sizes, "train.precision=bf16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("memory in GB") for line in lines)
    first = next(line for line in lines if line.startswith("  pipeline rank 0")).split()
    assert float(first[-2]) == pytest.approx(sum(map(float, first[3:6])), abs=0.002)
