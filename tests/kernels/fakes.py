"""The libraries as their records describe them: calls must bind, layouts and dtypes must be right, results are PyTorch's.

Nothing here is taken from our own reference, so a mistake in our wiring is not repeated by its judge.
"""

from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kernels import fakes_te
from tests.kernels.faking import Adam, normalized, packed_attention, record, softmax_attention, triangle

LOW = (torch.bfloat16, torch.float16)


def check_flash(q: Tensor, k: Tensor, v: Tensor) -> None:
    for x in (q, k, v):
        assert x.dtype in LOW, "fp16 and bf16 alone"
        assert x.stride(-1) == 1, "the last dimension must be contiguous"
        assert x.dtype == q.dtype
    assert q.shape[-2] % k.shape[-2] == 0
    assert k.shape == v.shape


def flash_attention(name: str) -> Any:
    """b s h d in and out; windows and ALiBi are not asked for; bottom-right."""

    def dense(*args: Any, **kwargs: Any) -> Tensor:
        given = record(name, args, kwargs)
        q, k, v = (given[key] for key in "qkv")
        assert q.dim() == 4 and q.shape[0] == k.shape[0], "[b, s, h, hd]"
        check_flash(q, k, v)
        allowed = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool)
        if given.get("causal", False):
            allowed = triangle(q.shape[1], k.shape[1], bottom_right=True)
        out = softmax_attention(*(x.transpose(1, 2) for x in (q, k, v)), allowed)
        return out.transpose(1, 2)

    return dense


def flash_attention_varlen(name: str) -> Any:
    def packed(*args: Any, **kwargs: Any) -> Tensor:
        given = record(name, args, kwargs)
        q, k, v = (given[key] for key in "qkv")
        assert q.dim() == 3, "[tokens, h, hd]"
        check_flash(q, k, v)
        causal = given.get("causal", False)
        return packed_attention(q, k, v, given["cu_seqlens_q"], given["cu_seqlens_k"], given, causal)

    return packed


def layer_norm_fn(*args: Any, **kwargs: Any) -> Any:
    """flash-attn's Triton norm: rowscale times x, plus residual."""
    given = record("flash_attn.ops.triton.layer_norm.layer_norm_fn", args, kwargs)
    x, weight = given["x"], given["weight"]
    assert weight.stride(-1) == 1 and weight.shape == x.shape[-1:]
    s = x.double()
    if given.get("rowscale") is not None:
        assert given["rowscale"].shape == x.shape[:-1] and given["rowscale"].is_contiguous()
        s = s * given["rowscale"].double()[..., None]
    if given.get("residual") is not None:
        s = s + given["residual"].double()
    s = s.to(x.dtype)
    y = normalized(s, weight, given["bias"], given.get("eps", 1e-6), rms=given.get("is_rms_norm", False)).to(x.dtype)
    return (y, s) if given.get("prenorm", False) else y


def flash_cross_entropy(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    given = record("flash_attn.ops.triton.cross_entropy.cross_entropy_loss", args, kwargs)
    logits, labels = given["logits"], given["labels"]
    assert logits.dim() == 2 and labels.shape == logits.shape[:1] and labels.dtype == torch.int64
    losses = F.cross_entropy(logits.float(), labels, reduction="none", ignore_index=given["ignore_index"])
    return losses, torch.zeros_like(losses)


def apex_function(name: str, *, rms: bool) -> Any:
    def call(*args: Any, **kwargs: Any) -> Tensor:
        given = record(f"apex.normalization.fused_layer_norm.{name}", args, kwargs, positional=5)
        x, weight = given["input"], given.get("weight")
        assert x.is_contiguous() and tuple(given["normalized_shape"]) == x.shape[-1:]
        assert weight is None or weight.dtype == x.dtype
        return normalized(x, weight, given.get("bias"), given["eps"], rms=rms).to(x.dtype)

    return call


def liger_function(name: str) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        given = record(f"liger_kernel.transformers.functional.liger_{name}", args, kwargs)
        if name == "dyt":
            inside = torch.tanh(given["x"].double() * given["alpha"].double())
            return (inside * given["gamma"].double() + given["beta"].double()).to(given["x"].dtype)
        x, weight = given["X"], given["W"]
        assert weight.dim() == 1 and weight.is_contiguous() and weight.dtype == x.dtype
        if name == "layer_norm":
            return normalized(x, weight, given["B"], given["eps"], rms=False).to(x.dtype)
        assert given.get("in_place", True) is False, "it would overwrite a gradient that the residual reads"
        assert given.get("offset", 0.0) == 0.0 and given["casting_mode"] in ("llama", "gemma")
        s = x if name == "rms_norm" else (x + given["R"])
        y = normalized(s, weight, None, given["eps"], rms=True).to(x.dtype)
        return y if name == "rms_norm" else (y, s)

    return call


def modules() -> dict[str, ModuleType]:
    """Everything by import path."""
    three, four = "flash_attn_interface", "flash_attn.cute"
    apex_norms = ("fused_layer_norm", "fused_layer_norm_affine", "fused_rms_norm", "fused_rms_norm_affine")
    contents: dict[str, dict[str, Any]] = {
        **fakes_te.contents(),
        "flash_attn": _flash("flash_attn"),
        "flash_attn.ops": {},
        "flash_attn.ops.triton": {},
        "flash_attn.ops.triton.layer_norm": {"layer_norm_fn": layer_norm_fn},
        "flash_attn.ops.triton.cross_entropy": {"cross_entropy_loss": flash_cross_entropy},
        three: _flash(three),
        four: _flash(four),
        "apex": {},
        "apex.normalization": {},
        "apex.normalization.fused_layer_norm": {n: apex_function(n, rms="rms" in n) for n in apex_norms},
        "apex.optimizers": {"FusedAdam": partial(Adam, "apex.optimizers.FusedAdam")},
        "amp_C": {"multi_tensor_adam": None},
        "fused_layer_norm_cuda": {"forward_affine": None, "rms_forward_affine": None},
        "liger_kernel": {},
        "liger_kernel.transformers": {},
        "liger_kernel.transformers.functional": {
            f"liger_{n}": liger_function(n) for n in ("rms_norm", "layer_norm", "dyt", "fused_add_rms_norm")
        },
    }
    made = {}
    for path, names in contents.items():
        module = ModuleType(path)
        module.__path__ = []
        for name, value in names.items():
            setattr(module, name, value)
        made[path] = module
    return made


def _flash(path: str) -> dict[str, Any]:
    return {
        "flash_attn_func": flash_attention(f"{path}.flash_attn_func"),
        "flash_attn_varlen_func": flash_attention_varlen(f"{path}.flash_attn_varlen_func"),
    }
