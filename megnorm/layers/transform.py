"""What stands behind an encoder beside the vocabulary's head: dense layers that every tensor-parallel rank holds whole."""

import torch.nn.functional as F
from torch import Tensor, nn

from megnorm.layers.env import Env
from megnorm.layers.norm import NormLayer
from megnorm.models.config import GATED, ModelConfig
from megnorm.norms.resolve import plain_norm
from megnorm.parallel.layout import Layout, parameter


class WholeLinear(nn.Module):
    """W x + b: [..., d_in] -> [..., d_out]. by_token: it sees a slice of the tokens with sequence parallelism."""

    def __init__(self, d_in: int, d_out: int, env: Env, *, by_token: bool) -> None:
        super().__init__()
        partial, owner = "tp" if by_token and env.mesh.sequence_parallel else None, env.mesh.tp.rank == 0
        whole = Layout.whole((d_out, d_in), "head", grad_sum=partial, owner=owner)
        self.weight = parameter(env.empty(d_out, d_in), whole)
        self.bias = parameter(env.full((d_out,), 0.0), Layout.whole((d_out,), "bias", grad_sum=partial, owner=owner))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class HeadTransform(nn.Module):
    """N(act(W x + b)) before a masked-LM head: [s, b, d] -> same ([s/tp, b, d] with sequence parallelism)."""

    def __init__(self, cfg: ModelConfig, env: Env) -> None:
        super().__init__()
        self.dense = WholeLinear(cfg.width, cfg.width, env, by_token=True)
        self.act = env.kernel("activation", kind=GATED.get(cfg.activation, cfg.activation))
        self.norm = NormLayer(plain_norm(cfg.norm), "final", 1, cfg.width, env)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.act(self.dense(x)))
        return y
