"""Feed-forward sub-layers of a megnorm model in transformers: dense ones, and mixtures of experts.

Needs torch, transformers and the two files it imports; shipped beside modeling_megnorm.py.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_megnorm import MegnormConfig
from .norms_megnorm import Residual, Spec, SubLayer, make_norm, wide

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu_squared": lambda x: F.relu(x).square(),
    "silu": F.silu,
}
GATED = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu"}


def activation(config: MegnormConfig) -> Callable[[Tensor], Tensor]:
    return ACTIVATIONS[GATED.get(config.activation, config.activation)]


class Mlp(nn.Module):
    """down(inner(act(gate) * up)) or down(inner(act(up))): [..., d] -> [..., d], f features inside."""

    def __init__(self, config: MegnormConfig, spec: Spec, f: int):
        super().__init__()
        self.config, self.act, d = config, activation(config), config.hidden_size
        self.up = nn.Linear(d, f, bias=config.linear_bias)
        self.gate = nn.Linear(d, f, bias=config.linear_bias) if config.activation in GATED else None
        self.inner_norm = make_norm(spec["inner"], f)
        self.down = nn.Linear(f, d, bias=config.linear_bias)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up(x)
        return self.down(self.inner_norm(self.act(up) if self.gate is None else self.act(self.gate(x)) * up))


class FeedForward(Mlp, SubLayer):
    """The dense sub-layer: [b, s, d] after the input norm -> branch [b, s, d]."""

    def __init__(self, config: MegnormConfig, spec: Spec, first: Residual):
        super().__init__(config, spec, config.intermediate_size)
        self.surround(spec, config.hidden_size, first)

    def forward(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        return F.dropout(self.output_norm(super().forward(x)), self.config.dropout, self.training)


class Router(nn.Linear):
    """Tokens [t, d] -> weights [t, k] in at least fp32 and experts [t, k]. bias: added to scores for the choice alone."""

    def __init__(self, config: MegnormConfig):
        super().__init__(config.hidden_size, config.moe["experts"], bias=bool(config.moe["bias_rate"]))
        self.moe: dict[str, Any] = config.moe

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.linear(x.to(wide(x.dtype)), self.weight.to(wide(x.dtype)))
        scores = logits.softmax(-1) if self.moe["score"] == "softmax" else logits.sigmoid()
        wanted = scores.detach() if self.bias is None else scores.detach() + self.bias
        chosen = wanted.topk(self.moe["top_k"], dim=-1).indices
        weights = scores.gather(-1, chosen)
        if self.moe["normalize"]:
            weights = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
        return weights * self.moe["scale"], chosen


class MixtureOfExperts(SubLayer):
    """The sparse sub-layer: sum over the chosen experts e of weight_e * expert_e(u), plus the FFN that all tokens pass."""

    def __init__(self, config: MegnormConfig, spec: Spec, first: Residual):
        super().__init__()
        self.config, moe = config, config.moe
        self.router = Router(config)
        f = moe["ffn"] or config.intermediate_size
        self.experts = nn.ModuleList(Mlp(config, spec, f) for _ in range(moe["experts"]))
        self.shared = Mlp(config, spec, moe["shared_ffn"]) if moe["shared_ffn"] else None
        self.surround(spec, config.hidden_size, first)

    def forward(self, hidden_states: Tensor, real: Tensor | None = None) -> Tensor:
        """real: [b, s] is False on padding, to which the chosen experts add nothing."""
        x = hidden_states.flatten(0, 1)
        weights, chosen = self.router(x)
        if real is not None:
            weights = weights * real.flatten()[:, None]
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = (chosen == e).nonzero(as_tuple=True)
            y = y.index_add(0, token, expert(x[token]) * weights[token, slot, None].to(x.dtype))
        y = y if self.shared is None else y + self.shared(x)
        return F.dropout(self.output_norm(y.view_as(hidden_states)), self.config.dropout, self.training)
