"""A stack of layers with its embedding and final norm, or the slice of it that one pipeline stage holds."""

from dataclasses import replace
from functools import partial

from torch import Tensor, nn

from megnorm.layers import streams
from megnorm.layers.attention import padding_mask
from megnorm.layers.block import Block, run_blocks
from megnorm.layers.embedding import Embedding
from megnorm.layers.env import Context, Env
from megnorm.layers.norm import norm_or_identity
from megnorm.layers.relative import RelativeBias
from megnorm.layers.rope import rotations
from megnorm.models.config import ModelConfig
from megnorm.norms.resolve import Resolved
from megnorm.parallel.collectives import slice_sequence


class Stack(nn.Module):
    """The layers [first, last) of a stack, embed before the first of all and the final norm behind the last.

    name: "" or the stack's path with a dot. causal: nobody looks to its right. cross: layers read ``Context.memory`` too.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        resolved: Resolved,
        env: Env,
        layers: tuple[int, int],
        embed: Embedding | None,
        *,
        name: str = "",
        causal: bool = False,
        cross: bool = False,
    ) -> None:
        super().__init__()
        self.cfg, self.env, self.causal, self.streams = cfg, env, causal, resolved.streams
        begin, end = layers
        self.begins, self.ends = begin == 0, end == len(resolved.layers)
        if embed is not None:
            self.embed = embed
        self.relative: RelativeBias | None = None
        if cfg.relative_buckets is not None:
            tie = None if self.begins and self.ends else f"{name}relative"
            self.relative = RelativeBias(cfg, env, bidirectional=not causal, tie=tie, copy=not self.begins)
        block = partial(Block, stack=name, causal=causal, cross=cross)
        made = {
            str(i): block(resolved.layers[i], cfg, env.block(i, len(resolved.layers)), i) for i in range(begin, end)
        }
        self.blocks = nn.ModuleDict(made)
        if self.ends:
            self.joined = streams.end(resolved.streams, cfg.width, env)
            self.final_norm = norm_or_identity(resolved.final, "final", 1, cfg.width, env)

    def units(self) -> list[nn.Module]:
        """The parts that ``run`` and its caller's embedding of tokens call, in order."""
        return [
            *([self.embed] if self.begins else []),
            *([self.relative] if self.relative is not None else []),
            *self.blocks.values(),
            *([self.joined, self.final_norm] if self.ends else []),
        ]

    def start(self, tokens: Tensor, where: Tensor, real: Tensor | None, segments: Tensor | None = None) -> Tensor:
        """The embedding of tokens [s, b] at positions [s] or [s, b]; zero where there is no real token."""
        x: Tensor = self.embed(tokens, where, segments)
        if real is not None:
            x = x * slice_sequence(real, self.env.mesh.sp)[..., None].to(x.dtype)
        return streams.begin(x, self.streams)

    def run(self, x: Tensor, where: Tensor, real: Tensor | None, context: Context | None = None) -> Tensor:
        """Layers, and the final norm: [s, b, d] -> same ([s/tp, b, d] with sequence parallelism).

        where: positions of the whole sequence, or with ``Context.cache`` of the one token behind those in it. real: [s, b]
        bool, of a stack that is not causal. context: what a decoder's has beside.
        """
        context = context or Context()
        mask, bias, alone = padding_mask(real), None, context.cache is not None
        rope, window_rope = rotations(self.cfg, where, x.dtype)
        if self.relative is not None:
            bias = self.relative(int(where[-1]) + 1 if alone else len(where)).to(x.dtype)
            bias = bias[:, :, -1:] if alone else bias
        context = replace(
            context, rope=rope, window_rope=window_rope, mask=mask, bias=bias, causal=self.causal and not alone
        )
        x = run_blocks(list(self.blocks.values()), x, context, self.env)
        return self.final_norm(self.joined(x)) if self.ends else x
