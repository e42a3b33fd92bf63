"""Self- and cross-attention as sub-layers: projections, norms inside, softmax, output projection."""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from megnorm.kernels.registry import Scores
from megnorm.layers import fused
from megnorm.layers.env import Context, Env
from megnorm.layers.linear import ColumnParallelLinear, Out, RowParallelLinear, Share
from megnorm.layers.norm import NormLayer, norm_or_identity
from megnorm.layers.rope import alibi_slopes
from megnorm.layers.sublayer import SubLayer
from megnorm.models.config import ModelConfig
from megnorm.norms import scheme
from megnorm.parallel.layout import Layout, Matrix, parameter


class SelfAttention(SubLayer):
    """Multi-head attention with grouped key/value heads: [s, b, d] -> [s, b, d].

    q, k, v leave one GEMM; q, k, v norms before RoPE; the context norm and the paper's head scale before W_o.
    causal: a token sees none behind it. window: how many it sees, itself included; None: all before it.
    """

    grows = True  # with every token that is decoded

    def __init__(
        self,
        spec: scheme.Attention,
        cfg: ModelConfig,
        env: Env,
        name: str,
        *,
        causal: bool = True,
        window: int | None = None,
    ) -> None:
        super().__init__(spec, cfg.width, cfg.dropout, env, name)
        h, kv, hd = cfg.heads, cfg.kv, cfg.hd
        self.hd = hd
        self._build_projections(cfg, env)
        self.q_norm = norm_or_identity(spec.q, "q", h, hd, env)
        self.k_norm = norm_or_identity(spec.k, "k", kv, hd, env)
        self.v_norm = norm_or_identity(spec.v, "v", kv, hd, env)
        self.context_norm = norm_or_identity(spec.context, "context", h, hd, env)
        self.o = RowParallelLinear(h * hd, cfg.width, "o", env, bias=cfg.biased_o)
        self.scale_place = spec.head_scale
        if spec.head_scale is not None:
            self.head_scale = parameter(*_head_scale(spec.head_scale, h, env))
            slices = len(self.head_scale)
            features = hd if spec.head_scale == "pre_projection" else cfg.width // h
            self.scale_heads = env.kernel("head_scale", heads=slices, head_dim=features)
        self.attention_dropout, self.rng, self.core_name = cfg.attention_dropout, env.rng, f"{name}.core"
        local = {"heads": Share.of(h, env.mesh).count, "kv_heads": Share.of(kv, env.mesh).count, "head_dim": hd}
        self.windowed = window is not None
        self.attend = env.kernel(
            "attention",
            mask=cfg.padding_id is not None or not causal,
            causal=causal,
            biased=self.grows and cfg.relative_buckets is not None,
            packed=env.packed,
            dropout=cfg.attention_dropout > 0,
            scores=score_features(cfg, env, window),
            **local,
        )
        self.rope = env.kernel("rope", head_dim=hd)
        self.prepare = fused.heads((self.q_norm, self.k_norm, self.v_norm), env, **local)

    def _build_projections(self, cfg: ModelConfig, env: Env) -> None:
        q, k, v = Out("q", cfg.heads, cfg.hd), Out("k", cfg.kv, cfg.hd), Out("v", cfg.kv, cfg.hd)
        self.qkv = ColumnParallelLinear(cfg.width, (q, k, v), env, bias=cfg.biased_qkv)
        self.entry = fused.entry(self, self.qkv, env)

    def project(self, u: Tensor, context: Context) -> tuple[Tensor, ...]:
        """q, k and v of the sub-layer's input [s, b, d], each [s, b, rows / tp]."""
        return self.qkv(u)

    def body(self, u: Tensor, context: Context, h: Tensor | None = None) -> Tensor:
        qkv = self.project(u, context) if h is None else h.split(self.qkv.sizes, dim=-1)
        y = self.recompute("attention", partial(self._core, context=context), *qkv)
        y = self.recompute("projections", self.o, y)
        if self.scale_place == "post_projection":
            y = self.recompute("norms", self._scale_slices, y)
        return y

    def _core(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """All between the two GEMMs: q [s, b, h hd / tp], k, v [s, b, kv hd / tp] -> [s, b, h hd / tp]."""
        q, k, v = self._normalize_and_rotate(q, k, v, context.window_rope if self.windowed else context.rope)
        if context.cache is not None and self.grows:
            k, v = context.cache.extend(self.core_name, k, v)
        # W_o's GEMM would make a contiguous copy of its own, which it would save beside this tensor.
        y = self.context_norm(self._attend(q, k, v, context).flatten(2).contiguous())
        return self.recompute("norms", self._scale_slices, y) if self.scale_place == "pre_projection" else y

    def _normalize_and_rotate(
        self, q: Tensor, k: Tensor, v: Tensor, rope: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """-> q [s, b, h / tp, hd], k, v [s, b, kv / tp, hd]."""
        norms = (self.q_norm, self.k_norm, self.v_norm)
        if self.prepare is not None and not fused.watched(*norms):
            q, k, v = (x.unflatten(-1, (-1, self.hd)) for x in (q, k, v))
            given = (
                norm.given(x) if isinstance(norm, NormLayer) else None for norm, x in zip(norms, (q, k, v), strict=True)
            )
            q, k, v = self.prepare(q, k, v, tuple(given), rope)
            return q, k, v
        q, k, v = (norm(x).unflatten(-1, (-1, self.hd)) for norm, x in zip(norms, (q, k, v), strict=True))
        return (q, k, v) if rope is None else (self.rope(q, *rope), self.rope(k, *rope), v)

    def _scale_slices(self, y: Tensor) -> Tensor:
        return self.scale_heads(y, self.head_scale)

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
        self.query = ColumnParallelLinear(cfg.width, (Out("q", cfg.heads, cfg.hd),), env, bias=cfg.biased_qkv)
        both = (Out("k", cfg.kv, cfg.hd), Out("v", cfg.kv, cfg.hd))
        self.key_value = ColumnParallelLinear(cfg.width, both, env, bias=cfg.biased_qkv)

    def project(self, u: Tensor, context: Context) -> tuple[Tensor, ...]:
        memory = context.memory
        assert memory is not None, "a decoder's context has the encoder's output"
        if context.cache is None:
            return *self.query(u), *self.key_value(memory)
        return *self.query(u), *context.cache.once(self.core_name, lambda: self.key_value(memory))

    def body(self, u: Tensor, context: Context, h: Tensor | None = None) -> Tensor:
        alone = replace(context, rope=None, mask=context.memory_mask, causal=False, bias=None)
        return super().body(u, alone, h)


def score_features(cfg: ModelConfig, env: Env, window: int | None) -> Scores:
    """What attention asks of its kernel, for the query heads of this rank."""
    share = Share.of(cfg.heads, env.mesh)
    slopes = alibi_slopes(cfg.heads)[share.first : share.first + share.count] if cfg.positions == "alibi" else ()
    return Scores(cfg.attention.scale, cfg.attention.softcap, window, slopes)


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
