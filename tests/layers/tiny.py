"""Tiny models with dropout and recompute, and what one step of them gives."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megnorm.config import RunConfig
from megnorm.layers.env import Env
from megnorm.layers.recompute import Recompute
from megnorm.models.causal import CausalLM, Tokens, build_model
from megnorm.parallel.mesh import Mesh
from megnorm.parallel.rng import DropoutRng
from tests.distributed import cases
from tools import parity

SELECTIVE = ("attention", "norms", "activations", "projections")
MODES: tuple[tuple[str, ...], ...] = (("block",), *((mode,) for mode in SELECTIVE), ("norms", "activations"), SELECTIVE)


def config(scheme: str, dropout: float = 0.1, changes: dict[str, Any] | None = None, **case: Any) -> RunConfig:
    """The model of ``cases.config`` with dropout on both places; changes: of the model."""
    base = cases.config(scheme, **case)
    model = replace(base.model, **{"dropout": dropout, "attention_dropout": dropout, **(changes or {})})
    return replace(base, model=model)


@dataclass
class Model:
    """A model as one rank holds it, and the place of its dropout."""

    net: CausalLM
    rng: DropoutRng

    @staticmethod
    def build(
        config: RunConfig, modes: Collection[str] = (), blocks: int | None = None, mesh: Mesh | None = None
    ) -> "Model":
        """In fp64 or fp32 as the config says; the same weights whatever the modes."""
        rng = DropoutRng(torch.device("cpu"))
        dtype = {"fp64": torch.float64, "fp32": torch.float32}[config.train.precision]
        env = Env(mesh or Mesh(), dtype, rng=rng, recompute=Recompute(modes, blocks))
        return Model(build_model(config.model, env, seed=1), rng)

    def forward(self, micro_batch: int, batch: Tokens, step: int = 0) -> Tensor:
        mesh = self.net.env.mesh
        self.rng.begin(7, step, micro_batch, mesh.dp.rank, mesh.tp.rank)
        given = self.net(batch)
        loss: Tensor = sum(given) if isinstance(given, tuple) else given
        return loss

    def grads(self) -> dict[str, Tensor]:
        return {name: p.grad.clone() for name, p in self.net.named_parameters() if p.grad is not None}


Result = tuple[list[Tensor], dict[str, Tensor]]


def step(model: Model, batches: Sequence[Tokens], *, interleaved: bool = False) -> Result:
    """Losses and gradients summed over micro-batches. interleaved: every forward pass before the first backward pass."""
    losses, waiting = [], []
    for i, batch in enumerate(batches):
        loss = model.forward(i, batch)
        losses.append(loss.detach().clone())
        waiting.append(loss)
        if not interleaved:
            waiting.pop().backward()
    for loss in waiting:
        loss.backward()
    return losses, model.grads()


def batches(config: RunConfig, count: int = 2) -> list[Tokens]:
    return [parity.random_batch(config, 0, i) for i in range(count)]


def differences(a: Result, b: Result) -> list[str]:
    """What is not equal bit for bit."""
    assert set(a[1]) == set(b[1])
    losses = [f"loss {i}" for i, (x, y) in enumerate(zip(a[0], b[0], strict=True)) if not torch.equal(x, y)]
    return losses + [name for name in a[1] if not torch.equal(a[1][name], b[1][name])]
