"""The feed-forward sub-layer, plain or gated."""

from torch import Tensor

from megnorm.layers import fused
from megnorm.layers.env import Context, Env
from megnorm.layers.linear import ColumnParallelLinear, Out, RowParallelLinear
from megnorm.layers.norm import NormLayer, norm_or_identity
from megnorm.layers.sublayer import SubLayer
from megnorm.models.config import GATED, ModelConfig
from megnorm.norms import scheme


class FeedForward(SubLayer):
    """W_down N_inner(act(W_up u)), or act(W_gate u) * (W_up u) inside where gated: [s, b, d] -> [s, b, d]."""

    def __init__(self, spec: scheme.FFN, cfg: ModelConfig, env: Env, name: str) -> None:
        super().__init__(spec, cfg.width, cfg.dropout, env, name)
        self.gated = cfg.gated
        outs = (Out("gate", cfg.ffn), Out("up", cfg.ffn)) if cfg.gated else (Out("up", cfg.ffn),)
        self.up = ColumnParallelLinear(cfg.width, outs, env, bias=cfg.bias)
        self.inner_norm = norm_or_identity(spec.inner, "inner", cfg.ffn, 1, env)
        self.down = RowParallelLinear(cfg.ffn, cfg.width, "down", env, bias=cfg.bias)
        kind = GATED.get(cfg.activation, cfg.activation)
        self.act = env.kernel("activation", kind=kind)
        self.act_gated = env.fused("activation", kind=kind, gated=True) if cfg.gated else None
        self.entry = fused.entry(self, self.up, env)
        self.act_norm = fused.inner(self.inner_norm, env, kind=kind, gated=cfg.gated)

    def body(self, u: Tensor, context: Context, h: Tensor | None = None) -> Tensor:
        h = self.up.linear(u) if h is None else h
        if self.act_norm is not None and not fused.watched(self.inner_norm):
            inner = self.recompute("activations", self._activate_and_normalize, h)
        else:
            inner = self.inner_norm(self.recompute("activations", self._activate, h))
        return self.recompute("projections", self.down, inner)

    def _activate(self, h: Tensor) -> Tensor:
        if not self.gated:
            return self.act(h)
        gate, up = h.split(self.up.sizes, dim=-1)
        if self.act_gated is not None:
            y: Tensor = self.act_gated(gate, up)
            return y
        return self.act(gate) * up

    def _activate_and_normalize(self, h: Tensor) -> Tensor:
        assert self.act_norm is not None and isinstance(self.inner_norm, NormLayer)
        gate, up = h.split(self.up.sizes, dim=-1) if self.gated else (h, None)
        out: Tensor = self.act_norm(gate, up, *self.inner_norm.given(gate))
        return out
