"""The feed-forward sub-layer, plain or gated."""

from torch import Tensor

from megnorm.layers.env import Context, Env
from megnorm.layers.linear import ColumnParallelLinear, Out, RowParallelLinear
from megnorm.layers.norm import norm_or_identity
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
        self.act = env.kernel("activation", kind=GATED.get(cfg.activation, cfg.activation))

    def body(self, u: Tensor, context: Context) -> Tensor:
        inner = self.inner_norm(self.recompute("activations", self._activate, self.up.linear(u)))
        return self.recompute("projections", self.down, inner)

    def _activate(self, h: Tensor) -> Tensor:
        if not self.gated:
            return self.act(h)
        gate, up = h.split(self.up.sizes, dim=-1)
        return self.act(gate) * up
