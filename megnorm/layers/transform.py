"""What stands between an encoder and a masked-LM head in BERT and its like."""

import torch.nn.functional as F
from torch import Tensor, nn

from megnorm.layers.env import Env
from megnorm.layers.norm import NormLayer
from megnorm.models.config import GATED, ModelConfig
from megnorm.norms.resolve import plain_norm
from megnorm.parallel.layout import Layout, parameter


class HeadTransform(nn.Module):
    """N(act(W x + b)): [s, b, d] -> same ([s/tp, b, d] with sequence parallelism). Every tp rank holds it whole."""

    def __init__(self, cfg: ModelConfig, env: Env) -> None:
        super().__init__()
        d = cfg.width
        partial, owner = "tp" if env.mesh.sequence_parallel else None, env.mesh.tp.rank == 0
        self.weight = parameter(env.empty(d, d), Layout.whole((d, d), "head", grad_sum=partial, owner=owner))
        self.bias = parameter(env.full((d,), 0.0), Layout.whole((d,), "bias", grad_sum=partial, owner=owner))
        self.act = env.kernel("activation", kind=GATED.get(cfg.activation, cfg.activation))
        self.norm = NormLayer(plain_norm(cfg.norm), "final", 1, d, env)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.act(F.linear(x, self.weight, self.bias)))
        return y
