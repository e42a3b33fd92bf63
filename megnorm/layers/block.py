"""A transformer layer, the sub-layers of one resolved Layer; and a stack of them."""

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from megnorm.layers.attention import SelfAttention
from megnorm.layers.env import Context, Env
from megnorm.layers.ffn import FeedForward
from megnorm.layers.moe import MoE
from megnorm.models.config import ModelConfig
from megnorm.norms import scheme


class Block(nn.Module):
    """Attention, then feed-forward: [s, b, d] -> [s, b, d]. With ``parallel_block`` both read the layer's input.

    index: global, 0-based.
    """

    def __init__(self, layer: scheme.Layer, cfg: ModelConfig, env: Env, index: int) -> None:
        super().__init__()
        self.parallel = cfg.parallel_block
        self.attention = SelfAttention(layer.attention, cfg, env, f"blocks.{index}.attention")
        feed_forward = MoE if cfg.sparse(index) else FeedForward
        self.ffn = feed_forward(layer.ffn, cfg, env, f"blocks.{index}.ffn")
        for name in ("skip", "branch"):
            mine, other = getattr(layer.ffn.residual, name), getattr(layer.attention.residual, name)
            if mine.shared and other.shared and mine.learned is not None:
                setattr(self.ffn.residual, name, getattr(self.attention.residual, name))

    def forward(self, x: Tensor, context: Context) -> Tensor:
        y = self.attention(x, context, layer_input=x)
        return self.ffn(y, context, layer_input=x, read=x if self.parallel else None)


def run_blocks(blocks: Sequence[nn.Module], x: Tensor, context: Context, env: Env) -> Tensor:
    """The blocks of a stage, one after the other: [s, b, d] -> [s, b, d]; the first ones with recompute, if so asked."""
    count = len(blocks) if env.recompute.blocks is None else env.recompute.blocks
    with env.recompute.recording(env.rng):
        for block in blocks[:count]:
            x = env.recompute("block", partial(block, context=context), x)
    for block in blocks[count:]:
        x = block(x, context)
    return x
