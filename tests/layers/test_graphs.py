"""Blocks as CUDA graphs, over a stand-in for torch's own capture that keeps its rules: fixed memory, fixed shapes, one place
for what backward needs."""

import inspect
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megnorm.config import load
from megnorm.kernels import backends, registry
from megnorm.kernels.config import KernelConfig
from megnorm.layers import graphs
from megnorm.layers.env import Env
from megnorm.models.build import build_model
from megnorm.models.causal import CausalLM, Tokens
from megnorm.plan import make_plan
from megnorm.refuse import PlanError
from megnorm.train.build import build
from tests.distributed import cases
from tools import parity

assert backends.REFERENCE
SIGNATURE = inspect.signature(torch.cuda.make_graphed_callables)


class Replay(torch.autograd.Function):
    """Forward writes the inputs into the captured ones; backward is good for the last forward alone."""

    @staticmethod
    def forward(ctx: Any, graph: "Graph", *inputs: Tensor) -> Tensor:
        for held, given in zip(graph.sample, inputs, strict=False):
            assert held.shape == given.shape and held.dtype == given.dtype
            with torch.no_grad():
                held.copy_(given)
        graph.turn += 1
        ctx.graph, ctx.turn = graph, graph.turn
        with torch.enable_grad():
            graph.output = graph.forward(*graph.sample)
        return graph.output.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        graph = ctx.graph
        assert ctx.turn == graph.turn, "another forward pass has overwritten what this one kept"
        wanted = [x for x in graph.surface if x.requires_grad]
        found = iter(torch.autograd.grad(graph.output, wanted, grad, allow_unused=True))
        return None, *(next(found) if x.requires_grad else None for x in graph.surface)


class Graph:
    def __init__(self, body: nn.Module, sample: tuple[Tensor, ...]) -> None:
        self.forward, self.sample, self.turn = body.forward, sample, 0
        self.surface = (*sample, *body.parameters())
        self.places = [p.data_ptr() for p in body.parameters()]
        self.output = torch.zeros(())
        body.forward = self.replay
        self.params = tuple(body.parameters())

    def replay(self, *inputs: Tensor) -> Tensor:
        assert [p.data_ptr() for p in self.params] == self.places, "weights have moved"
        y: Tensor = Replay.apply(self, *inputs, *self.params)
        return y


def stand_in(*args: Any, **kwargs: Any) -> tuple[nn.Module, ...]:
    given = SIGNATURE.bind(*args, **kwargs).arguments
    bodies, samples = given["callables"], given["sample_args"]
    assert isinstance(bodies, tuple) and len(bodies) == len(samples)
    for body, sample in zip(bodies, samples, strict=True):
        assert not (body._forward_hooks or body._forward_pre_hooks or body._backward_hooks)
        assert all(isinstance(x, Tensor) for x in sample) and sample[0].requires_grad
        Graph(body, sample)
    return bodies


def model_of(**options: Any) -> tuple[CausalLM, list[Tokens]]:
    config = cases.config("sandwich", **options)
    model = build_model(config.model, Env(dtype=torch.float64), vocab_multiple=1)
    assert isinstance(model, CausalLM)
    batches = [parity.random_batch(config, 0, i) for i in range(3)]
    return model, [batch for batch in batches if isinstance(batch, Tokens)]


def captured(**options: Any) -> tuple[CausalLM, list[Tokens]]:
    model, batches = model_of(**options)
    graphs.capture(list(graphs.blocks_of(model)), lambda: model(batches[0]), make=stand_in)
    return model, batches


def grads(model: CausalLM, batches: list[Tokens]) -> list[Tensor]:
    for batch in batches:
        out = model(batch)
        assert isinstance(out, Tensor)
        out.backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("model", ["llama", "fairseq", "windows"])
def test_graphs_are_the_run_without_them(model: str) -> None:
    """Rope, a mask, rope of windows; weights that an update changes."""
    (plain, batches), (other, _) = model_of(model=model), captured(model=model)
    for _ in range(2):
        for a, b in zip(grads(plain, batches), grads(other, batches), strict=True):
            assert torch.equal(a, b)
        with torch.no_grad():
            for one in (plain, other):
                for p in one.parameters():
                    assert p.grad is not None
                    p -= 0.1 * p.grad
    used = [block.forward.body.forward.__self__.turn for block in graphs.blocks_of(other)]  # type: ignore[union-attr]
    assert used == [6] * len(used)


def test_a_block_runs_by_itself_where_a_graph_would_be_wrong() -> None:
    model, batches = captured()
    blocks = list(graphs.blocks_of(model))

    def turns() -> int:
        return sum(block.forward.body.forward.__self__.turn for block in blocks)  # type: ignore[union-attr]

    with torch.no_grad():
        model(batches[0])
    shorter = replace(batches[0], tokens=batches[0].tokens[:5], labels=batches[0].labels[:5],
                      loss_mask=batches[0].loss_mask[:5])  # fmt: skip
    model(shorter)
    model.eval()
    model(batches[0])
    model.train()
    handle = blocks[0].ffn.register_forward_hook(lambda *_: None)  # type: ignore[union-attr]
    model(batches[0])
    assert turns() == len(blocks) - 1
    handle.remove()
    model(batches[0])
    assert turns() == 2 * len(blocks) - 1


def test_two_passes_under_way_are_what_the_plan_refuses() -> None:
    model, batches = captured()
    first, second = model(batches[0]), model(batches[1])
    assert isinstance(first, Tensor) and isinstance(second, Tensor)
    with pytest.raises(AssertionError, match="overwritten"):
        (first + second).backward()


REFUSED = {
    "model.moe.experts": ["model.moe.experts=4", "model.moe.top_k=2"],
    "model.dropout": ["model.dropout=0.1"],
    "model.dropout or attention_dropout": ["model.attention_dropout=0.1"],
    "data.separate_documents": ["data.separate_documents=true"],
    "data.reset_positions": ["data.reset_positions=true"],
    "train.recompute": ["train.recompute=[norms]"],
    "parallel.pp=1 and schedule=gpipe": ["parallel.schedule=gpipe"],
    "model.family=masked": ["model.family=masked", "data.task=masked"],
    "kernels.fp8=current": ["kernels.fp8=current", "train.precision=bf16"],
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_no_graph_can_hold_is_refused(key: str) -> None:
    with pytest.raises(PlanError, match=f"kernels.graphs cannot be joined with {key}.*set kernels.graphs=false"):
        make_plan(load(None, ["kernels.graphs=true", *REFUSED[key]]), 1)


def test_a_cpu_has_no_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    config = cases.config("preln", precision="fp32")
    plan = make_plan(replace(config, kernels=KernelConfig(graphs=True)), 1)
    with pytest.raises(PlanError, match="there is no CUDA device"):
        build(plan, torch.device("cpu"), train_data=object())  # type: ignore[arg-type]


def test_kernels_are_asked_for_what_can_be_captured() -> None:
    need = Env(kernels=KernelConfig(graphs=True))._need("norm", {})
    assert need.capture and not Env()._need("norm", {}).capture
    for op in ("grouped_gemm", "permute"):
        reference = next(o for o in registry.offers(op) if o.backend == "torch")
        assert "kernels.graphs" in str(reference.reason(replace(need, op=op)))
