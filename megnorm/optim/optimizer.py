"""AdamW on logical matrices with fp32 masters: what a step does to weights, and the state it keeps."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megnorm.optim.config import OptimConfig
from megnorm.parallel.layout import Named


@dataclass(frozen=True)
class State:
    """One tensor of optimizer state ("exp_avg", "exp_avg_sq"), sliced like the matrix it belongs to."""

    kind: str
    named: Named
    tensor: Tensor


class Optimizer:
    """torch.optim.AdamW over the logical matrices of a model; groups share weight decay and a factor on the rate.

    Weights in low precision have masters in fp32, from which they are rounded after each step: the model is built in fp32
    and lowered here, so that masters start unrounded. masters: by logical name, the weights that are really updated.
    """

    def __init__(self, named: Sequence[Named], config: OptimConfig, compute_dtype: torch.dtype) -> None:
        self.named, self.config = list(named), config
        self.masters: dict[str, Tensor] = {}
        params = list({id(n.param): n.param for n in self.named}.values())
        self._full = [(param, param.detach().clone() if param.dtype != compute_dtype else None) for param in params]
        masters = {id(param): param.detach() if full is None else full for param, full in self._full}
        for param, full in self._full:
            if full is not None:
                param.data = full.to(compute_dtype)
        groups: dict[tuple[float, float], list[Tensor]] = {}
        for n in self.named:
            leaf = n.matrix.view(masters[id(n.param)]).detach()
            self.masters[n.name] = leaf
            if leaf.numel() > 0:
                key = (config.decay_of(n.matrix.role), config.rate.get(n.matrix.role, 1.0))
                groups.setdefault(key, []).append(leaf)
        self.adamw = torch.optim.AdamW(
            [{"params": ps, "weight_decay": wd, "rate": rate} for (wd, rate), ps in groups.items()],
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            fused=True,
        )
        self._prepare_state()

    def _prepare_state(self) -> None:
        for leaf in self._leaves():
            self.adamw.state[leaf] = {
                "step": torch.zeros((), dtype=torch.float32, device=leaf.device),
                "exp_avg": torch.zeros_like(leaf),
                "exp_avg_sq": torch.zeros_like(leaf),
            }

    def _leaves(self) -> Iterator[Tensor]:
        for group in self.adamw.param_groups:
            yield from group["params"]

    def step(self, lr: float) -> None:
        """One update with learning rate ``lr`` from ``param.main_grad``; low-precision weights follow their masters."""
        for n in self.named:
            leaf = self.masters[n.name]
            leaf.grad = n.view(n.param.main_grad) if leaf.numel() else None  # type: ignore[attr-defined]
        for group in self.adamw.param_groups:
            group["lr"] = lr * group["rate"]
        self.adamw.step()
        for leaf in self._leaves():
            leaf.grad = None
        self.lower()

    def lower(self) -> None:
        """Round the masters into low-precision weights."""
        with torch.no_grad():
            for param, full in self._full:
                if full is not None:
                    param.copy_(full)

    def states(self) -> Iterator[State]:
        """The moments of every matrix; with the masters and the number of updates, all that continues exactly."""
        for n in self.named:
            leaf = self.masters[n.name]
            if leaf.numel() == 0:
                continue
            yield State("exp_avg", n, self.adamw.state[leaf]["exp_avg"])
            yield State("exp_avg_sq", n, self.adamw.state[leaf]["exp_avg_sq"])

    def set_updates(self, count: int) -> None:
        """Tell AdamW how many updates its moments have seen (bias correction), after a load."""
        for leaf in self._leaves():
            self.adamw.state[leaf]["step"].fill_(float(count))
