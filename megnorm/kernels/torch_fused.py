"""The reference of operations that join several: what each means, as the layers compose it where nothing joins them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megnorm.kernels.registry import Need, NormForm, offer
from megnorm.kernels.torch_ref import NormArgs, Params, make_activation, make_norm, make_rope

Norm = Callable[[Tensor, Params, NormArgs], Tensor]
HeadNorm = tuple[Params, NormArgs] | None


def _serves_all(need: Need) -> None:
    return None


def _norm(need: Need, form: NormForm | None) -> Norm:
    """A norm with its constant factor."""
    plain = make_norm(replace(need, norms=(form,)))

    def norm(x: Tensor, p: Params, args: NormArgs) -> Tensor:
        y: Tensor = plain(x, p, args)
        return y if args.scale == 1.0 else y * args.scale

    return norm


@offer("add_norm", "torch", 0, _serves_all)
def make_add_norm(need: Need) -> Callable[..., Any]:
    """fn(x, f [..., d], params, args, skip, branch, keep_sum) -> y = N(s), s = skip x + branch f; keep_sum: (y, s)."""
    norm = _norm(need, need.norm)

    def add_norm(
        x: Tensor, f: Tensor, p: Params, args: NormArgs, skip: float, branch: float, keep_sum: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        s = _add(x, f, skip, branch)
        return (norm(s, p, args), s) if keep_sum else norm(s, p, args)

    return add_norm


@offer("norm_add", "torch", 0, _serves_all)
def make_norm_add(need: Need) -> Callable[..., Tensor]:
    """fn(x, f [..., d], params, args, skip, branch) -> skip x + branch N(f)."""
    norm = _norm(need, need.norm)

    def norm_add(x: Tensor, f: Tensor, p: Params, args: NormArgs, skip: float, branch: float) -> Tensor:
        return _add(x, norm(f, p, args), skip, branch)

    return norm_add


@offer("norm_add_norm", "torch", 0, _serves_all)
def make_norm_add_norm(need: Need) -> Callable[..., tuple[Tensor, Tensor]]:
    """fn(x, f [..., d], (params, args), (params, args), skip, branch) -> x' = skip x + branch N(f), and N'(x')."""
    first, second = (_norm(need, form) for form in need.norms)

    def norm_add_norm(
        x: Tensor, f: Tensor, one: tuple[Params, NormArgs], two: tuple[Params, NormArgs], skip: float, branch: float
    ) -> tuple[Tensor, Tensor]:
        stream = _add(x, first(f, *one), skip, branch)
        return stream, second(stream, *two)

    return norm_add_norm


@offer("qkv_norm_rope", "torch", 0, _serves_all)
def make_qkv_norm_rope(need: Need) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """fn(q [s, b, h, hd], k, v [s, b, kv, hd], norms, rope) -> q, k, v: each normalized by head where it has a norm.

    norms: (params, args) or None of q, k and v. rope: cos, sin [s, 1|b, 1, hd/2] or None; it turns q and k.
    """
    made, rotate = tuple(None if form is None else _norm(need, form) for form in need.norms), make_rope(need)

    def one(x: Tensor, norm: Norm | None, given: HeadNorm) -> Tensor:
        return x if norm is None or given is None else norm(x, *given)

    def qkv_norm_rope(
        q: Tensor, k: Tensor, v: Tensor, norms: tuple[HeadNorm, ...], rope: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (one(x, norm, given) for x, norm, given in zip((q, k, v), made, norms, strict=True))
        return (q, k, v) if rope is None else (rotate(q, *rope), rotate(k, *rope), v)

    return qkv_norm_rope


@offer("act_stats", "torch", 0, _serves_all)
def make_act_stats(need: Need) -> Callable[..., Tensor]:
    """fn(gate, up or None [..., f / ranks], params, args) -> N(act(gate) * up), or N(act(gate))."""
    norm, act = _norm(need, need.norm), make_activation(need)

    def act_stats(gate: Tensor, up: Tensor | None, p: Params, args: NormArgs) -> Tensor:
        return norm(act(gate) if up is None else act(gate, up), p, args)

    return act_stats


@offer("norm_linear", "torch", 0, _serves_all)
def make_norm_linear(need: Need) -> Callable[..., Any]:
    """fn(x [s, b, d], params, args, weight [out, d], bias, axis) -> N(x) W^T + b [s, b, out]; need.keep: and N(x).

    Over several ranks of ``axis`` the layer's own steps are the reference: they communicate, and this does not.
    """
    norm = _norm(need, need.norm)

    def norm_linear(x: Tensor, p: Params, args: NormArgs, weight: Tensor, bias: Tensor | None, axis: Any) -> Any:
        u = norm(x, p, args)
        y = F.linear(u, weight, bias)
        return (y, u) if need.keep else y

    return norm_linear


@offer("head_scale", "torch", 0, _serves_all)
def make_head_scale(need: Need) -> Callable[[Tensor, Tensor], Tensor]:
    """fn(y [..., h * hd], scale [h]) -> like y."""

    def head_scale(y: Tensor, scale: Tensor) -> Tensor:
        return (y.unflatten(-1, (len(scale), -1)) * scale[:, None]).flatten(-2)

    return head_scale


def _add(x: Tensor, f: Tensor, skip: float, branch: float) -> Tensor:
    return torch.add(f, x, alpha=skip) if branch == 1.0 else torch.add(x if skip == 1.0 else x * skip, f, alpha=branch)
