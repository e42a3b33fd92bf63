"""Experts in every layout are experts on one rank: parity, checkpoints, Muon, and the way of tokens to them and back."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import pytest
import torch
from torch import Tensor

from megnorm.config import RunConfig
from megnorm.layers.dispatch import Dispatch
from megnorm.layers.router import biases
from megnorm.metrics.config import Probe
from megnorm.parallel.layout import full_tensor, named_matrices
from megnorm.plan import make_plan
from megnorm.train.build import Run, build, mesh_of
from megnorm.train.replicas import check_replicas
from megnorm.train.state import shards
from megnorm.train.step import train_step
from tests.checkpoint import test_reshard
from tests.distributed import cases, tiny
from tests.marks import thinned
from tools import parity

SCHEMES = ("preln", "postln", "deepnorm", "normformer", "hybridnorm_star")
SMALL = {"bucket_mb": 0.01}
LAYOUTS: dict[str, dict[str, Any]] = {
    "ep2": {"dp": 2, "ep": 2, **SMALL},
    "ep2 plain": {"dp": 2, "ep": 2, "zero": 0},
    "dp2": {"dp": 2, **SMALL},
    "pp2": {"pp": 2},
    "tp2": {"tp": 2},
    "tp2 without sp": {"tp": 2, "sequence_parallel": False},
    "ep2 tp2": {"dp": 2, "ep": 2, "tp": 2},
    "ep2 dp4": {"dp": 4, "ep": 2, **SMALL},
    "ep2 dp4 plain": {"dp": 4, "ep": 2, "zero": 0},
    "ep4": {"dp": 4, "ep": 4},
    "tp2 pp2": {"tp": 2, "pp": 2},
    "ep2 pp2": {"dp": 2, "ep": 2, "pp": 2},
    "pp2 interleaved ep2": {"dp": 2, "ep": 2, "pp": 2, "schedule": "interleaved", "virtual_stages": 2},
}
PLAIN = ("tp2", "pp2", "tp2 pp2", "dp2", "ep2", "ep2 tp2")  # every scheme in these is in the full set
MIXTURES = [name for name in cases.MIXTURES if name]
RECOMPUTE = ("", "block", "attention+norms+activations")
MODELS = tuple(cases.MODELS)
EVERY = [
    {
        "scheme": scheme,
        "layout": layout,
        "moe": MIXTURES[(i + j) % 3],
        "model": MODELS[(2 * j + j // 5 + 2) % 3],
        "recompute": RECOMPUTE[(i + j // 5) % 3],
    }
    for (i, scheme), (j, layout) in itertools.product(enumerate(SCHEMES), enumerate(LAYOUTS))
]
DEALT = [case for n, case in enumerate(EVERY) if (3 * (n // len(LAYOUTS)) + n + 1) % len(SCHEMES) == 0]
FAST = DEALT[::2]


def world(layout: str) -> int:
    sizes = LAYOUTS[layout]
    return int(sizes.get("tp", 1) * sizes.get("dp", 1) * sizes.get("pp", 1))


def check(ranks: Any, case: dict[str, Any], steps: int) -> None:
    case = dict(case)
    layout = case.pop("layout")
    config = cases.config(
        **{"dp": 1, "kind": "layernorm" if case["model"] == "gpt2" else "rmsnorm", **case, **LAYOUTS[layout]}
    )
    difference = ranks(world(layout)).run(parity.on_rank, config, steps)[0]
    assert difference.initial_equal
    assert difference.worst <= parity.TOLERANCE["fp64"], difference


def named(case: dict[str, Any]) -> str:
    return "-".join(value for value in case.values() if value).replace(" ", "_")


@pytest.mark.parametrize("case", thinned(FAST, 3), ids=named)
def test_a_layout_is_serial(ranks: Any, case: dict[str, Any]) -> None:
    check(ranks, case, 2)


def by_hand(case: dict[str, Any], full: bool) -> Any:
    return pytest.param(case, marks=pytest.mark.full if full else pytest.mark.exhaustive, id=named(case))


@pytest.mark.parametrize("case", [by_hand(case, case["layout"] in PLAIN or case in DEALT) for case in EVERY])
def test_every_scheme_in_every_layout(ranks: Any, case: dict[str, Any]) -> None:
    check(ranks, case, parity.SGD_STEPS)


def test_the_choice_covers_what_it_says() -> None:
    assert {case["scheme"] for case in FAST} == set(SCHEMES)
    for chosen in (EVERY, DEALT):
        assert {case["scheme"] for case in chosen} == set(SCHEMES)
        assert {case["layout"] for case in chosen} == set(LAYOUTS)
        for a, b in itertools.combinations(("moe", "model", "recompute"), 2):
            assert len({(case[a], case[b]) for case in chosen}) == 9, f"every {a} meets every {b}"


# The way to the experts


def routings(seed: int, t: int, k: int, experts: int) -> list[tuple[Tensor, Tensor | None]]:
    """(chosen, kept): random ones; all tokens to the same experts; some experts without tokens; some slots not kept; none."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(of: int) -> Tensor:
        return torch.stack([torch.randperm(of, generator=generator)[:k] for _ in range(t)]).view(t, k)

    some = torch.rand(t, k, generator=generator) < 0.6
    first, last = torch.arange(k).repeat(t, 1), experts - 1 - torch.arange(k).repeat(t, 1)
    found = [(drawn(experts), None), (first, None), (last, None), (drawn(k), None), (drawn(experts), some)]
    return [*found, (first, some), (drawn(experts), torch.zeros(t, k, dtype=torch.bool))]


def there_and_back(rank: int, world: int, k: int, experts: int) -> int:
    """Slots come back exactly as their experts had them, gradients too; every expert sees its own rows. How many were tried."""
    mesh = mesh_of(make_plan(cases.config("preln", moe="dropless", dp=world, ep=world), world), torch.device("cpu"))
    held, tried = experts // world, 0
    for seed in range(10):
        t = 1 + (seed + rank) % 7  # ranks need not have as many tokens
        for chosen, kept in routings(100 * seed + rank, t, k, experts):
            x = torch.randn(t, 3, dtype=torch.float64, requires_grad=True)
            way = Dispatch(chosen, kept, experts, mesh.ep)
            rows = way.send(x)
            assert len(rows) == int(way.counts.sum()) and len(way.counts) == held
            expert = torch.arange(rank * held, (rank + 1) * held).repeat_interleave(way.counts)
            assert torch.equal(way.send_slots(chosen)[:, 0], expert)
            slots = way.collect(torch.cat([rows, expert[:, None].to(rows)], -1))
            real = torch.ones_like(chosen, dtype=torch.bool) if kept is None else kept
            assert torch.equal(slots[real][:, :3], x[:, None].expand(t, k, 3)[real])
            assert torch.equal(slots[real][:, 3], chosen[real].to(x))
            assert not slots[~real].any()
            assert torch.equal(way.combine(rows), slots[..., :3].sum(1))
            slots[..., :3].sum().backward()
            assert torch.equal(x.grad, real.sum(1)[:, None].expand(t, 3).to(x))  # type: ignore[arg-type]
            tried += 1
    return tried


@pytest.mark.parametrize(("size", "experts", "k"), [(2, 6, 3), pytest.param(4, 4, 2, marks=pytest.mark.full)])
def test_dispatch_and_combine_are_inverses(ranks: Any, size: int, experts: int, k: int) -> None:
    assert ranks(size).run(there_and_back, k, experts) == [70] * size


def outputs(rank: int, world: int, config: RunConfig) -> Tensor:
    """Logits [s, b, v] of every rank's own tokens; its batch is that of its dp rank."""
    plan = make_plan(config, world)
    mesh = mesh_of(plan, torch.device("cpu"))
    (model,) = parity.build_stages(plan, mesh)[0].values()
    return model.eval().logits(parity.random_batch(config, 0, mesh.dp.rank).tokens)


@pytest.mark.parametrize("moe", MIXTURES)
def test_the_output_does_not_depend_on_ep(ranks: Any, moe: str) -> None:
    one, two = (ranks(2).run(outputs, cases.config("hybridnorm_star", moe=moe, dp=2, ep=ep)) for ep in (1, 2))
    for a, b in zip(one, two, strict=True):
        assert not torch.equal(one[0], one[1])
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def one_sided(rank: int, world: int, config: RunConfig) -> parity.Difference | None:
    """Biases that send all tokens to the first expert: the other ranks' experts get none."""
    build = parity.build_stages

    def biased(*args: Any) -> Any:
        stages, rng = build(*args)
        for _, bias in biases(*stages.values()):
            bias[0] = 10.0
        return stages, rng

    with mock.patch.object(parity, "build_stages", biased):
        return parity.on_rank(rank, world, config, 3)


@pytest.mark.parametrize(("zero", "shared_ffn"), (pytest.param(0, 8, marks=pytest.mark.full), (1, 0)))
def test_ranks_whose_experts_get_nothing(ranks: Any, zero: int, shared_ffn: int) -> None:
    """Without a shared expert nothing that is computed again lies behind the experts."""
    config = cases.config("normformer", moe="sigmoid", dp=2, ep=2, zero=zero, recompute="block")
    moe = replace(config.model.moe, top_k=1, normalize=False, shared_ffn=shared_ffn)
    difference = ranks(2).run(one_sided, replace(config, model=replace(config.model, moe=moe)))[0]
    assert difference.worst <= parity.TOLERANCE["fp64"], difference


# Training


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.write_data(tmp_path_factory.mktemp("experts") / "data")


def train(rank: int, world: int, config: RunConfig, steps: int) -> tuple[dict[str, Tensor], list[float], list[str]]:
    """Logical tensors of this rank's stages, the losses of the steps with those of routers, and what it would save."""
    run = build(make_plan(config, world), torch.device("cpu"))
    results = [train_step(run) for _ in range(steps)]
    run.flat.wait_weights()
    check_replicas(run.named, run.mesh, run.step)
    saved = [f"{shard.name}{shard.offset}" for shard in shards(run, owned=True)]
    return whole(run), [result.loss + result.routing["routing_loss"] for result in results], saved


def whole(run: Run) -> dict[str, Tensor]:
    held = named_matrices(*run.stages.values())
    found = {n.name: full_tensor(n, n.param.detach(), run.mesh) for n in held}
    return found | {name: bias.clone() for name, bias in biases(*run.stages.values())}


def run_config(data: str, moe: str, optimizer: str, micro_batch: int, **layout: Any) -> RunConfig:
    base = tiny.config(data, Path("unused"), "hybridnorm_star", steps=5, precision="fp64", moe=moe, **layout)
    train = replace(base.train, micro_batch=micro_batch)
    model = replace(base.model, moe=replace(base.model.moe, balance_over="sequence"))  # for any size of micro-batches
    return replace(base, model=model, optim=replace(base.optim, name=optimizer), train=train)  # type: ignore[arg-type]


TRAINED = [
    pytest.param(layout, moe, optimizer, marks=[] if (layout, moe) == ("ep2", "sigmoid") else pytest.mark.full)
    for layout in ("ep2", "ep2 plain", "ep2 tp2", "ep2 dp4 plain", "ep2 dp4", "ep2 pp2")
    for i, moe in enumerate(MIXTURES)
    for optimizer in (("adamw", "muon"), ("muon",), ("adamw",))[i]
]


@pytest.mark.full
@pytest.mark.parametrize(("layout", "moe", "optimizer"), TRAINED)
def test_training_is_that_of_one_rank(ranks: Any, data: str, layout: str, moe: str, optimizer: str) -> None:
    """Whatever the micro-batches: losses are means over sequences. Every slice is saved by one rank."""
    weights, losses, _ = ranks(1).run(train, run_config(data, moe, optimizer, 8, dp=1), 5)[0]
    answers = ranks(world(layout)).run(train, run_config(data, moe, optimizer, 2, **LAYOUTS[layout]), 5)
    found: dict[str, Tensor] = {}
    for rank_weights, rank_losses, _ in answers:
        assert rank_losses == pytest.approx(losses, rel=1e-10)
        for name, tensor in rank_weights.items():
            assert torch.equal(found.setdefault(name, tensor), tensor), f"replicas of {name} differ"
    assert set(found) == set(weights)
    for name, tensor in weights.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-8, atol=1e-10, msg=name)
    saved = [shard for _, _, of_rank in answers for shard in of_rank]
    assert len(saved) == len(set(saved))


def probed(rank: int, world: int, config: RunConfig) -> dict[str, float]:
    run = build(make_plan(config, world), torch.device("cpu"))
    return [train_step(run) for _ in range(2)][-1].probes


@pytest.mark.full
@pytest.mark.parametrize("layout", ("ep2", "ep2 plain", "pp2"))
def test_probes_are_those_of_one_rank(ranks: Any, data: str, layout: str) -> None:
    """Norms of gradients, weights and updates by matrix, layer and role, whoever holds the experts."""

    def config(**sizes: Any) -> RunConfig:
        base = run_config(data, "dropless", "adamw", 2, **sizes)
        return replace(base, metrics=replace(base.metrics, probes=get_args(Probe), probe_every=1))

    alone = ranks(1).run(probed, config(dp=1))[0]
    found = ranks(2).run(probed, config(**LAYOUTS[layout]))[0]
    assert any(name.startswith("grad_norm/blocks.1.ffn.experts.3.up") for name in found)
    assert set(found) == set(alone)
    for name, value in alone.items():
        assert found[name] == pytest.approx(value, rel=1e-6, abs=1e-12), name


RESHARDED = {
    "one": (1, ()),
    "ep2": (2, ("dp=2", "ep=2")),
    "ep2-tp2": (4, ("dp=2", "ep=2", "tp=2")),
    "dp4-ep2-odd": (4, ("dp=4", "ep=2", "bucket_mb=0.003")),
    "dp2-plain": (2, ("dp=2", "zero=0")),
    "ep2-plain": (2, ("dp=2", "ep=2", "zero=0")),
    "tp2": (2, ("tp=2",)),
    "pp2": (2, ("pp=2",)),
    "pp2-ep2": (4, ("pp=2", "dp=2", "ep=2")),
}


@pytest.fixture
def resharded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test of resharding, with these layouts and a mixture that has everything, biases too."""
    plain = test_reshard.overrides
    mixture = [f"model.moe.{key}={value}" for key, value in cases.MIXTURES["sigmoid"].items()]
    monkeypatch.setattr(test_reshard, "LAYOUTS", RESHARDED)
    monkeypatch.setattr(test_reshard, "overrides", lambda layout: plain(layout) + mixture)


@pytest.mark.full
def test_a_checkpoint_goes_on_in_other_layouts(ranks: Any, tmp_path: Path, resharded: None) -> None:
    test_reshard.check(ranks, tmp_path, "hybridnorm_star", {"pp2": ["ep2"], "one": ["pp2"], "ep2": ["one"]}, 2)


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(i, marks=pytest.mark.full if scheme in ("deepnorm", "hybridnorm_star") else pytest.mark.exhaustive)
        for i, scheme in enumerate(SCHEMES)
    ],
    ids=SCHEMES,
)
def test_every_layout_goes_on_from_every_other(ranks: Any, tmp_path: Path, resharded: None, number: int) -> None:
    """All pairs, dealt to the schemes."""
    pairs = {
        layout: [source for j, source in enumerate(RESHARDED) if (i + j) % len(SCHEMES) == number]
        for i, layout in enumerate(RESHARDED)
    }
    test_reshard.check(ranks, tmp_path, SCHEMES[number], pairs, 3)
