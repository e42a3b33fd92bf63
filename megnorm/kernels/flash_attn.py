"""flash-attn: attention of versions 2, 3 and 4; and the Triton norm and cross entropy that come with version 2.

Its layouts are [b, s, heads, hd], and [tokens, heads, hd] for packed documents; heads stay apart, key/value heads are not
repeated. Its causal mask is aligned bottom-right, which is ours as long as queries and keys are equally many.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megnorm.kernels.libraries import Library, accepts, library, low_precision, no_device
from megnorm.kernels.packing import boundaries
from megnorm.kernels.registry import Need, Refusal, offer
from megnorm.kernels.torch_ref import NormArgs, Params

FUNCTIONS = ("flash_attn_func", "flash_attn_varlen_func")
V2 = library(
    Library(
        "flash-attn 2",
        "flash-attn",
        ((("flash_attn",), FUNCTIONS),),
        "pip install --no-build-isolation flash-attn (megnorm[flash]), without flash-attn-4 beside it",
    )
)
V3 = library(
    Library(
        "flash-attn 3",
        "flash-attn-3",
        ((("flash_attn_interface", "flash_attn_3.flash_attn_interface"), FUNCTIONS),),
        "build it in hopper/ of the flash-attention repository",
        capability=(9, 0),
    )
)
V4 = library(
    Library(
        "flash-attn 4",
        "flash-attn-4",
        ((("flash_attn.cute",), FUNCTIONS),),
        "pip install flash-attn-4, without flash-attn beside it",
        capability=(9, 0),
    )
)
NORMS = library(
    Library(
        "flash-attn norms",
        "flash-attn",
        ((("flash_attn.ops.triton.layer_norm",), ("layer_norm_fn",)),),
        "they come with flash-attn 2",
    )
)
LOSS = library(
    Library(
        "flash-attn cross entropy",
        "flash-attn",
        ((("flash_attn.ops.triton.cross_entropy",), ("cross_entropy_loss",)),),
        "it comes with flash-attn 2",
    )
)
LARGEST_ROW = 65536  # bytes


def _refuse(need: Need, which: Library, *, dropout: bool) -> Refusal:
    if not low_precision(need):
        return "takes bf16 and fp16 alone"
    if need.mask:
        return "takes no mask beside causality (model.padding_id asks for one)"
    if need.biased:
        return "adds no bias to scores"
    if need.head_dim > 256:
        return f"takes heads up to 256, not {need.head_dim}"
    if need.dropout and not dropout:
        return "has no dropout (model.attention_dropout)"
    if need.packed and need.capture:
        return "document lengths change from graph to graph"
    if need.device != "cuda":
        return "runs on CUDA devices"
    reason = which.missing()
    if reason is None and need.deterministic and not accepts(which.module().flash_attn_func, "deterministic"):
        return "this version has no deterministic backward"
    return reason


def refuse_2(need: Need) -> Refusal:
    return _refuse(need, V2, dropout=True)


def refuse_3(need: Need) -> Refusal:
    if no_device() is None and torch.cuda.get_device_capability()[0] != 9:
        return "is written for Hopper"
    return _refuse(need, V3, dropout=False)


def refuse_4(need: Need) -> Refusal:
    if need.head_dim % 8:
        return f"takes heads of multiples of 8, not {need.head_dim}"
    if need.head_dim > 128 and no_device() is None and torch.cuda.get_device_capability()[0] >= 10:
        return f"takes heads up to 128 on this device, not {need.head_dim}"
    return _refuse(need, V4, dropout=False)


def _attention(
    library: Library, fixed: Mapping[str, Any], droppable: bool, q: Tensor, k: Tensor, v: Tensor,
    *, mask: Tensor | None, documents: tuple[int, ...] | None, dropout: float, causal: bool = True, bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """kernels/torch_ref.py says what it means."""
    assert mask is None and bias is None, "refused when the layer was built"
    assert not causal or len(q) == len(k), "causality would be aligned otherwise"
    module, options = library.module(), dict(fixed)
    if droppable:
        options["dropout_p"] = dropout
    if documents is None:
        out = module.flash_attn_func(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), causal=causal, **options)
        return _output(out).transpose(0, 1)
    ends, longest = boundaries(documents, q.device)
    out = module.flash_attn_varlen_func(
        q.squeeze(1),
        k.squeeze(1),
        v.squeeze(1),
        cu_seqlens_q=ends,
        cu_seqlens_k=ends,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        causal=causal,
        **options,
    )
    return _output(out).unsqueeze(1)


def _output(result: Any) -> Tensor:
    """Some versions give the log-sum-exp too, asked or not."""
    out: Tensor = result[0] if isinstance(result, tuple) else result
    return out


def _make(library: Library, droppable: bool, need: Need) -> Callable[..., Tensor]:
    return partial(_attention, library, {"deterministic": True} if need.deterministic else {}, droppable)


@offer("attention", "flash_attn", 30, refuse_2)
def make_2(need: Need) -> Callable[..., Tensor]:
    return _make(V2, True, need)


# Versions 3 and 4 serve who asks for them: below the reference.
@offer("attention", "flash_attn_3", -1, refuse_3)
def make_3(need: Need) -> Callable[..., Tensor]:
    return _make(V3, False, need)


@offer("attention", "flash_attn_4", -2, refuse_4)
def make_4(need: Need) -> Callable[..., Tensor]:
    return _make(V4, False, need)


def refuse_norm(need: Need) -> Refusal:
    form = need.norm
    if form.kind not in ("layernorm", "rmsnorm"):
        return f"has no {form.kind}"
    if form.gain not in ("vector", "wide"):
        return f"takes a gain for each feature, not {form.gain}"
    if form.cast_first and form.kind == "rmsnorm" and low_precision(need):
        return "rounds after the gain; set model.norm.cast to after_gain"
    if form.width * need.dtype.itemsize > LARGEST_ROW:
        return f"rows of {form.width} features are too long for it"
    if need.dtype == torch.float64:
        return "computes in fp32"
    if need.deterministic:
        return "chooses its configuration by timing, and sums in the order of the configuration"
    return "runs on CUDA devices" if need.device != "cuda" else NORMS.missing()


@offer("norm", "flash_attn", 30, refuse_norm)
def make_norm(need: Need) -> Callable[[Tensor, Params, NormArgs], Tensor]:
    rms = need.norm.kind == "rmsnorm"

    def norm(x: Tensor, p: Params, args: NormArgs) -> Tensor:
        y: Tensor = NORMS.module().layer_norm_fn(
            x, p["weight"].contiguous(), p.get("bias"), eps=args.eps, is_rms_norm=rms
        )
        return y

    return norm


@offer("add_norm", "flash_attn", 20, refuse_norm)
def make_add_norm(need: Need) -> Callable[..., Any]:
    rms = need.norm.kind == "rmsnorm"

    def add_norm(x: Tensor, f: Tensor, p: Params, args: NormArgs, skip: float, branch: float, keep_sum: bool) -> Any:
        # It adds ``residual`` to rowscale * (its first argument): the factor of the skip makes the stream the first one.
        f = f if branch == 1.0 else f * branch
        scale = None if skip == 1.0 else torch.full(x.shape[:-1], skip, dtype=torch.float32, device=x.device)
        first, residual = (f, x) if scale is None else (x, f)
        out = NORMS.module().layer_norm_fn(
            first,
            p["weight"].contiguous(),
            p.get("bias"),
            residual=residual,
            eps=args.eps,
            rowscale=scale,
            prenorm=keep_sum,
            is_rms_norm=rms,
        )
        if args.scale == 1.0:
            return out
        return (out[0] * args.scale, out[1]) if keep_sum else out * args.scale

    return add_norm


def refuse_loss(need: Need) -> Refusal:
    if need.dtype == torch.float64:
        return "computes in fp32"
    return "runs on CUDA devices" if need.device != "cuda" else LOSS.missing()


@offer("cross_entropy", "flash_attn", 20, refuse_loss)
def make_loss(need: Need) -> Callable[..., Tensor]:
    """fn(logits [..., v / ranks], labels [...], first, logical, axis) -> [...] in fp32."""

    def loss(logits: Tensor, labels: Tensor, first: int, logical: int, axis: Any) -> Tensor:
        losses, _ = LOSS.module().cross_entropy_loss(
            hide_padding(logits, logical).flatten(0, -2),
            labels.flatten(),
            ignore_index=-100,
            process_group=axis.group if axis.size > 1 else None,
        )
        out: Tensor = losses
        return out.view(labels.shape)

    return loss


def hide_padding(logits: Tensor, logical: int) -> Tensor:
    """Columns that pad the vocabulary get no probability: written in place, for the head's product does not read it again.

    A finite number: a rank that holds nothing but padding must have a log-sum-exp.
    """
    if logical < logits.shape[-1]:
        logits[..., logical:] = torch.finfo(logits.dtype).min / 2
    return logits
