"""Self- and cross-attention as sub-layers: projections, norms inside, softmax, output projection."""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from megnorm.layers.env import Context, Env
from megnorm.layers.linear import ColumnParallelLinear, Out, RowParallelLinear, Share
from megnorm.layers.norm import norm_or_identity
from megnorm.layers.sublayer import SubLayer
from megnorm.models.config import ModelConfig
from megnorm.norms import scheme
from megnorm.parallel.layout import Layout, Matrix, parameter


class SelfAttention(SubLayer):
    """Multi-head attention with grouped key/value heads: [s, b, d] -> [s, b, d].

    q, k, v leave one GEMM; q, k, v norms before RoPE; the context norm and the paper's head scale before W_o.
    """

    grows = True  # with every token that is decoded

    def __init__(self, spec: scheme.Attention, cfg: ModelConfig, env: Env, name: str) -> None:
        super().__init__(spec, cfg.width, cfg.dropout, env, name)
        h, kv, hd = cfg.heads, cfg.kv, cfg.hd
        self.hd = hd
        self._build_projections(cfg, env)
        self.q_norm = norm_or_identity(spec.q, "q", h, hd, env)
        self.k_norm = norm_or_identity(spec.k, "k", kv, hd, env)
        self.v_norm = norm_or_identity(spec.v, "v", kv, hd, env)
        self.context_norm = norm_or_identity(spec.context, "context", h, hd, env)
        self.o = RowParallelLinear(h * hd, cfg.width, "o", env, bias=cfg.bias)
        self.scale_place = spec.head_scale
        if spec.head_scale is not None:
            self.head_scale = parameter(*_head_scale(spec.head_scale, h, env))
        self.attention_dropout, self.rng, self.core_name = cfg.attention_dropout, env.rng, f"{name}.core"
        self.attend = env.kernel("attention", head_dim=hd, dropout=cfg.attention_dropout > 0)
        self.rope = env.kernel("rope")

    def _build_projections(self, cfg: ModelConfig, env: Env) -> None:
        q, k, v = Out("q", cfg.heads, cfg.hd), Out("k", cfg.kv, cfg.hd), Out("v", cfg.kv, cfg.hd)
        self.qkv = ColumnParallelLinear(cfg.width, (q, k, v), env, bias=cfg.bias)

    def project(self, u: Tensor, context: Context) -> tuple[Tensor, ...]:
        """q, k and v of the sub-layer's input [s, b, d], each [s, b, rows / tp]."""
        return self.qkv(u)

    def body(self, u: Tensor, context: Context) -> Tensor:
        y = self.recompute("attention", partial(self._core, context=context), *self.project(u, context))
        y = self.recompute("projections", self.o, y)
        if self.scale_place == "post_projection":
            y = self.recompute("norms", self._scale_slices, y)
        return y

    def _core(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """All between the two GEMMs: q [s, b, h hd / tp], k, v [s, b, kv hd / tp] -> [s, b, h hd / tp]."""
        q = self.q_norm(q).unflatten(-1, (-1, self.hd))
        k = self.k_norm(k).unflatten(-1, (-1, self.hd))
        v = self.v_norm(v).unflatten(-1, (-1, self.hd))
        if context.rope is not None:
            q, k = self.rope(q, *context.rope), self.rope(k, *context.rope)
        if context.cache is not None and self.grows:
            k, v = context.cache.extend(self.core_name, k, v)
        # W_o's GEMM would make a contiguous copy of its own, which it would save beside this tensor.
        y = self.context_norm(self._attend(q, k, v, context).flatten(2).contiguous())
        return self.recompute("norms", self._scale_slices, y) if self.scale_place == "pre_projection" else y

    def _scale_slices(self, y: Tensor) -> Tensor:
        return (y.unflatten(-1, (len(self.head_scale), -1)) * self.head_scale[:, None]).flatten(2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        p = self.attention_dropout if self.training else 0.0
        with self.rng.as_default(self.core_name, local=True) if p > 0.0 else nullcontext():
            return self.attend(
                q,
                k,
                v,
                mask=context.mask,
                documents=context.documents,
                dropout=p,
                causal=context.causal,
                bias=context.bias,
            )


class CrossAttention(SelfAttention):
    """Attention of a decoder to the encoder's output: q of the stream, k and v of ``Context.memory``."""

    grows = False

    def _build_projections(self, cfg: ModelConfig, env: Env) -> None:
        self.query = ColumnParallelLinear(cfg.width, (Out("q", cfg.heads, cfg.hd),), env, bias=cfg.bias)
        both = (Out("k", cfg.kv, cfg.hd), Out("v", cfg.kv, cfg.hd))
        self.key_value = ColumnParallelLinear(cfg.width, both, env, bias=cfg.bias)

    def project(self, u: Tensor, context: Context) -> tuple[Tensor, ...]:
        memory = context.memory
        assert memory is not None, "a decoder's context has the encoder's output"
        if context.cache is None:
            return *self.query(u), *self.key_value(memory)
        return *self.query(u), *context.cache.once(self.core_name, lambda: self.key_value(memory))

    def body(self, u: Tensor, context: Context) -> Tensor:
        return super().body(u, replace(context, rope=None, mask=context.memory_mask, causal=False, bias=None))


def _head_scale(place: str, heads: int, env: Env) -> tuple[Tensor, Layout]:
    """One scalar a head: split with the heads before W_o, whole after it (norms/sites.py)."""
    if place == "pre_projection":
        share = Share.of(heads, env.mesh)
        held = Matrix("", "scale", (heads,), (share.first,), (share.count,))
        return env.full((share.count,), 1.0), Layout((held,))
    partial = "tp" if env.mesh.sequence_parallel else None
    whole = Layout.whole((heads,), "scale", grad_sum=partial, owner=env.mesh.tp.rank == 0)
    return env.full((heads,), 1.0), whole


def attention_mask(tokens: Tensor, padding_id: int | None) -> Tensor | None:
    """[b, 1, s, s] bool for tokens [s, b]: causal, and nobody looks at padding; None without a padding token.

    A row that could look at nothing (padding before the first token) looks at itself, so that softmax stays finite.
    """
    if padding_id is None:
        return None
    s = tokens.shape[0]
    causal = torch.ones(s, s, dtype=torch.bool, device=tokens.device).tril()
    mask = causal & (tokens != padding_id).t()[:, None, None, :]
    blind = ~mask.any(-1, keepdim=True)
    return mask | (blind & torch.eye(s, dtype=torch.bool, device=tokens.device))


def padding_mask(real: Tensor | None) -> Tensor | None:
    """[b, 1, 1, s] bool for real tokens [s, b]: nobody looks at padding. A row that is padding alone looks everywhere, so
    that softmax stays finite."""
    return None if real is None else (real | ~real.any(0)).t()[:, None, None, :]


def causal_mask(s: int, device: torch.device) -> Tensor:
    """[1, 1, s, s] bool, for scores that have a bias as well."""
    return torch.ones(s, s, dtype=torch.bool, device=device).tril()[None, None]
