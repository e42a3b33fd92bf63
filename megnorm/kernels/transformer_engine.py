"""Transformer Engine: norms, attention (dense and packed), cross entropy over a split vocabulary, Adam.

Its modules own their parameters; ours lie in our layers, with their layouts. So a module is built on ``meta`` and is lent our
parameters when it is called. Products, which it can quantize, are in te_products.py.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megnorm.kernels.flash_attn import hide_padding
from megnorm.kernels.libraries import Library, library, low_precision
from megnorm.kernels.packing import boundaries
from megnorm.kernels.registry import Need, Refusal, offer
from megnorm.kernels.torch_ref import NormArgs, Params

BACKEND = "transformer_engine"
TE = library(
    Library(
        "transformer_engine",
        "transformer-engine",
        ((("transformer_engine.pytorch",), ("LayerNorm", "RMSNorm", "DotProductAttention")),),
        "pip install --no-build-isolation transformer-engine[pytorch] (megnorm[te])",
    )
)
LOSS = library(
    Library(
        "transformer_engine cross entropy",
        "transformer-engine",
        ((("transformer_engine.pytorch",), ("parallel_cross_entropy",)),),
        "transformer-engine 2.2 or newer has it",
    )
)
ADAM = library(
    Library(
        "transformer_engine Adam",
        "transformer-engine",
        ((("transformer_engine.pytorch.optimizers",), ("FusedAdam",)),),
        "transformer-engine 2.0 or newer has it",
    )
)


def on_cuda(need: Need, which: Library = TE) -> Refusal:
    return "runs on CUDA devices" if need.device != "cuda" else which.missing()


def refuse_norm(need: Need) -> Refusal:
    form = need.norm
    if form.kind not in ("layernorm", "rmsnorm"):
        return f"has no {form.kind}"
    if form.gain != "vector":
        return f"takes a gain for each feature in the dtype of activations, not {form.gain}"
    if form.bias != (form.kind == "layernorm"):
        return "its LayerNorm has a bias and its RMSNorm has none (model.norm.bias)"
    if form.cast_first and form.kind == "rmsnorm" and low_precision(need):
        return "rounds after the gain; set model.norm.cast to after_gain"
    if need.dtype == torch.float64:
        return "computes in fp32"
    return on_cuda(need)


@offer("norm", BACKEND, 40, refuse_norm)
def make_norm(need: Need) -> Callable[[Tensor, Params, NormArgs], Tensor]:
    kind = "LayerNorm" if need.norm.kind == "layernorm" else "RMSNorm"
    built: dict[float, Any] = {}

    def norm(x: Tensor, p: Params, args: NormArgs) -> Tensor:
        module = built.get(args.eps)
        if module is None:
            module = getattr(TE.module(), kind)(need.norm.width, eps=args.eps, device="meta", dtype=need.dtype)
            module.requires_grad_(False)
            built[args.eps] = module
        for name, param in p.items():
            module._parameters[name] = param.contiguous()
        y: Tensor = module(x)
        return y

    return norm


def refuse_attention(need: Need) -> Refusal:
    if need.mask:
        return "serves a mask beside causality only by materialized scores; kernels.prefer.attention can ask for it"
    return _refuse_attention(need)


def refuse_masked(need: Need) -> Refusal:
    return _refuse_attention(need) if need.mask else "serves masks alone"


def _refuse_attention(need: Need) -> Refusal:
    if not low_precision(need):
        return "is meant for bf16 and fp16"
    if need.biased:
        return "adds no bias to scores"
    if need.mask and need.packed:
        return "takes packed documents or a mask, not both"
    if need.packed and need.capture:
        return "document lengths change from graph to graph"
    return on_cuda(need)


@offer("attention", BACKEND, 40, refuse_attention)
@offer("attention", BACKEND, -3, refuse_masked)
def make_attention(need: Need) -> Callable[..., Tensor]:
    """kernels/torch_ref.py says what it means. [s, b, heads, hd] is its sbhd; it merges heads, and masks where True."""
    if need.deterministic:
        os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"  # read when its module is built
    built: dict[float, Any] = {}

    def core(dropout: float) -> Any:
        if dropout not in built:
            # Head counts of this rank: TE would divide by tp_size. Our dropout stream stands in torch's default generator.
            built[dropout] = TE.module().DotProductAttention(
                need.heads,
                need.head_dim,
                num_gqa_groups=need.kv_heads,
                attention_dropout=dropout,
                qkv_format="sbhd",
                tp_size=1,
            )
        return built[dropout]

    def attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Tensor | None,
        documents: tuple[int, ...] | None,
        dropout: float,
        causal: bool = True,
        bias: Tensor | None = None,
    ) -> Tensor:
        assert (need.causal or not causal) and bias is None, "what the layer asked for when it was built"
        out: Tensor
        if documents is not None:
            ends, longest = boundaries(documents, q.device)
            out = core(dropout)(
                q.squeeze(1),
                k.squeeze(1),
                v.squeeze(1),
                qkv_format="thd",
                attn_mask_type="padding_causal" if causal else "padding",
                cu_seqlens_q=ends,
                cu_seqlens_kv=ends,
                max_seqlen_q=longest,
                max_seqlen_kv=longest,
            )
        elif mask is not None:  # ours says who may look and holds causality; its own says who may not
            out = core(dropout)(q, k, v, attention_mask=~mask, attn_mask_type="arbitrary")
        else:  # a decoder's next token, too, sees all that is cached
            assert not causal or len(q) == len(k), "causality would be aligned otherwise"
            out = core(dropout)(q, k, v, attn_mask_type="causal" if causal else "no_mask")
        return out.reshape(q.shape)

    return attention


def refuse_loss(need: Need) -> Refusal:
    if need.dtype not in (torch.bfloat16, torch.float32):
        return "takes bf16 and fp32 alone"
    return on_cuda(need, LOSS)


@offer("cross_entropy", BACKEND, 30, refuse_loss)
def make_loss(need: Need) -> Callable[..., Tensor]:
    """fn(logits [s, b, v / ranks], labels [s, b], first, logical, axis) -> [s, b] in fp32."""

    def loss(logits: Tensor, labels: Tensor, first: int, logical: int, axis: Any) -> Tensor:
        group = axis.group if axis.size > 1 else None
        # By position: the first parameter was renamed once. Label smoothing, mean, group, ignored label.
        out: Tensor = LOSS.module().parallel_cross_entropy(
            hide_padding(logits, logical), labels, 0.0, False, group, -100
        )
        return out

    return loss


def refuse_adam(need: Need) -> Refusal:
    return "updates fp32 masters" if need.dtype != torch.float32 else on_cuda(need, ADAM)


# torch's own is one kernel a group too: it serves who asks for it.
@offer("adamw", BACKEND, -1, refuse_adam)
def make_adam(need: Need) -> Callable[..., torch.optim.Optimizer]:
    def adam(groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float) -> Any:
        return ADAM.module().FusedAdam(groups, lr=lr, betas=betas, eps=eps, adam_w_mode=True, bias_correction=True)

    return adam
