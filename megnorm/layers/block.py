"""A transformer layer, the sub-layers of one resolved Layer; and a stack of them."""

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from megnorm.layers import fused
from megnorm.layers.attention import CrossAttention, SelfAttention
from megnorm.layers.env import Context, Env
from megnorm.layers.ffn import FeedForward
from megnorm.layers.moe import MoE
from megnorm.models.config import ModelConfig
from megnorm.norms import scheme


class Block(nn.Module):
    """Attention, then feed-forward: [s, b, d] -> [s, b, d] (n streams: [n, s, b, d]). With
    ``parallel_block`` both read the layer's input, through a norm each or through one.

    index: global in its stack, 0-based. stack: "" or the stack's path with a dot. causal: nobody looks to its right. cross:
    attention to ``Context.memory`` stands between the two.
    """

    def __init__(
        self,
        layer: scheme.Layer,
        cfg: ModelConfig,
        env: Env,
        index: int,
        *,
        stack: str = "",
        causal: bool = True,
        cross: bool = False,
    ) -> None:
        super().__init__()
        self.parallel, self.one_norm = cfg.parallel_block, cfg.parallel_norm == "one"
        path, window = f"{stack}blocks.{index}", cfg.attention.window_of(index)
        self.attention = SelfAttention(layer.attention, cfg, env, f"{path}.attention", causal=causal, window=window)
        self.cross_attention: CrossAttention | None = None
        if cross:
            spec = layer.cross_attention or layer.attention
            self.cross_attention = CrossAttention(spec, cfg, env, f"{path}.cross_attention", causal=False)
        feed_forward = MoE if cfg.sparse(index) else FeedForward
        self.ffn = feed_forward(layer.ffn, cfg, env, f"{path}.ffn")
        others = (self.ffn,) if self.cross_attention is None else (self.cross_attention, self.ffn)
        for name in ("skip", "branch", "gate"):
            first = getattr(layer.attention.residual, name)
            if first is not None and first.shared:
                for other in others:
                    setattr(other.residual, name, getattr(self.attention.residual, name))
        adjacent = not self.parallel and not cross and isinstance(self.ffn, FeedForward)
        adjacent = adjacent and self.attention.single
        self.boundary = fused.boundary(self.attention, self.ffn, cfg.dropout, env) if adjacent else None

    def forward(self, x: Tensor, context: Context) -> Tensor:
        first, second = self.attention, self.ffn
        if self.boundary is not None and not self.boundary.watched(first, first.output_norm, second.input_norm):
            u, y = first.branch(x, context)
            y, u = self.boundary(first, second, x, u, y)
            return second(y, context, layer_input=x, u=u)
        if self.one_norm:
            u = first.input_norm(x)
            return second(first(x, context, layer_input=x, u=u), context, layer_input=x, u=u)
        y = self.attention(x, context, layer_input=x)
        if self.cross_attention is not None:
            y = self.cross_attention(y, context, layer_input=x)
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
