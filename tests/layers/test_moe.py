"""Router, dispatch and experts on one rank: exact inverses, capacity, losses, loads, what a token depends on."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megnorm import config as configs
from megnorm.cli import main
from megnorm.kernels import registry
from megnorm.kernels.registry import Need
from megnorm.layers import router
from megnorm.layers.dispatch import Dispatch, Routing
from megnorm.layers.env import Env
from megnorm.layers.moe import Experts, MoE
from megnorm.layers.recompute import Recompute
from megnorm.metrics.throughput import flops_per_token
from megnorm.models.causal import CausalLM, Tokens, build_model
from megnorm.models.config import ModelConfig, MoEConfig
from megnorm.models.count import active_parameters, count_parameters
from megnorm.norms.resolve import resolve
from megnorm.parallel.layout import named_matrices
from megnorm.parallel.mesh import Axis
from megnorm.plan import make_plan, unit_costs
from tests.distributed import cases
from tests.layers.tiny import MODES, Model, batches, config, differences, step

EXAMPLES = Path(__file__).resolve().parent.parent.parent / "examples" / "moe"
CPU = torch.device("cpu")
MIXTURES = [name for name in cases.MIXTURES if name]


# The way to the experts and back


@st.composite
def routed(draw: Any) -> tuple[Tensor, Tensor | None, int]:
    """(chosen [t, k], kept, experts), from even to all tokens at the same experts."""
    experts, t = draw(st.integers(1, 9)), draw(st.integers(0, 12))
    k = draw(st.integers(1, experts))
    among = draw(st.integers(k, experts))  # experts that get any
    rows = draw(st.lists(st.permutations(range(among)), min_size=t, max_size=t))
    chosen = torch.tensor([row[:k] for row in rows], dtype=torch.int64).view(t, k)
    kept = draw(st.one_of(st.none(), st.lists(st.booleans(), min_size=t * k, max_size=t * k)))
    return chosen, None if kept is None else torch.tensor(kept, dtype=torch.bool).view(t, k), experts


@given(routed(), st.sampled_from((torch.float64, torch.bfloat16)))
@settings(max_examples=200)
def test_dispatch_and_collect_are_inverses(case: tuple[Tensor, Tensor | None, int], dtype: torch.dtype) -> None:
    chosen, kept, experts = case
    t, k = chosen.shape
    way = Dispatch(chosen, kept, experts, Axis("ep"))
    x = torch.randn(t, 5).to(dtype).requires_grad_()
    rows = way.send(x)
    real = torch.ones_like(chosen, dtype=torch.bool) if kept is None else kept
    assert way.counts.tolist() == [int((chosen[real] == e).sum()) for e in range(experts)]
    for e, part in enumerate(rows.split(way.counts.tolist())):
        assert torch.equal(part, x[(real & (chosen == e)).any(1)]), "an expert gets its tokens, in their order"
    assert torch.equal(way.send_slots(chosen)[:, 0], torch.arange(experts).repeat_interleave(way.counts))
    slots = way.collect(rows)
    assert torch.equal(slots, x[:, None].expand(t, k, 5) * real[..., None])
    torch.testing.assert_close(way.combine(rows), slots.sum(1))
    grad = torch.randn(t, k, 5).to(dtype)
    slots.backward(grad)
    assert torch.equal(x.grad, (grad * real[..., None]).sum(1))  # type: ignore[arg-type]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=6), st.integers(1, 4), st.integers(1, 5))
@settings(max_examples=50)
def test_every_offer_of_grouped_products(counts: list[int], rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(sum(counts))
    x = torch.randn(sum(counts), columns, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(len(counts), rows, columns, dtype=torch.float64, generator=generator, requires_grad=True)
    wanted = torch.cat([F.linear(part, w) for part, w in zip(x.split(counts), weight, strict=True)])
    grad = torch.randn(wanted.shape, dtype=torch.float64, generator=generator)
    dx, dw = torch.autograd.grad(wanted, (x, weight), grad)
    need = Need("grouped_gemm", "cpu", torch.float64)
    for offer in registry.offers("grouped_gemm"):
        if offer.refuse(need) is None:
            y = offer.make(need)(x, weight, torch.tensor(counts))
            torch.testing.assert_close(y, wanted)
            torch.testing.assert_close(torch.autograd.grad(y, (x, weight), grad), (dx, dw))


# Capacity


@given(st.integers(0, 9), st.sampled_from((0.3, 0.5, 1.0, 1.3)), st.booleans())
@settings(max_examples=40)
def test_capacity_is_a_sequence_s_own(seed: int, capacity: float, padded: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    s, b, k, experts = 10, 3, 2, 4
    real = torch.rand(s, b, generator=generator) < 0.7 if padded else None
    chosen = torch.stack([torch.randperm(experts, generator=generator)[:k] for _ in range(s * b)])
    kept = Routing.of((s, b), CPU, real=real).kept(chosen, experts, capacity)
    assert kept is not None
    exists = torch.ones(s, b, dtype=torch.bool) if real is None else real
    for column in range(b):
        room = max(1, -int(-(round(capacity * k * 1000) * int(exists[:, column].sum())) // (experts * 1000)))
        taken = [0] * experts
        for i in range(s):
            for slot in range(k):
                e = int(chosen[i * b + column, slot])
                taken[e] += bool(exists[i, column])
                assert bool(kept[i * b + column, slot]) == (bool(exists[i, column]) and taken[e] <= room)


@pytest.mark.parametrize("moe", MIXTURES)
def test_no_token_depends_on_later_ones_or_other_sequences(moe: str) -> None:
    cfg = cases.config("hybridnorm_star", moe=moe).model
    model = build_model(cfg, Env(dtype=torch.float64), seed=2)
    tokens = torch.randint(0, 97, (8, 2), generator=torch.Generator().manual_seed(1))
    other = tokens.clone()
    other[5:, 0], other[:, 1] = (tokens[5:, 0] + 1) % 97, (tokens[:, 1] + 7) % 97
    a, b = model.logits(tokens), model.logits(other)
    torch.testing.assert_close(a[:5, 0], b[:5, 0], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(a[5:], b[5:])


def test_what_finds_no_room_is_counted() -> None:
    cfg = cases.config("preln", moe="capacity", model="fairseq").model
    model = build_model(replace(cfg, layers=3), Env(dtype=torch.float64), seed=2)
    tokens = torch.randint(2, 97, (8, 2), generator=torch.Generator().manual_seed(1))
    tokens[5:, 1] = cfg.padding_id  # type: ignore[call-overload]
    served: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, MoE):
            module.experts.register_forward_hook(lambda module, inputs, output: served.append(inputs[2].sum()))
    model(Tokens(tokens, tokens, torch.ones(8, 2)))
    total = router.loads(model.env.mesh, model)
    slots = 2 * 13 * cfg.moe.top_k  # of two sparse layers
    lost = slots - int(torch.stack(served).sum())
    assert lost > 0 and router.dropped(total, model.env.mesh, model) == pytest.approx(lost / slots)


def test_packed_documents_are_sequences() -> None:
    """Losses and capacity of packed rows are those of the documents one by one."""
    cfg = cases.config("preln", moe="capacity").model
    cfg = replace(cfg, moe=replace(cfg.moe, balance_loss=0.4, balance_over="sequence"))
    model = build_model(cfg, Env(dtype=torch.float64), seed=2)
    tokens = torch.randint(0, 97, (12, 1), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(12) % 3 > 0).double()[:, None]
    positions = torch.cat([torch.arange(5), torch.arange(7)])[:, None]
    packed = model(Tokens(tokens, tokens, mask, positions, (5, 7)))
    alone = [model(Tokens(t, t, m)) for t, m in zip(tokens.split((5, 7)), mask.split((5, 7)), strict=True)]
    for whole, parts in zip(packed, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(whole, sum(parts), rtol=1e-12, atol=0.0)


def test_padding_goes_to_no_expert() -> None:
    cfg = replace(cases.config("preln", moe="dropless", model="fairseq").model, layers=1)
    model = build_model(cfg, Env(dtype=torch.float64), seed=2)
    tokens = torch.randint(2, 97, (8, 2), generator=torch.Generator().manual_seed(1))
    tokens[5:, 1] = cfg.padding_id  # type: ignore[call-overload]
    seen: list[Tensor] = []
    experts = next(module for module in model.modules() if isinstance(module, MoE)).experts
    experts.register_forward_hook(lambda module, inputs, output: seen.append(inputs[2]))
    model.logits(tokens)
    assert int(seen[0].sum()) == 13 * cfg.moe.top_k
    (load,) = [found.load for _, found in router.routers(model)]
    assert load.sum() == 13 * cfg.moe.top_k


# Losses and loads


def test_the_losses_do_not_depend_on_micro_batches() -> None:
    cfg = cases.config("preln", moe="dropless").model
    model = build_model(cfg, Env(dtype=torch.float64), seed=2)
    generator = torch.Generator().manual_seed(1)
    tokens, mask = (
        torch.randint(0, 97, (8, 4), generator=generator),
        (torch.rand(8, 4, generator=generator) < 0.5).double(),
    )
    whole = model(Tokens(tokens, tokens, mask))[1]
    parts = [model(Tokens(t, t, m))[1] for t, m in zip(tokens.split(1, 1), mask.split(1, 1), strict=True)]
    torch.testing.assert_close(whole, sum(parts), rtol=1e-12, atol=0.0)
    model = build_model(
        replace(cfg, moe=replace(cfg.moe, balance_over="micro_batch")), Env(dtype=torch.float64), seed=2
    )
    whole = model(Tokens(tokens, tokens, mask))[1]
    parts = [model(Tokens(t, t, m))[1] for t, m in zip(tokens.split(1, 1), mask.split(1, 1), strict=True)]
    assert abs(float((whole - sum(parts)).detach())) > 1e-3 * float(whole.detach())
    assert isinstance(model.eval()(Tokens(tokens, tokens, mask)), Tensor), "an evaluation is the loss of tokens alone"


@pytest.mark.parametrize("over", ["sequence", "micro_batch"])
def test_layers_balanced_together(over: str) -> None:
    """E sum_e f_e P_e of shares and scores that are means over the layers; recomputed blocks leave the same."""
    cfg = cases.config("preln", moe="dropless").model
    moe = replace(cfg.moe, balance_over=over, balance_across="layers", balance_loss=0.7, z_loss=0.0)
    cfg = replace(cfg, moe=moe)
    model = build_model(cfg, Env(dtype=torch.float64), seed=2)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 97, (8, 3), generator=generator)
    mask = (torch.rand(8, 3, generator=generator) < 0.5).double()
    logits: list[Tensor] = []
    for _, one in router.routers(model):
        one.register_forward_hook(lambda one, inputs, out: logits.append(inputs[0] @ one.weight.t()))
    found = model(Tokens(tokens, tokens, mask))[1]
    assert len(logits) == cfg.sparse_layers > 1
    p = torch.stack(logits).softmax(-1)  # [layers, s, b, experts]
    picked = torch.zeros_like(p).scatter_(-1, p.topk(moe.top_k).indices, 1.0) / moe.top_k
    kept = (0, 1) if over == "sequence" else (0, 1, 2)
    balance = moe.experts * (picked.mean(kept) * p.mean(kept)).sum(-1)
    weight = mask.sum(0) if over == "sequence" else mask.sum()
    wanted = 0.7 * (balance * weight).sum()
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0.0)
    weights = [one.weight for _, one in router.routers(model)]
    grads = torch.autograd.grad(found, weights, retain_graph=True)
    for ours, theirs in zip(grads, torch.autograd.grad(wanted, weights), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)
    again = build_model(cfg, Env(dtype=torch.float64, recompute=Recompute(("block",))), seed=2)
    sum(again(Tokens(tokens, tokens, mask))).backward()
    sum(model(Tokens(tokens, tokens, mask))).backward()
    for ours, theirs in zip(again.parameters(), model.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None and torch.equal(ours.grad, theirs.grad)


def test_an_even_router_has_balance_one() -> None:
    cfg = ModelConfig(layers=1, width=8, heads=1, ffn=8, vocab_size=16, moe=MoEConfig(4, 1, balance_loss=1.0))
    gate = router.Router(cfg, Env(dtype=torch.float64))
    gate.weight.data = torch.eye(4, 8, dtype=torch.float64) * 50
    routing = Routing.of((4, 2), CPU, loss_mask=torch.ones(4, 2))
    even = torch.eye(8, dtype=torch.float64)[torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0]])]
    gate(even, routing)
    torch.testing.assert_close(routing.losses[0], torch.tensor(8.0, dtype=torch.float64))  # 8 tokens, 1 each
    gate(even[:1].expand(4, 2, 8), routing)  # all tokens of a sequence at one of four experts
    torch.testing.assert_close(routing.losses[1], torch.tensor(32.0, dtype=torch.float64))
    assert gate.load.tolist() == [2 + 4, 2 + 4, 2, 2]


def test_biases_move_against_the_loads_and_steer_the_choice_alone() -> None:
    cfg = cases.config("preln", moe="sigmoid").model
    model = build_model(cfg, Env(dtype=torch.float64), seed=2)
    tokens = torch.randint(0, 97, (8, 2), generator=torch.Generator().manual_seed(1))
    model(Tokens(tokens, tokens, torch.ones(8, 2)))
    mesh = model.env.mesh
    total = router.loads(mesh, model)
    assert total is not None and total.shape == (2, 4) and total.sum(1).tolist() == [48.0, 48.0]
    router.update_biases(total, model)
    for load, (_, bias) in zip(total, router.biases(model), strict=True):
        assert torch.equal(bias, -0.05 * torch.sign(load - 12).float())
    assert router.fullest(total, mesh) == float(total.max()) / 12 and router.dropped(total, mesh, model) == 0.0
    router.reset_loads(model)
    assert not router.loads(mesh, model).any()  # type: ignore[union-attr]
    _, gate = next(router.routers(model))
    u = torch.randn(8, 2, 32, dtype=torch.float64)
    gate.bias.copy_(torch.tensor([0.0, 0.0, 0.0, -10.0]))
    weights, chosen = gate.eval()(u, Routing.of((8, 2), CPU))
    assert sorted(set(chosen.flatten().tolist())) == [0, 1, 2]
    scores = F.linear(u, gate.weight).flatten(0, 1).sigmoid().gather(1, chosen)
    torch.testing.assert_close(weights, 1.5 * scores / scores.sum(1, keepdim=True))


def test_scores_are_taken_in_fp32() -> None:
    cfg = cases.config("preln", moe="dropless").model
    gate = router.Router(cfg, Env(dtype=torch.bfloat16))
    gate.weight.data.normal_(generator=torch.Generator().manual_seed(1))
    u = torch.randn(8, 2, 32, generator=torch.Generator().manual_seed(2)).bfloat16()
    weights, _ = gate(u, Routing.of((8, 2), CPU))
    exact = F.linear(u.double(), gate.weight.double()).softmax(-1).flatten(0, 1).topk(2).values
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.double(), exact, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("moe", MIXTURES)
@pytest.mark.parametrize("scheme", ("normformer", "hybridnorm_star"))
def test_recompute_changes_nothing(scheme: str, moe: str) -> None:
    cfg = config(scheme, moe=moe)
    models = [Model.build(cfg, modes) for modes in ((), *MODES)]
    plain, *others = (step(model, batches(cfg), interleaved=True) for model in models)
    for modes, again in zip(MODES, others, strict=True):
        assert not differences(plain, again), modes
    first, *rest = ([found.load for _, found in router.routers(model.net)] for model in models)
    assert all(torch.equal(a, b) for loads in rest for a, b in zip(first, loads, strict=True)), "counted once"


@pytest.mark.parametrize("counts", ((3, 0, 2, 0), (0, 0, 0, 0)))
def test_an_expert_without_tokens_asks_no_norm_to_start_for_none(counts: tuple[int, ...]) -> None:
    """Its gradients are zero, not absent: sums over ranks wait for all of them."""
    cfg = cases.config("normformer", moe=MIXTURES[0]).model
    model = build_model(cfg, Env(dtype=torch.float64))
    experts = next(module for module in model.modules() if isinstance(module, Experts))
    assert len(experts.norms) == len(counts)
    met: list[int] = []
    for norm in experts.norms:
        norm.register_forward_pre_hook(lambda _, given: met.append(len(given[0])))
    x = torch.randn(sum(counts), cfg.width, dtype=torch.float64)
    y = experts(x, torch.ones(len(x), 1, dtype=torch.float64), torch.tensor(counts))
    assert met == [max(n, 1) for n in counts] and y.shape == x.shape
    y.sum().backward()
    for norm, n in zip(experts.norms, counts, strict=True):
        for param in norm.parameters():
            assert param.grad is not None and bool(param.grad.any()) == (n > 0)
    assert experts.up.weight.grad is not None and experts.down.weight.grad is not None


# Sizes


@pytest.mark.parametrize("moe", MIXTURES)
@pytest.mark.parametrize("scheme", ("preln", "normformer"))
def test_parameters_are_counted(scheme: str, moe: str) -> None:
    cfg = cases.config(scheme, moe=moe, model="gpt2").model
    counted: dict[str, int] = {}
    idle = 0
    for named in named_matrices(build_model(cfg)):
        counted[named.matrix.role] = counted.get(named.matrix.role, 0) + named.view().numel()
        if ".experts." in named.name and int(named.name.split(".")[4]) >= cfg.moe.top_k:
            idle += named.view().numel()
    resolved = resolve(cfg.norm, cfg.layers)
    assert count_parameters(cfg, resolved) == counted
    assert active_parameters(cfg, resolved) == sum(counted.values()) - idle


def test_examples_plan_and_have_the_published_size() -> None:
    """MoE-1B-7B of the HybridNorm paper: 6.92 billion parameters, 1.28 of them active, 500 billion tokens."""
    assert make_plan(configs.load(EXAMPLES / "run.yaml"), 2).dp == 2
    run = configs.load(EXAMPLES.parent / "papers" / "hybridnorm_moe_1b_7b.yaml")
    plan = make_plan(run, 8)
    assert plan.tokens_per_step * run.train.steps == pytest.approx(500e9, rel=1e-5)
    cfg, resolved = replace(run.model, vocab_size=plan.padded_vocab), plan.resolved
    assert plan.padded_vocab == 50304
    assert sum(count_parameters(cfg, resolved).values()) / 1e9 == pytest.approx(6.92, abs=0.005)
    assert active_parameters(cfg, resolved) / 1e9 == pytest.approx(1.28, abs=0.005)
    run = replace(run, model=cfg)
    ffn = 16 * (8 * 3 * 2048 * 1024 + 2048 * 64)
    dense = 16 * (4 * 2048 * 2048 + 2 * 2048 * run.train.sequence_length) + 2048 * 50304
    assert sum(unit_costs(run)) == flops_per_token(cfg, run.train.sequence_length) == 6 * (ffn + dense)


MIXED = ("model.moe.experts=6", "model.layers=2", "model.ffn=48", "model.heads=4", "model.width=32")


@pytest.mark.parametrize(
    ("world", "overrides", "words"),
    [
        (1, ("model.moe.top_k=7",), "model.moe.top_k=7 is more than model.moe.experts=6"),
        (1, ("model.moe.first=2",), "none of the 2 layers is sparse"),
        (1, ("model.moe.capacity=0",), "model.moe.capacity is 0.0; give a number above 0, or null"),
        (1, ("model.moe.scale=0",), "model.moe.scale is 0.0"),
        (1, ("model.moe.bias_rate=-1",), "model.moe.bias_rate is -1"),
        (4, ("parallel.ep=4",), "parallel.ep=4 does not divide model.moe.experts=6; use 3 or 6"),
        (4, ("parallel.ep=3",), "parallel.ep=3 does not divide the 4 data-parallel ranks; use 2 or 4"),
        (2, ("parallel.ep=2", "model.moe.experts=0"), "parallel.ep=2 shares experts, but model.moe.experts is 0"),
        (2, ("parallel.tp=2", "model.moe.ffn=9"), "model.moe.ffn: 9 is not divisible by parallel.tp=2"),
        (2, ("parallel.tp=2", "model.moe.shared_ffn=9"), "model.moe.shared_ffn: 9 is not divisible by parallel.tp=2"),
    ],
)
def test_what_does_not_fit_is_refused(world: int, overrides: tuple[str, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_plan(configs.load(None, [*MIXED, *overrides]), world)


def test_the_plan_tells_of_experts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--ranks", "4", "--memory", *MIXED, "parallel.ep=2", "model.moe.shared_ffn=16"]) == 0
    told = capsys.readouterr().out
    assert "6 of 48 in 2 layers, a token takes 2 and one of 16 for all" in told
    assert "dp 4 of which 2 share the experts" in told


def test_export_is_refused() -> None:
    from megnorm.hf import custom

    cfg = cases.config("preln", moe="capacity").model
    with pytest.raises(ValueError, match="model.moe.capacity=.*nobody has who generates.*export that"):
        custom.check_state({}, cfg, resolve(cfg.norm, cfg.layers))


def test_a_dense_model_has_no_routers() -> None:
    model = build_model(cases.config("preln").model)
    assert isinstance(model, CausalLM) and not list(router.routers(model))
    assert router.loads(model.env.mesh, model) is None
