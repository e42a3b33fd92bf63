"""A transformer layer, the sub-layers of one resolved Layer; and a stack of them."""

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from megnorm.layers import fused
from megnorm.layers.attention import SelfAttention
from megnorm.layers.env import Context, Env
from megnorm.layers.ffn import FeedForward
from megnorm.models.config import ModelConfig
from megnorm.norms import scheme


class Block(nn.Module):
    """Attention, then feed-forward: [s, b, d] -> [s, b, d]. With ``parallel_block`` both read the layer's input.

    index: global, 0-based.
    """

    def __init__(self, layer: scheme.Layer, cfg: ModelConfig, env: Env, index: int) -> None:
        super().__init__()
        self.parallel = cfg.parallel_block
        window = cfg.attention.window_of(index)
        self.attention = SelfAttention(layer.attention, cfg, env, f"blocks.{index}.attention", window)
        self.ffn = FeedForward(layer.ffn, cfg, env, f"blocks.{index}.ffn")
        for name in ("skip", "branch"):
            mine, other = getattr(layer.ffn.residual, name), getattr(layer.attention.residual, name)
            if mine.shared and other.shared and mine.learned is not None:
                setattr(self.ffn.residual, name, getattr(self.attention.residual, name))
        self.boundary = None if self.parallel else fused.boundary(self.attention, self.ffn, cfg.dropout, env)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        first, second = self.attention, self.ffn
        if self.boundary is not None and not self.boundary.watched(first, first.output_norm, second.input_norm):
            u, y = first.branch(x, context)
            y, u = self.boundary(first, second, x, u, y)
            return second(y, context, layer_input=x, u=u)
        y = self.attention(x, context, layer_input=x)
        return self.ffn(y, context, layer_input=x, read=x if self.parallel else None)


def run_blocks(blocks: Sequence[nn.Module], x: Tensor, context: Context, env: Env) -> Tensor:
    """The blocks of a stage, one after the other: [s, b, d] -> [s, b, d]; the first ones with recompute, if so asked."""
    count = len(blocks) if env.recompute.blocks is None else env.recompute.blocks
    with env.region():
        with env.recompute.recording(env.rng):
            for block in blocks[:count]:
                x = env.recompute("block", partial(block, context=context), x)
        for block in blocks[count:]:
            x = block(x, context)
    return x
