"""Residual rules: how a branch returns to the stream. "add" is the rule of every scheme with one static stream."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from megnorm.layers.env import Env
from megnorm.norms.resolve import grown
from megnorm.norms.scheme import Formula, Residual, Scale
from megnorm.parallel.layout import Layout, parameter
from megnorm.parallel.rng import DropoutRng


class Add(nn.Module):
    """skip * r + branch * y [+ layer input], r the stream or the input norm's output; the sum or r damped by a gate.

    A learned factor is a parameter ``skip`` or ``branch``, a scalar [1] or a vector [d]; a gate is a parameter ``gate`` [1]. A
    factor that grows with the step is asked for its value in each forward pass.
    """

    def __init__(self, residual: Residual, width: int, env: Env) -> None:
        super().__init__()
        self.source, self.layer_input = residual.source, residual.layer_input
        self.skip = factor(residual.skip, width, env)
        self.branch = factor(residual.branch, width, env)
        self.gated = None if residual.gate is None else residual.gate.on
        self.gate: nn.Parameter | None = None
        if residual.gate is not None:
            self.gate = learned((1,), residual.gate.value, env)

    def forward(self, stream: Tensor, u: Tensor, y: Tensor, layer_input: Tensor) -> Tensor:
        """stream, u (the input norm's output), y (the branch) and layer_input, all [s, b, d] -> [s, b, d]."""
        r = u if self.source == "input" else stream
        if self.gated == "skip":
            r = self._damped(r)
        skip, branch = (f() if isinstance(f, Growing) else f for f in (self.skip, self.branch))
        if isinstance(skip, float) and isinstance(branch, float) and branch == 1.0:
            out = torch.add(y, r, alpha=skip)
        else:
            kept = r if isinstance(skip, float) and skip == 1.0 else r * skip
            out = torch.add(kept, y, alpha=branch) if isinstance(branch, float) else torch.addcmul(kept, branch, y)
        if self.layer_input:
            out = out + layer_input
        return self._damped(out) if self.gated == "stream" else out

    def _damped(self, x: Tensor) -> Tensor:
        """x - silu(g) * stop_gradient(x) (arXiv:2506.22049): the gradient of x passes whole."""
        assert self.gate is not None
        return torch.addcmul(x, x.detach(), functional.silu(self.gate), value=-1.0)


RULES: dict[str, type[Add]] = {"add": Add}


def residual_rule(residual: Residual, width: int, env: Env) -> Add:
    """The module of a resolved Residual. Raises ValueError for a rule that has no module."""
    if residual.rule not in RULES:
        raise ValueError(f"residual.rule: no rule '{residual.rule}'; there is {', '.join(RULES)}")
    return RULES[residual.rule](residual, width, env)


@dataclass(frozen=True)
class Growing:
    """A factor that depends on the step, which is a part of dropout's place: what is computed again finds the same one."""

    scale: Scale
    rng: DropoutRng

    def __call__(self) -> float:
        return grown(self.scale, self.rng.place.step)


def factor(scale: Scale, width: int, env: Env) -> float | Growing | nn.Parameter:
    """A resolved factor: a number, one that grows, or a parameter."""
    value = float(scale.value)  # type: ignore[arg-type]
    if scale.warmup:
        return Growing(scale, env.rng)
    if scale.learned is None:
        return value
    return learned((width,) if scale.learned == "width" else (1,), value, env)


def learned(shape: tuple[int, ...], value: Formula, env: Env) -> nn.Parameter:
    """A parameter of the residual stream, the same on every rank, that starts at ``value``."""
    partial = "tp" if env.mesh.sequence_parallel else None
    layout = Layout.whole(shape, "scale", grad_sum=partial, owner=env.mesh.tp.rank == 0)
    return parameter(env.full(shape, float(value)), layout)  # type: ignore[arg-type]
