"""Muon's mathematics and the dealing of matrices; one rank is torch.optim.Muon on every logical matrix."""

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from megnorm.config import ConfigError, RunConfig, load
from megnorm.optim.config import MuonConfig
from megnorm.optim.muon import deal, flops, iteration_dtype, orthogonalize, update_scale
from megnorm.plan import make_plan
from megnorm.train.build import Run, build
from megnorm.train.step import train_step
from tests.distributed import tiny

SHAPES = ((8, 8), (16, 40), (24, 96))
needs_torchs = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon of its own")


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32, torch.float64))
@pytest.mark.parametrize("shape", SHAPES)
def test_singular_vectors_stay_and_values_come_near_one(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    got = orthogonalize(x.to(dtype), 5).double()
    inside = u.mT @ got @ v.mT  # diagonal where the singular vectors are kept
    off = inside - torch.diag_embed(inside.diagonal(dim1=-2, dim2=-1))
    assert float(off.abs().max()) < (1e-12 if dtype == torch.float64 else 1e-4 if dtype == torch.float32 else 0.05)
    large = s > 0.02 * x.norm(dim=(-2, -1))[:, None]
    values = inside.diagonal(dim1=-2, dim2=-1)[large]
    assert float(values.min()) > 0.6 and float(values.max()) < 1.25
    assert not orthogonalize(torch.zeros(1, *shape), 5).any(), "no gradient, no update"


def test_the_rms_rule_gives_updates_of_adamw_s_size() -> None:
    """arXiv:2502.16982: an orthogonal matrix times 0.2 sqrt(max) has root mean square 0.2, whatever its shape."""
    for rows, columns in ((64, 64), (32, 128), (128, 32)):
        q = torch.linalg.qr(torch.randn(max(rows, columns), min(rows, columns), dtype=torch.float64))[0]
        assert float((update_scale("rms", (rows, columns)) * q).square().mean().sqrt()) == pytest.approx(0.2)
    assert update_scale("shape", (128, 32)) == 2.0 and update_scale("shape", (32, 128)) == 1.0


def test_the_precision_of_the_iteration() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for precision, device, master, want in (
        ("auto", cpu, torch.float64, torch.float64),
        ("auto", cpu, torch.float32, torch.float32),
        ("auto", cuda, torch.float32, torch.bfloat16),
        ("bf16", cpu, torch.float32, torch.bfloat16),
        ("master", cuda, torch.float32, torch.float32),
    ):
        assert iteration_dtype(MuonConfig(precision=precision), master, device) is want  # type: ignore[arg-type]


def _run(folder: Path, **options: Any) -> Run:
    data = tiny.write_data(folder / "data")
    base = tiny.config(data, folder, "preln", steps=5, precision="fp64", kv=1, dp=1)
    config: RunConfig = replace(base, optim=replace(base.optim, name="muon", **options))
    return build(make_plan(config, 1), torch.device("cpu"))


@needs_torchs
@pytest.mark.parametrize(
    ("options", "rule"),
    [
        (MuonConfig(), "match_rms_adamw"),
        (MuonConfig(momentum=0.9, nesterov=False, ns_steps=3, scale="shape", rate=2.0), "original"),
    ],
)
def test_one_rank_is_torchs_muon_on_logical_matrices(tmp_path: Path, options: MuonConfig, rule: str) -> None:
    run = _run(tmp_path, muon=options, rate={"down": 0.5}, decay={"k": 0.0})
    config = run.plan.config.optim
    theirs: dict[str, nn.Parameter] = {}
    groups, adamws = [], []
    for piece in run.flat.pieces:
        name, matrix = piece.named.name, piece.named.matrix
        theirs[name] = nn.Parameter(piece.master.clone().view(matrix.local))
        if matrix.role in ("q", "k", "v", "o", "up", "gate", "down"):
            rate = options.rate * config.rate.get(matrix.role, 1.0)
            groups.append({"params": [theirs[name]], "weight_decay": config.decay_of(matrix.role), "rate": rate})
        else:
            adamws.append(name)
    assert len(groups) == 14 and len(adamws) == 7  # of two layers; embedding, head, five norms
    torchs = torch.optim.Muon(
        groups, momentum=options.momentum, nesterov=options.nesterov, ns_steps=options.ns_steps, adjust_lr_fn=rule
    )
    step = run.optimizer.step

    def both(lr: float) -> None:
        for piece in run.flat.pieces:
            theirs[piece.named.name].grad = piece.grad.clone().view(piece.named.matrix.local)
        for group in torchs.param_groups:
            group["lr"] = lr * group["rate"]
        with mock.patch.object(torch.Tensor, "bfloat16", Tensor.clone):  # torch's iterates in bf16 alone
            torchs.step()
        step(lr)

    with mock.patch.object(run.optimizer, "step", both):
        for _ in range(5):
            train_step(run)
    for piece in run.flat.pieces:
        name, mine = piece.named.name, piece.master.view(piece.named.matrix.local)
        if name in adamws:
            assert not torch.equal(mine, theirs[name]), f"AdamW has not moved {name}"
        else:
            torch.testing.assert_close(mine, theirs[name].detach(), rtol=0.0, atol=1e-14)


@needs_torchs
def test_one_matrix_in_bf16_is_torchs() -> None:
    """The iteration in bf16 as torch's, so their difference is at most its rounding."""
    from torch.optim._muon import _zeropower_via_newtonschulz as theirs

    for shape in SHAPES:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
        want = theirs(x, (3.4445, -4.7750, 2.0315), 5, 1e-7)
        torch.testing.assert_close(orthogonalize(x[None].bfloat16(), 5)[0], want, rtol=0.0, atol=2e-2)


@settings(max_examples=50)
@given(
    st.lists(st.tuples(st.integers(1, 64), st.integers(1, 64)), max_size=40), st.integers(1, 9), st.integers(1, 5000)
)
def test_matrices_are_dealt_evenly(shapes: list[tuple[int, int]], ranks: int, limit: int) -> None:
    named: dict[str, tuple[int, ...]] = {f"m{i}": shape for i, shape in enumerate(shapes)}
    rounds = deal(named, ranks, limit)
    assert sorted(name for dealt in rounds for name in dealt) == sorted(named), "each once"
    loads = [0] * ranks
    for dealt in rounds:
        for name, rank in dealt.items():
            loads[rank] += flops(named[name])
        elements = [named[name][0] * named[name][1] for name in dealt]
        assert sum(elements) - elements[-1] < limit * ranks, "a round ends where it is full"
    if shapes:
        assert max(loads) <= sum(loads) / ranks + max(flops(shape) for shape in shapes)


@pytest.mark.parametrize(
    "override", ("optim.muon.momentum=1.0", "optim.muon.ns_steps=0", "optim.muon.rate=-1", "optim.muon.rate=.nan")
)
def test_numbers_without_meaning_are_refused(override: str) -> None:
    with pytest.raises(ConfigError, match=override.split("=")[0]):
        load(None, [override])
    with pytest.raises(ConfigError, match=r"optim\.name"):
        load(None, ["optim.name=moun"])
