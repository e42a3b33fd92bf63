"""Layers of a megnorm model in transformers: embedding, attention, and the block that reads where its norms stand.

Needs torch, transformers and the four files it imports; shipped beside modeling_megnorm.py.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention_megnorm import eager_attention, rotate
from .configuration_megnorm import MegnormConfig
from .ffn_megnorm import FeedForward, MixtureOfExperts
from .norms_megnorm import Residual, Spec, SubLayer, make_norm, over_heads

LOG = math.log(10000.0)


class Embedding(nn.Module):
    """Token embedding times a constant, plus positions and token types; then a norm and dropout.

    rows: of a learned position table. table: False where another stack has the tokens' table.
    """

    def __init__(self, config: MegnormConfig, norm: Spec | None, rows: int, *, table: bool = True):
        super().__init__()
        self.config = config
        self.token = nn.Embedding(config.vocab_size, config.hidden_size) if table else None
        if config.segments:
            self.segment = nn.Embedding(config.segments, config.hidden_size)
        if config.positions == "learned":
            self.position = nn.Embedding(rows, config.hidden_size)
        self.norm = make_norm(norm, config.hidden_size)

    def forward(self, token: Tensor, positions: Tensor, real: Tensor | None, segments: Tensor | None = None) -> Tensor:
        """token: embeddings [b, s, d]; positions [b, s]; real [b, s] is False on padding, which has no position.

        segments: token types [b, s]; None: all 0.
        """
        x = token if self.config.embedding_scale == 1.0 else token * self.config.embedding_scale
        if self.config.positions in ("learned", "sinusoidal"):
            rows = self.position(positions) if self.config.positions == "learned" else self._waves(positions, x.dtype)
            x = x + (rows if real is None else rows * real[..., None])
        if self.config.segments:
            x = x + (self.segment.weight[0] if segments is None else self.segment(segments))
        return F.dropout(self.norm(x), self.config.dropout, self.training)

    def _waves(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """[sin(q w), cos(q w)], w_i = exp(-i log 10000 / (half - 1)); the first token has q = padding id + 1, or 1."""
        half, pad = self.config.hidden_size // 2, self.config.position_padding_id
        # in fp32 whatever the model's dtype, as in the first implementation, whose table is part of its models
        w = torch.exp(torch.arange(half, device=positions.device, dtype=torch.float32) * (-LOG / max(half - 1, 1)))
        angles = (positions + (1 if pad is None else pad + 1))[..., None].float() * w
        rows = torch.cat([angles.sin(), angles.cos()], -1)
        return F.pad(rows, (0, self.config.hidden_size - 2 * half)).to(dtype)


class Attention(SubLayer):
    """Self-attention and the norms and scales inside it: [b, s, d] after the input norm -> branch [b, s, d]."""

    def __init__(
        self, config: MegnormConfig, spec: Spec, layer_idx: int, *, causal: bool = True, first: Residual | None = None
    ):
        super().__init__()
        self.config, self.layer_idx, self.scaled, self.is_causal = config, layer_idx, spec["head_scale"], causal
        d, heads, kv, self.head_dim = (
            config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        )  # fmt: skip
        scale, windowed = config.attention_scale, causal and config.layer_types[layer_idx] == "sliding_attention"
        self.num_key_value_groups, self.scaling = heads // kv, self.head_dim**-0.5 if scale is None else scale
        self.sliding_window = config.sliding_window if windowed else None
        self.q = nn.Linear(d, heads * self.head_dim, bias=config.qkv_bias)
        self.k = nn.Linear(d, kv * self.head_dim, bias=config.qkv_bias)
        self.v = nn.Linear(d, kv * self.head_dim, bias=config.qkv_bias)
        self.o = nn.Linear(heads * self.head_dim, d, bias=config.o_bias)
        for site, n in (("q", heads), ("k", kv), ("v", kv), ("context", heads)):
            size = self.head_dim * (n if spec[site] and spec[site]["over"] == "width" else 1)
            setattr(self, f"{site}_norm", make_norm(spec[site], size, n))
        if self.scaled:
            self.head_scale = nn.Parameter(torch.ones(heads))
        self.surround(spec, d, first)

    def keys_and_values(self, x: Tensor, angles: tuple[Tensor, Tensor] | None, cache: Any) -> tuple[Tensor, Tensor]:
        """[b, kv, t, hd] each, of tokens x [b, s, d] and of those before them in the cache."""
        k = over_heads(self.k_norm, self.k(x), self.head_dim)
        v = over_heads(self.v_norm, self.v(x), self.head_dim).transpose(1, 2)
        k = (k if angles is None else rotate(k, angles)).transpose(1, 2)
        return (k, v) if cache is None else cache.update(k, v, self.layer_idx)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        angles: tuple[Tensor, Tensor] | None = None,
        past_key_values: Cache | None = None,
        memory: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """memory: [b, t, d], what keys and values are made of; None: the tokens themselves."""
        q = over_heads(self.q_norm, self.q(hidden_states), self.head_dim)
        q = (q if angles is None else rotate(q, angles)).transpose(1, 2)
        k, v = self.keys_and_values(hidden_states if memory is None else memory, angles, past_key_values)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        dropout = self.config.attention_dropout if self.training else 0.0
        kwargs |= {"softcap": self.config.attn_logit_softcapping, "sliding_window": self.sliding_window}
        context, weights = attend(self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        context = over_heads(self.context_norm, context, self.head_dim)
        if self.scaled == "pre_projection":
            context = context * self.head_scale[:, None]
        y = self.o(context.flatten(-2))
        if self.scaled == "post_projection":
            y = (y.unflatten(-1, (self.head_scale.shape[0], -1)) * self.head_scale[:, None]).flatten(-2)
        return F.dropout(self.output_norm(y), self.config.dropout, self.training), weights


class CrossAttention(Attention):
    """Attention of a decoder to the encoder's output, whose keys and values a cache has from the first token on."""

    def keys_and_values(self, x: Tensor, angles: None, cache: EncoderDecoderCache | None) -> tuple[Tensor, Tensor]:
        if cache is None:
            return super().keys_and_values(x, None, None)
        if not cache.is_updated.get(self.layer_idx):
            cache.is_updated[self.layer_idx] = True
            return super().keys_and_values(x, None, cache.cross_attention_cache)
        layer = cache.cross_attention_cache.layers[self.layer_idx]
        return layer.keys, layer.values


class Block(GradientCheckpointingLayer):
    """A transformer layer: residual sub-layers one after the other, or two side by side.

    spec: the layer's entry in ``config.norm``. causal: nobody looks to its right. cross: attention to the encoder's output
    stands between attention and feed-forward.
    """

    def __init__(self, config: MegnormConfig, spec: Spec, layer_idx: int, *, causal: bool = True, cross: bool = False):
        super().__init__()
        self.parallel, self.one_norm = config.parallel_block, config.parallel_norm == "one"
        self.attention = Attention(config, spec["attention"], layer_idx, causal=causal)
        first = self.attention.residual
        if cross:
            own = spec["cross_attention"] or spec["attention"]
            self.cross_attention = CrossAttention(config, own, layer_idx, causal=False, first=first)
        sparse = causal and layer_idx in config.sparse_layers
        self.ffn: SubLayer = (MixtureOfExperts if sparse else FeedForward)(config, spec["ffn"], first)

    def forward(
        self, hidden_states: Tensor, cross: dict[str, Any] | None = None, real: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """cross: memory, its mask and the cache, for cross-attention. real: [b, s], False on padding."""
        x, attention, ffn = hidden_states, self.attention, self.ffn
        stream, second, seen = attention.read(x)
        u = attention.input_norm(seen)
        y, _ = attention(u, **kwargs)
        middle = attention.write(stream, second, u, y, x)
        if cross is not None:
            other = self.cross_attention
            stream, second, seen = other.read(middle)
            u = other.input_norm(seen)
            y, _ = other(u, **cross)
            middle = other.write(stream, second, u, y, x, attention.residual)
        stream, second, seen = ffn.read(middle)
        if not self.one_norm:
            u = ffn.input_norm(x if self.parallel else seen)
        return ffn.write(stream, second, u, ffn(u, real), x, attention.residual)
