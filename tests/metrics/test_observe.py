"""Probes against the same quantities computed by hand, on the model that is trained and on split matrices."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from megnorm.metrics.config import MetricsConfig
from megnorm.metrics.observe import Observer, find_places, first_tensor
from megnorm.models.causal import CausalLM, Tokens, build_model
from megnorm.models.config import ModelConfig
from megnorm.norms.config import NormConfig
from megnorm.parallel.layout import Layout, Matrix, named_matrices, parameter

EVERYTHING = (
    "grad_norm", "weight_norm", "update_norm", "update_ratio", "norm_gain", "stream_rms", "branch_rms", "norm_rms"
)  # fmt: skip


def model_and_batch(scheme: str = "hybridnorm") -> tuple[CausalLM, Tokens]:
    cfg = ModelConfig(
        layers=3, width=32, heads=4, kv_heads=2, ffn=48, vocab_size=50, max_positions=16, norm=NormConfig(scheme)
    )
    tokens = torch.randint(0, 50, (8, 2), generator=torch.Generator().manual_seed(1))
    return build_model(cfg), Tokens(tokens, tokens, torch.ones(8, 2))


def backward(model: CausalLM, batch: Tokens) -> None:
    model(batch).backward()
    for param in model.parameters():
        param.main_grad = param.grad.double()  # type: ignore[union-attr, attr-defined]


def update(model: CausalLM, rate: float = 0.1) -> None:
    with torch.no_grad():
        for param in model.parameters():
            param.sub_(rate * param.grad)


def observe(model: CausalLM, batch: Tokens, observer: Observer, step: int = 1) -> dict[str, float]:
    observer.begin(step)
    backward(model, batch)
    observer.before_update()
    update(model)
    return observer.collect()


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


@pytest.mark.parametrize("tied", [False, True])
def test_norms_of_matrices_layers_roles_and_of_the_whole(tied: bool) -> None:
    cfg = ModelConfig(layers=2, width=16, heads=2, ffn=24, vocab_size=30, max_positions=8, tied_head=tied, bias=True)
    model = build_model(cfg)
    tokens = torch.randint(0, 30, (8, 2))
    before = {named.name: named.view().double().clone() for named in named_matrices(model)}
    got = observe(model, Tokens(tokens, tokens, torch.ones(8, 2)), Observer([model], EVERYTHING, every=1))
    grads = {named.name: named.view(named.param.grad).double() for named in named_matrices(model)}  # type: ignore[arg-type]
    assert {name.removeprefix("grad_norm/") for name in got if name.startswith("grad_norm/")} == {
        *grads, "layer.0", "layer.1",
        *(f"role.{role}" for role in ("embed", "q", "k", "v", "o", "up", "gate", "down", "norm", "bias")),
        *(() if tied else ("role.head",)),
    }  # fmt: skip
    for name, grad in grads.items():
        size, weight = 0.1 * grad.norm().item(), before[name].norm().item()
        assert got[f"grad_norm/{name}"] == pytest.approx(grad.norm().item(), rel=1e-6, abs=1e-12)
        assert got[f"weight_norm/{name}"] == pytest.approx(weight, rel=1e-6)
        assert got[f"update_norm/{name}"] == pytest.approx(size, rel=1e-3, abs=1e-7)
        if weight == 0:  # a bias at the start: no ratio
            assert f"update_ratio/{name}" not in got
        else:
            assert got[f"update_ratio/{name}"] == pytest.approx(size / weight, rel=1e-3, abs=1e-7)
    for where, part in (("layer.1", "blocks.1."), ("role.q", ".q.weight")):
        chosen = [grad for name, grad in grads.items() if part in name]
        assert got[f"grad_norm/{where}"] == pytest.approx(math.hypot(*(g.norm().item() for g in chosen)), rel=1e-6)
    whole = math.hypot(*(got[name] for name in got if name.startswith("grad_norm/role.")))
    assert whole == pytest.approx(math.hypot(*(p.grad.double().norm().item() for p in model.parameters())), rel=1e-6)  # type: ignore[union-attr]


def test_gradients_are_read_from_main_grad_where_there_is_one() -> None:
    model, batch = model_and_batch()
    observer = Observer([model], ("grad_norm",), every=1)
    observer.begin(1)
    backward(model, batch)
    for param in model.parameters():
        param.main_grad *= 3  # type: ignore[attr-defined]
    observer.before_update()
    expected = 3 * model.blocks["1"].ffn.down.weight.grad.norm().item()  # type: ignore[union-attr, operator]
    assert observer.collect()["grad_norm/blocks.1.ffn.down.weight"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("scheme", ["hybridnorm", "preln", "deepnorm"])
def test_activations_of_stream_branch_and_norms(scheme: str) -> None:
    model, batch = model_and_batch(scheme)
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda module, inputs, output: seen.update({name: (inputs[0], output)})

    handles = [module.register_forward_hook(keep(name)) for name, module in model.named_modules() if name]
    got = observe(model, batch, Observer([model], EVERYTHING, every=1))
    for handle in handles:
        handle.remove()
    assert got["stream_rms/embed"] == pytest.approx(rms(seen["embed"][1]), rel=1e-5)
    for i in range(3):
        for part, last in (("attention", "o"), ("ffn", "down")):
            path = f"blocks.{i}.{part}"
            assert got[f"stream_rms/{path}"] == pytest.approx(rms(seen[path][1]), rel=1e-5)
            assert got[f"branch_rms/{path}"] == pytest.approx(rms(seen[f"{path}.{last}"][1]), rel=1e-5)
    norms = {name for name, module in model.named_modules() if type(module).__name__ == "NormLayer"}
    assert norms and {name.rpartition(".")[0] for name in got if name.startswith("norm_rms/")} == {
        f"norm_rms/{name}" for name in norms
    }
    for name in norms:
        assert got[f"norm_rms/{name}.input"] == pytest.approx(rms(seen[name][0]), rel=1e-5)
        assert got[f"norm_rms/{name}.output"] == pytest.approx(rms(seen[name][1]), rel=1e-5)
        assert got[f"norm_gain/{name}.weight"] == pytest.approx(1.0, rel=1e-6)


def test_micro_batches_are_pooled_by_their_elements() -> None:
    model, batch = model_and_batch()
    observer = Observer([model], ("stream_rms",), every=1)
    outputs: list[Tensor] = []
    handle = model.embed.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    observer.begin(1)
    for rows in (slice(0, 8), slice(0, 2)):
        model(Tokens(batch.tokens[rows], batch.labels[rows], batch.loss_mask[rows])).backward()
    handle.remove()
    observer.before_update()
    pooled = torch.cat([output.detach().flatten() for output in outputs])
    assert observer.collect()["stream_rms/embed"] == pytest.approx(rms(pooled), rel=1e-6)


def test_steps_between_probes_cost_nothing() -> None:
    model, batch = model_and_batch()
    observer = Observer([model], EVERYTHING, every=3)

    def hooks() -> int:
        return sum(len(module._forward_hooks) for module in model.modules())

    for step in range(1, 7):
        assert observer.begin(step) == (step % 3 == 0) == (hooks() > 0)
        backward(model, batch)
        observer.before_update()
        assert hooks() == 0
        assert bool(observer.collect()) == (step % 3 == 0)
        assert not observer._before and not observer._vectors and not observer._squares
    assert not Observer([model], EVERYTHING, every=0).begin(3)


def test_probing_does_not_change_the_training() -> None:
    weights = []
    for every in (0, 1):
        model, batch = model_and_batch()
        observer = Observer([model], EVERYTHING, every=every)
        for step in range(1, 3):
            observe(model, batch, observer, step)
            model.zero_grad()
        weights.append(torch.cat([param.detach().flatten() for param in model.parameters()]))
    assert torch.equal(*weights)


def half(rank: int) -> nn.Module:
    """Rows ``rank`` of 2 of q [4, 3], a k that both ranks hold, and a norm that both hold; rank 0 owns those."""
    generator = torch.Generator().manual_seed(0)
    q, k, norm = (torch.randn(*size, generator=generator) for size in ((4, 3), (2, 3), (3,)))
    own = rank == 0
    matrices = (
        Matrix("q", "q", (4, 3), (2 * rank, 0), (2, 3)),
        Matrix("k", "k", (2, 3), (0, 0), (2, 3), start=2, grad_sum="kv", owner=own),
    )
    module = nn.Module()
    module.qkv, module.norm = nn.Module(), nn.Module()
    module.qkv.weight = parameter(torch.cat([q[2 * rank : 2 * rank + 2], k]), Layout(matrices))
    module.norm.weight = parameter(norm, Layout.whole((3,), "norm", owner=own))
    return module


def test_split_matrices_count_each_element_once() -> None:
    """Two ranks of a tensor-parallel group, their sum played by adding what each would send."""
    sent: list[Tensor] = []

    def measure(rank: int, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        model = half(rank)
        for param in model.parameters():
            param.grad = param.detach() * 2
        observer = Observer([model], ("grad_norm", "update_ratio", "norm_gain"), every=1, reduce_sum=reduce)
        observer.begin(1)
        observer.before_update()
        with torch.no_grad():
            for param in model.parameters():
                param.mul_(0.5)
        return observer.collect()

    def send(tensor: Tensor) -> Tensor:
        sent.append(tensor.clone())
        return tensor

    measure(1, send)
    got = measure(0, lambda tensor: tensor + sent[0])
    q = torch.cat([half(0).qkv.weight[:2], half(1).qkv.weight[:2]])  # type: ignore[union-attr, index]
    assert got["grad_norm/q.weight"] == pytest.approx(2 * q.norm().item(), rel=1e-6)
    assert got["grad_norm/k.weight"] == pytest.approx(2 * half(0).qkv.weight[2:].norm().item(), rel=1e-6)  # type: ignore[union-attr, index]
    assert got["norm_gain/norm.weight"] == pytest.approx(rms(half(0).norm.weight.detach()), rel=1e-6)  # type: ignore[union-attr, arg-type]
    assert got["update_ratio/q.weight"] == got["update_ratio/norm.weight"] == pytest.approx(0.5, rel=1e-6)


def tp_values(rank: int, world: int) -> dict[str, float]:
    """On one rank of tp = world with sequence parallelism: every probe of a step of the real model."""
    from megnorm.layers.env import Env
    from megnorm.parallel.collectives import all_reduce
    from megnorm.parallel.mesh import build_mesh

    cpu = torch.device("cpu")
    mesh = build_mesh(tp=world, pp=1, dp=1, kv_heads=2, device=cpu, sequence_parallel=world > 1)
    cfg = ModelConfig(
        layers=2, width=32, heads=4, kv_heads=2, ffn=48, vocab_size=64, max_positions=16, norm=NormConfig("hybridnorm")
    )
    model = build_model(cfg, Env(mesh=mesh))
    tokens = torch.randint(0, 64, (8, 2), generator=torch.Generator().manual_seed(1))

    def total(tensor: Tensor) -> Tensor:
        return all_reduce(tensor, mesh.tp)

    observer = Observer([model], EVERYTHING, every=1, reduce_sum=total, reduce_activations=total)
    observer.begin(1)
    model(Tokens(tokens, tokens, torch.ones(8, 2))).backward()
    for named in named_matrices(model):
        if named.matrix.grad_sum is not None:
            all_reduce(named.view(named.param.grad), mesh.axis(named.matrix.grad_sum))
    observer.before_update()
    update(model)
    return observer.collect()


def test_tensor_and_sequence_parallel_ranks_see_the_numbers_of_one(ranks: Callable) -> None:  # type: ignore[type-arg]
    one = tp_values(0, 1)
    zero, other = ranks(2).run(tp_values)
    assert zero == other
    assert list(zero) == list(one)
    assert zero == pytest.approx(one, rel=1e-4)


def test_pipeline_stages_are_joined_and_roles_added_over_them() -> None:
    model, batch = model_and_batch()
    other = {"grad_norm/role.q": (9.0, 0.0), "grad_norm/layer.7": (4.0, 0.0), "stream_rms/blocks.7.ffn": (8.0, 2.0)}
    alone = observe(model, batch, Observer([model], ("grad_norm", "stream_rms"), every=1))
    model, batch = model_and_batch()
    joined = Observer([model], ("grad_norm", "stream_rms"), every=1, gather=lambda mine: [mine, other])
    got = observe(model, batch, joined)
    assert got["grad_norm/role.q"] == pytest.approx(math.hypot(alone["grad_norm/role.q"], 3.0))
    assert (got["grad_norm/layer.7"], got["stream_rms/blocks.7.ffn"]) == (2.0, 2.0)
    assert got["grad_norm/layer.1"] == pytest.approx(alone["grad_norm/layer.1"])


def test_small_and_broken_gradients_are_told_apart() -> None:
    model = half(0)
    model.qkv.weight.grad = torch.full((4, 3), 1e-30)  # type: ignore[union-attr]
    model.norm.weight.grad = torch.tensor([1.0, math.nan, 0.0])  # type: ignore[union-attr]
    observer = Observer([model], ("grad_norm",), every=1)
    observer.begin(1)
    observer.before_update()
    got = observer.collect()
    assert got["grad_norm/q.weight"] == pytest.approx(1e-30 * math.sqrt(6), rel=1e-5)
    assert math.isnan(got["grad_norm/norm.weight"])


def test_default_probes_and_odd_activations() -> None:
    model, _ = model_and_batch()
    assert set(MetricsConfig().probes) <= set(EVERYTHING)
    assert find_places(model, MetricsConfig().probes)
    assert find_places(model, ("grad_norm",)) == []
    x = torch.ones(2)
    assert first_tensor((x, None)) is x and first_tensor(None) is None and first_tensor(()) is None
