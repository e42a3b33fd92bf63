"""The sparse feed-forward sub-layer: router, experts, and the FFN that all tokens share.

Tensor parallelism splits every expert as it splits a dense FFN: f/tp features of each on every tp rank, which all see the
same tokens. Expert parallelism gives each of ep data-parallel ranks its own experts, and exchanges tokens between them.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from megnorm.layers.dispatch import Dispatch, Routing
from megnorm.layers.env import Context, Env
from megnorm.layers.linear import ColumnParallelLinear, Out, RowParallelLinear
from megnorm.layers.norm import norm_or_identity
from megnorm.layers.router import Router, computed_again
from megnorm.layers.sublayer import SubLayer
from megnorm.models.config import GATED, ModelConfig
from megnorm.norms import scheme
from megnorm.parallel.collectives import all_gather, copy_to, gather_sequence, scatter_sequence, sum_from
from megnorm.parallel.layout import Layout, Matrix, belong_to_experts, parameter


class ExpertLinear(nn.Module):
    """One matrix for each of this rank's experts: rows [n, columns] in groups -> [n, rows].

    matrices: of expert 0, to be repeated for all: their names are roles, rows lie one behind the other. bias: as they
    are, once of all tp ranks if ``whole`` (a row-parallel layer: the others leave it out, and sum its gradient).
    """

    def __init__(self, matrices: Sequence[Matrix], experts: range, env: Env, *, bias: bool, whole: bool) -> None:
        super().__init__()
        self.rows, columns = sum(m.local[0] for m in matrices), matrices[0].local[1]
        self.count, tp = len(experts), env.mesh.tp
        weights, biases, start = [], [], 0
        for e in experts:
            for m in matrices:
                placed = replace(m, name=f"{e}.{m.role}", start=start, replicas="edp")
                weights.append(placed)
                row = replace(placed, role="bias", shape=m.shape[:1], offset=m.offset[:1], local=m.local[:1])
                biases.append(replace(row, grad_sum="tp", owner=tp.rank == 0) if whole else row)
                start += m.local[0]
        self.weight = parameter(env.empty(start, columns), Layout(tuple(weights)))
        self.bias = parameter(env.full((start,), 0.0), Layout(tuple(biases))) if bias else None
        self.share = 0.0 if whole and tp.rank > 0 else 1.0
        self.product = env.kernel("grouped_gemm", features=(columns, self.rows), quantize=env.quantize)

    def forward(self, x: Tensor, counts: Tensor, weights: Tensor | None = None) -> Tensor:
        """weights [n, 1]: by which x has been multiplied, and so must the bias be."""
        y: Tensor = self.product(x, self.weight.view(self.count, self.rows, -1), counts)
        if self.bias is None:
            return y
        bias = self.share * self.bias.view(self.count, self.rows).repeat_interleave(counts, 0)
        return y + (bias if weights is None else bias * weights.to(bias.dtype))


class Experts(nn.Module):
    """The experts that this rank holds: rows [n, d], those of one expert behind those of another -> weight * FFN [n, d].

    counts: [experts of this rank] rows of each. weights: [n, 1]; they multiply before W_down, so that backward needs no rows
    of its output. With tp the result is this rank's part of a sum.
    """

    def __init__(self, spec: scheme.FFN, cfg: ModelConfig, env: Env) -> None:
        super().__init__()
        ep, tp, f, d = env.mesh.ep, env.mesh.tp, cfg.expert_ffn, cfg.width
        held, features = cfg.moe.experts // ep.size, f // tp.size
        self.held = range(ep.rank * held, (ep.rank + 1) * held)
        roles = ("gate", "up") if cfg.gated else ("up",)
        at = tp.rank * features
        up = [Matrix("", role, (f, d), (at, 0), (features, d)) for role in roles]
        down = [Matrix("", "down", (d, f), (0, at), (d, features))]
        self.up = ExpertLinear(up, self.held, env, bias=cfg.bias, whole=False)
        self.down = ExpertLinear(down, self.held, env, bias=cfg.bias, whole=True)
        self.gated = cfg.gated
        self.act = env.kernel("activation", kind=GATED.get(cfg.activation, cfg.activation))
        self.recompute = env.recompute
        self.norms: list[nn.Module] = []
        for e in self.held if spec.inner is not None else ():
            self.norms.append(norm_or_identity(spec.inner, "inner", f, 1, env))
            belong_to_experts(self.norms[-1])
            self.add_module(str(e), nn.ModuleDict({"inner_norm": self.norms[-1]}))

    def forward(self, x: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
        inner = self.recompute("activations", self._activate, self.up(x, counts))
        if self.norms:
            groups = inner.split(counts.tolist())
            inner = torch.cat([_normalized(norm, group) for norm, group in zip(self.norms, groups, strict=True)])
        weighed = self.recompute("activations", _weigh, inner, weights)
        return self.down(weighed, counts, weights)

    def _activate(self, h: Tensor) -> Tensor:
        if not self.gated:
            return self.act(h)
        gate, up = h.chunk(2, dim=-1)
        return self.act(gate) * up


def _normalized(norm: nn.Module, rows: Tensor) -> Tensor:
    """An expert that no token was sent to normalizes a row that nobody reads: not every library starts a kernel for none."""
    y: Tensor = norm(rows) if len(rows) else norm(torch.cat([rows, rows.new_ones(1, rows.shape[1])]))[:0]
    return y


def _weigh(x: Tensor, weights: Tensor) -> Tensor:
    return x * weights.to(x.dtype)


class SharedExpert(nn.Module):
    """The FFN that all tokens pass: [s, b, d] -> [s, b, d] ([s/tp, b, d] with sequence parallelism)."""

    def __init__(self, spec: scheme.FFN, cfg: ModelConfig, env: Env) -> None:
        super().__init__()
        f = cfg.moe.shared_ffn
        outs = (Out("gate", f), Out("up", f)) if cfg.gated else (Out("up", f),)
        self.up = ColumnParallelLinear(cfg.width, outs, env, bias=cfg.bias)
        self.inner_norm = norm_or_identity(spec.inner, "inner", f, 1, env)
        self.down = RowParallelLinear(f, cfg.width, "down", env, bias=cfg.bias)
        self.act = env.kernel("activation", kind=GATED.get(cfg.activation, cfg.activation))
        self.recompute = env.recompute

    def forward(self, u: Tensor) -> Tensor:
        inner = self.inner_norm(self.recompute("activations", self._activate, self.up.linear(u)))
        return self.recompute("projections", self.down, inner)

    def _activate(self, h: Tensor) -> Tensor:
        gate, *up = h.split(self.up.sizes, dim=-1)
        return self.act(gate) * up[0] if up else self.act(gate)


class MoE(SubLayer):
    """sum over the chosen experts e of weight_e * FFN_e(u), plus the shared FFN: [s, b, d] -> [s, b, d].

    A token that no expert takes (capacity, padding) has the branch 0: what norms and residual make of it is the scheme's
    affair, as for any other branch.
    """

    def __init__(self, spec: scheme.FFN, cfg: ModelConfig, env: Env, name: str) -> None:
        super().__init__(spec, cfg.width, cfg.dropout, env, name)
        self.moe, self.mesh = cfg.moe, env.mesh
        self.router = Router(cfg, env)
        self.experts = Experts(spec, cfg, env)
        self.shared = SharedExpert(spec, cfg, env) if cfg.moe.shared_ffn else None

    def body(self, u: Tensor, context: Context, h: Tensor | None = None) -> Tensor:
        sp, tp = self.mesh.sp, self.mesh.tp
        shape = (u.shape[0] * sp.size, *u.shape[1:])
        routing = context.routing or Routing.of(shape[:2], u.device)
        weights, chosen = self.router(u, routing)
        # Every tp rank computes a part of each expert's output: gradients of what enters are partial sums.
        enter = gather_sequence if sp.size > 1 else copy_to
        x, weights, chosen = enter(u, tp), enter(weights, tp), all_gather(chosen, sp)
        kept = routing.kept(chosen, self.moe.experts, self.moe.capacity)
        if self.training and kept is not None and not computed_again():
            self.router.dropped += routing.tokens() * self.moe.top_k - kept.sum()
        way = Dispatch(chosen, kept, self.moe.experts, self.mesh.ep)
        rows = self.experts(way.send(x.flatten(0, 1)), way.send_slots(weights), way.counts)
        y = way.combine(rows).view(shape)
        y = scatter_sequence(y, tp) if sp.size > 1 else sum_from(y, tp)
        return y if self.shared is None else y + self.shared(u)
