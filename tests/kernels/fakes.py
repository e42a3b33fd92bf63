"""The libraries as their records describe them: calls must bind, layouts and dtypes must be right, results are PyTorch's.

Nothing here is taken from our own reference, so a mistake in our wiring is not repeated by its judge.
"""

from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.kernels.contract import ENTRIES, UNSTABLE, bind

CALLS: list[tuple[str, dict[str, Any]]] = []  # what was called, with which arguments
LOW = (torch.bfloat16, torch.float16)


def record(name: str, args: Any, kwargs: Any, method: str | None = None, positional: int = 3) -> dict[str, Any]:
    """Bind and remember a call; an entry that changes between versions takes ``positional`` arguments by place at most."""
    if ENTRIES[name].get("in_checkout") == UNSTABLE and len(args) > positional:
        raise TypeError(f"{name}: its order of arguments is unstable, call it by keyword")
    given = bind(name, args, kwargs, method)
    CALLS.append((name, given))
    return given


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """q [b, h, sq, hd], k, v [b, kv, sk, hd], allowed [.., sq, sk] -> [b, h, sq, hd], every step spelled out."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = (q.double() @ k.double().transpose(-1, -2)) / q.shape[-1] ** 0.5
    return (scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ v.double()).to(q.dtype)


def triangle(sq: int, sk: int, *, bottom_right: bool) -> Tensor:
    return torch.ones(sq, sk, dtype=torch.bool).tril(sk - sq if bottom_right else 0)


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


def packed_attention(q: Tensor, k: Tensor, v: Tensor, at_q: Tensor, at_k: Tensor, given: Any, causal: bool) -> Tensor:
    longest = "max_seqlen_kv" if "max_seqlen_kv" in given else "max_seqlen_k"
    for at, top, x in ((at_q, given["max_seqlen_q"], q), (at_k, given[longest], k)):
        assert at.dtype == torch.int32 and at[0] == 0 and at[-1] == x.shape[0]
        assert type(top) is int and top == int(at.diff().max()), "else the library waits for the device"
    parts = []
    for first, last in zip(at_q[:-1].tolist(), at_q[1:].tolist(), strict=True):
        part = [x[first:last].transpose(0, 1)[None] for x in (q, k, v)]
        size = last - first
        allowed = triangle(size, size, bottom_right=True) if causal else torch.ones(size, size, dtype=torch.bool)
        parts.append(softmax_attention(*part, allowed)[0].transpose(0, 1))
    return torch.cat(parts)


def normalized(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, rms: bool) -> Tensor:
    """In float64, so that the judge has no rounding of its own."""
    w, b = (None if t is None else t.double() for t in (weight, bias))
    shape = x.shape[-1:]
    if rms:
        y = x.double() * (x.double().square().mean(-1, keepdim=True) + eps).rsqrt()
        y = y if w is None else y * w
        return y if b is None else y + b
    return F.layer_norm(x.double(), shape, w, b, eps)


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


def te_cross_entropy(*args: Any, **kwargs: Any) -> Tensor:
    given = record("transformer_engine.pytorch.parallel_cross_entropy", args, kwargs, positional=6)
    logits, labels = given["inp"], given["target"]
    assert logits.dim() == 3 and labels.shape == logits.shape[:2], "[s, b, v]"
    assert logits.dtype in (torch.bfloat16, torch.float32)
    assert not given["reduce_loss"] and given["label_smoothing"] == 0.0
    flat = F.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), reduction="none", ignore_index=given["ignore_idx"]
    )
    return flat.view(labels.shape)


class TENorm(nn.Module):
    """Parameters of its own, on the device asked for; dtypes of input and parameters must agree."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        name = f"transformer_engine.pytorch.{type(self).__name__}"
        given = record(name, args, kwargs)
        shape = (given["normalized_shape"],)
        self.eps = given.get("eps", 1e-5)
        make = {"device": given.get("device", "cuda"), "dtype": given.get("dtype")}
        self.weight = nn.Parameter(torch.empty(shape, **make))
        if isinstance(self, LayerNorm):
            self.bias = nn.Parameter(torch.empty(shape, **make))

    def forward(self, x: Tensor) -> Tensor:
        bias = getattr(self, "bias", None)
        for param in (self.weight, bias):
            assert param is None or (param.device.type != "meta" and param.dtype == x.dtype)
        return normalized(x, self.weight, bias, self.eps, rms=bias is None).to(x.dtype)


class LayerNorm(TENorm):
    pass


class RMSNorm(TENorm):
    pass


class DotProductAttention(nn.Module):
    """sbhd or thd in, heads merged out; True is masked out; causal is top-left; thd takes padding masks alone."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.built = record("transformer_engine.pytorch.DotProductAttention", args, kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        given = bind("transformer_engine.pytorch.DotProductAttention", args, kwargs, "forward")
        CALLS.append(("DotProductAttention.forward", given))
        q, k, v = (given[key] for key in ("query_layer", "key_layer", "value_layer"))
        groups = self.built.get("num_gqa_groups") or self.built["num_attention_heads"]
        assert q.shape[-2] == self.built["num_attention_heads"] // self.built.get("tp_size", 1)
        assert k.shape[-2] == v.shape[-2] == groups // self.built.get("tp_size", 1)
        assert q.shape[-1] == self.built["kv_channels"]
        layout = given.get("qkv_format") or self.built["qkv_format"]
        kind = given.get("attn_mask_type") or self.built["attn_mask_type"]
        if layout == "thd":
            assert q.dim() == 3 and kind.startswith("padding")
            at = (given["cu_seqlens_q"], given["cu_seqlens_kv"])
            return packed_attention(q, k, v, *at, given, "causal" in kind).flatten(-2)
        assert layout == "sbhd" and q.dim() == 4
        if kind == "arbitrary":
            mask = given["attention_mask"]
            assert mask.dtype == torch.bool and mask.shape == (q.shape[1], 1, q.shape[0], k.shape[0])
            allowed = ~mask
        else:
            assert kind == "causal" and given.get("attention_mask") is None
            allowed = triangle(q.shape[0], k.shape[0], bottom_right=False)
        out = softmax_attention(*(x.permute(1, 2, 0, 3) for x in (q, k, v)), allowed)
        return out.permute(2, 0, 1, 3).flatten(-2)


class Linear(nn.Module):
    """Parameters of its own; rounds weight, input and gradients to FP8 while autocast is on."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        given = record("transformer_engine.pytorch.Linear", args, kwargs)
        assert given.get("parallel_mode") is None and given.get("tp_size", 1) == 1, "collectives are ours"
        make = {"device": given["device"], "dtype": given["params_dtype"]}
        self.weight = nn.Parameter(torch.empty(given["out_features"], given["in_features"], **make))
        self.biased = given["bias"]
        if self.biased:
            self.bias = nn.Parameter(torch.empty(given["out_features"], **make))

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        given = bind("transformer_engine.pytorch.Linear", args, kwargs, "forward")
        assert given.get("is_first_microbatch") is None, "else a first micro-batch overwrites gradients"
        x = given["inp"]
        assert x.dtype == self.weight.dtype and self.weight.device.type != "meta"
        CALLS.append(("Linear.forward", {"recipe": autocast.now}))
        if autocast.now is None:
            return F.linear(x, self.weight, self.bias if self.biased else None)
        assert x.shape[:-1].numel() % 8 == 0 and all(size % 16 == 0 for size in self.weight.shape)
        y = _round(x) @ _round(self.weight).t()
        return y + self.bias if self.biased else y


def _round(x: Tensor) -> Tensor:
    """To e4m3 with one scale, with the gradient of the identity."""
    scale = 448.0 / x.detach().abs().max().float()
    return x + ((x.detach().float() * scale).to(torch.float8_e4m3fn).float() / scale - x.detach()).to(x.dtype)


class autocast:
    now: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.given = record("transformer_engine.pytorch.autocast", args, kwargs)

    def __enter__(self) -> None:
        autocast.now = self.given["recipe"] if self.given["enabled"] else None
        assert autocast.now is not None or not self.given["enabled"], "the default recipe keeps a history"

    def __exit__(self, *error: Any) -> None:
        autocast.now = None


def recipe(name: str) -> Any:
    def make(*args: Any, **kwargs: Any) -> str:
        record(f"transformer_engine.common.recipe.{name}", args, kwargs)
        return name

    return make


def available(name: str) -> Any:
    def ask(*args: Any, **kwargs: Any) -> Any:
        given = bind(f"transformer_engine.pytorch.{name}", args, kwargs)
        return (True, "") if given.get("return_reason") else True

    return ask


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
    te = {one.__name__: one for one in (LayerNorm, RMSNorm, DotProductAttention, Linear, autocast)}
    asked = ("is_fp8_available", "is_fp8_block_scaling_available", "is_mxfp8_available")
    recipes = ("Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling")
    three, four = "flash_attn_interface", "flash_attn.cute"
    apex_norms = ("fused_layer_norm", "fused_layer_norm_affine", "fused_rms_norm", "fused_rms_norm_affine")
    contents: dict[str, dict[str, Any]] = {
        "transformer_engine": {},
        "transformer_engine.common": {},
        "transformer_engine.common.recipe": {n: recipe(n) for n in recipes},
        "transformer_engine.pytorch": {
            **te,
            **{n: available(n) for n in asked},
            "parallel_cross_entropy": te_cross_entropy,
        },
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
