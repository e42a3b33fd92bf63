"""Delayed scaling over the fake library: what recompute, evaluations and checkpoints owe to histories."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megnorm.kernels import te_delayed
from megnorm.kernels.config import KernelConfig
from megnorm.layers.env import Env
from megnorm.layers.recompute import Recompute
from megnorm.models.causal import CausalLM, build_model
from megnorm.parallel.launch import World
from megnorm.plan import make_plan
from megnorm.train import state
from megnorm.train.build import build
from megnorm.train.config import WatchdogConfig
from megnorm.train.main import _fit
from tests.distributed import cases, tiny
from tests.kernels.serving import asked_of_cuda, installed
from tests.layers.tiny import batches, differences
from tests.train.tiny import losses

FP8 = KernelConfig(fp8="delayed", check=False)
CONFIG = cases.config("hybridnorm", precision="bf16")


@pytest.fixture(autouse=True)
def _served() -> Iterator[None]:
    with installed(), asked_of_cuda(["linear"]):
        yield


def model(modes: Collection[str] = ()) -> CausalLM:
    env = Env(
        dtype=torch.bfloat16,
        kernels=FP8,
        recompute=Recompute(modes),
        tokens=16,
        region=partial(te_delayed.region, None),
    )
    return build_model(CONFIG.model, env, seed=1)


def products(net: CausalLM) -> dict[str, te_delayed.Delayed]:
    found = {name: getattr(module, "product", None) for name, module in net.named_modules()}
    return {name: product for name, product in found.items() if isinstance(product, te_delayed.Delayed)}


def kept(net: CausalLM) -> dict[str, Tensor]:
    return {
        f"{name}.{kind}": tensor.clone()
        for name, product in products(net).items()
        for kind, tensor in product.state().items()
    }


def run(net: CausalLM, micro_batches: int = 4) -> tuple[list[Tensor], dict[str, Tensor]]:
    """As a pipeline does it: two forward passes ahead of the backward passes. Losses, gradients."""
    losses, waiting = [], []
    for batch in batches(CONFIG, micro_batches):
        loss = net(batch)
        losses.append(loss.detach().clone())
        waiting.append(loss)
        if len(waiting) > 2:
            waiting.pop(0).backward()
    for loss in waiting:
        loss.backward()
    return losses, {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_histories_move_on() -> None:
    """Every product of every block has them, and scales follow from what was seen."""
    net = model()
    run(net)
    assert len(products(net)) == 4 * 2
    for name, tensor in kept(net).items():
        used = tensor[..., :2] if "forward" in name else tensor[..., :1]  # input and weight; the output's gradient
        assert (used != 1).all() if name.endswith("scale") else (used[-3:] > 0).all(), name


SELECTIVE = (("projections",), ("attention", "activations", "projections"))
MODES = (("block",), *(pytest.param(modes, marks=pytest.mark.full) for modes in SELECTIVE))


@pytest.mark.parametrize("modes", MODES, ids="+".join)
def test_recompute_takes_the_scales_that_a_product_had(modes: tuple[str, ...]) -> None:
    plain = model()
    wanted, histories = run(plain), kept(plain)  # the end of a region moves the histories of all products that ever ran
    again = model(modes)
    assert not differences(wanted, run(again))
    assert equal(kept(again), histories)


def test_recompute_with_the_scales_of_the_moment_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = run(model())

    @contextmanager
    def unrestored(self: te_delayed.Delayed, unit: object | None) -> Iterator[None]:
        yield

    monkeypatch.setattr(te_delayed.Delayed, "_restored", unrestored)
    assert differences(wanted, run(model(("block",))))


def test_an_evaluation_leaves_no_trace() -> None:
    net = model()
    run(net)
    before = kept(net)
    with torch.no_grad():
        net(batches(CONFIG)[0])
    assert equal(kept(net), before)


def test_state_continues() -> None:
    """Written into products that have not run yet, as a resume does."""
    first, second, without = model(), model(), model()
    run(first)
    for name, product in products(second).items():
        for kind, tensor in product.state().items():
            tensor.copy_(products(first)[name].state()[kind])
    first.zero_grad()
    wanted = run(first)
    assert not differences(wanted, run(second))
    assert differences(wanted, run(without))


@pytest.mark.full
def test_a_product_without_a_region_updates_nothing() -> None:
    """The check before a run; and it may run twice."""
    net = build_model(CONFIG.model, Env(dtype=torch.bfloat16, kernels=FP8, tokens=16), seed=1)
    for _ in range(2):
        net(batches(CONFIG)[0]).backward()
    assert all((tensor == 1).all() for name, tensor in kept(net).items() if name.endswith("forward.scale"))


def train(folder: Path, data: str, *, kernels: KernelConfig = FP8, **options: Any) -> None:
    """Start a run or continue it."""
    config = tiny.config(data, folder, steps=4, precision="bf16", recompute="block")
    quiet = replace(config.train, watchdog=WatchdogConfig(timeout=0.0), **options)
    built = build(make_plan(replace(config, kernels=kernels, train=quiet), 1), torch.device("cpu"))
    if (folder / "checkpoints").is_dir():
        state.resume(built, folder / "checkpoints")
    _fit(built, World(0, 1))


@pytest.mark.full
def test_resume_is_bit_for_bit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = tiny.write_data(tmp_path / "text")
    train(tmp_path / "whole", data)
    train(tmp_path / "parts", data, stop_after=2)
    train(tmp_path / "parts", data)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    # A run may also turn to delayed scaling on its way.
    train(tmp_path / "late", data, kernels=KernelConfig(), stop_after=2)
    train(tmp_path / "late", data)
    assert "histories of largest values begin anew" in caplog.text
    assert losses(tmp_path / "late").keys() == losses(tmp_path / "whole").keys()
