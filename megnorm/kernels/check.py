"""One small example of every operation: an offer against the reference in float64, values and gradients.

Tests go over the registry with it, and a run on an accelerator asks it once before a kernel serves.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megnorm.kernels.registry import Need, NormForm, Offer, Refusal, offers
from megnorm.kernels.torch_ref import NormArgs

# Largest difference, relative to the largest value of the tensor: sums in fp32; a few roundings of values and weights.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float64: 1e-12}

QUANTIZED = 0.15  # three bits of mantissa, averaged over a sum

Leaves = Mapping[str, Tensor]
Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Example:
    """leaves: tensors in float64 that are differentiated. call(fn, leaves) -> the outputs of an implementation."""

    leaves: Leaves
    call: Callable[[Callable[..., Any], Leaves], Outputs]


class Alone(NamedTuple):
    """An axis of one rank."""

    size: int = 1
    rank: int = 0
    group: Any = None


class _Draw:
    """Numbers of an example; rows: leading dimensions [s, b]."""

    def __init__(self, seed: int, rows: tuple[int, int]) -> None:
        self.generator, self.rows = torch.Generator().manual_seed(seed), rows

    def __call__(self, *shape: int, around: float = 0.0) -> Tensor:
        return around + torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def norm(self, form: NormForm, heads: int = 1) -> dict[str, Tensor]:
        n, found = form.width, {}
        if form.gain != "none" and form.kind not in ("l2", "scalenorm"):
            found["weight"] = self(heads, n, around=1.0) if form.gain == "per_head" else self(n, around=1.0)
        elif form.gain != "none":
            found["weight"] = self(1, around=1.0)
        if form.bias:
            found["bias"] = self(n)
        if form.kind in ("dyt", "derf"):
            found["alpha"] = self(1, around=0.5)
        if form.kind == "derf":
            found["shift"] = self(1)
        if form.kind == "seednorm":
            found.update(alpha=self(n), beta=self(n) / n**0.5)  # its tanh would be flat for larger ones
        return found


def _args(form: NormForm, scale: float = 0.75) -> NormArgs:
    return NormArgs(3e-4, form.width, form.cast_first, 1.0, _same, scale)  # nobody's default eps


def _same(x: Tensor) -> Tensor:
    return x


def _pick(leaves: Leaves, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): x for name, x in leaves.items() if name.startswith(prefix)}


def _prefixed(prefix: str, tensors: Leaves) -> dict[str, Tensor]:
    return {prefix + name: x for name, x in tensors.items()}


def _norm(need: Need, draw: _Draw) -> Example:
    form, shape = need.norm, (need.heads, need.norm.width) if need.heads else (need.norm.width,)
    leaves = {"x": draw(*draw.rows, *shape), **_prefixed("p.", draw.norm(form, need.heads))}
    return Example(leaves, lambda fn, at: (fn(at["x"], _pick(at, "p."), _args(form, 1.0)),))


def _join(need: Need, draw: _Draw) -> Example:
    """add_norm, norm_add and norm_add_norm."""
    forms = [form for form in need.norms if form is not None]
    shape = (*draw.rows, forms[0].width)
    leaves = {"x": draw(*shape), "f": draw(*shape)}
    for i, form in enumerate(forms):
        leaves.update(_prefixed(f"{i}.", draw.norm(form)))

    def call(fn: Callable[..., Any], at: Leaves) -> Outputs:
        given = [(_pick(at, f"{i}."), _args(form)) for i, form in enumerate(forms)]
        if need.op == "add_norm":
            first = fn(at["x"], at["f"], *given[0], 1.5, 1.0, True)
            return (*first, fn(at["f"], at["x"], *given[0], 1.0, 1.0, False))
        if need.op == "norm_add":
            return fn(at["x"], at["f"], *given[0], 1.5, 0.5), fn(at["f"], at["x"], *given[0], 1.0, 1.0)
        stream, h = fn(at["x"], at["f"], *given, 1.0, 0.5)
        return stream, h

    return Example(leaves, call)


def _qkv(need: Need, draw: _Draw) -> Example:
    """q, k, v are parts of one packed tensor, as projections give them."""
    (s, b), hd = draw.rows, need.head_dim
    sizes = [need.heads, need.kv_heads, need.kv_heads]
    leaves = {"qkv": draw(s, b, sum(sizes), hd), "angles": draw(s, 1, 1, hd // 2)}
    for i, form in enumerate(need.norms):
        if form is not None:
            leaves.update(_prefixed(f"{i}.", draw.norm(form)))

    def call(fn: Callable[..., Any], at: Leaves) -> Outputs:
        norms = tuple(None if f is None else (_pick(at, f"{i}."), _args(f)) for i, f in enumerate(need.norms))
        angles = at["angles"].detach()
        parts = at["qkv"].split(sizes, dim=2)
        turned = fn(*parts, norms, (angles.cos(), angles.sin())) if hd % 2 == 0 else ()
        return (*turned, *fn(*parts, norms, None))

    return Example(leaves, call)


def _rope(need: Need, draw: _Draw) -> Example:
    s, b = draw.rows
    leaves = {"x": draw(s, b, 3, need.head_dim), "angles": draw(s, b, 1, need.head_dim // 2)}

    def call(fn: Callable[..., Any], at: Leaves) -> Outputs:
        angles = at["angles"].detach()
        return fn(at["x"], angles.cos(), angles.sin()), fn(at["x"], angles[:, :1].cos(), angles[:, :1].sin())

    return Example(leaves, call)


def _activation(need: Need, draw: _Draw) -> Example:
    leaves = {"gate": draw(*draw.rows, 37), "up": draw(*draw.rows, 37)}
    names = ("gate", "up") if need.gated else ("gate",)
    return Example(leaves, lambda fn, at: (fn(*(at[name] for name in names)),))


def _act_stats(need: Need, draw: _Draw) -> Example:
    form, width = need.norm, need.norm.width
    leaves = {"both": draw(*draw.rows, 2 * width), **_prefixed("p.", draw.norm(form))}

    def call(fn: Callable[..., Any], at: Leaves) -> Outputs:
        gate, up = at["both"].split(width, dim=-1)
        return (fn(gate, up if need.gated else None, _pick(at, "p."), _args(form)),)

    return Example(leaves, call)


def _head_scale(need: Need, draw: _Draw) -> Example:
    leaves = {"y": draw(*draw.rows, need.heads * need.head_dim), "scale": draw(need.heads, around=1.0)}
    return Example(leaves, lambda fn, at: (fn(at["y"], at["scale"]),))


def _attention(need: Need, draw: _Draw) -> Example:
    (s, b), hd = draw.rows, need.head_dim
    b, documents = (1, tuple(n for n in (s - s // 3, s // 3) if n)) if need.packed else (b, None)
    sizes = [need.heads, need.kv_heads, need.kv_heads]
    apart = s > 1 and not need.causal and not need.packed  # to fewer, as of another sequence
    leaves = {"qkv": draw(s, b, sum(sizes), hd)}
    if need.biased:
        leaves["bias"] = draw(1, need.heads, s, s - apart)

    def call(fn: Callable[..., Any], at: Leaves) -> Outputs:
        x, mask = at["qkv"], None
        if need.mask:  # nobody looks at the second token but itself
            mask = torch.ones(s, s, dtype=torch.bool, device=x.device).tril().expand(b, 1, s, s).clone()
            mask[..., 2:, 1:2] = False
        q, k, v = x.split(sizes, dim=2)
        if apart:
            k, v = k[1:], v[1:]
            mask = None if mask is None else mask[:, :, -1:, 1:]
        given = {"mask": mask, "documents": documents, "causal": need.causal, "bias": at.get("bias")}
        return (fn(q, k, v, dropout=0.0, **given),)

    return Example(leaves, call)


def _cross_entropy(need: Need, draw: _Draw) -> Example:
    s, b = draw.rows
    leaves = {"logits": draw(s, b, 41)}
    labels = torch.randint(0, 37, (s, b), generator=draw.generator)

    def call(fn: Callable[..., Any], at: Leaves) -> Outputs:
        return (fn(at["logits"] * 1.0, labels.to(at["logits"].device), 0, 37, Alone()),)

    return Example(leaves, call)


def _linear(need: Need, draw: _Draw) -> Example:
    inside, outside = need.features
    rows = (32, 2) if need.quantize else draw.rows
    leaves = {"x": draw(*rows, inside), "w": draw(outside, inside)}
    if need.biased:
        leaves["b"] = draw(outside)
    return Example(leaves, lambda fn, at: (fn(at["x"], at["w"], at.get("b")),))


def _norm_linear(need: Need, draw: _Draw) -> Example:
    """On one rank: a norm's factor is not asked for here."""
    inside, outside = need.features
    rows = (32, 2) if need.quantize else draw.rows
    leaves = {"x": draw(*rows, inside), "w": draw(outside, inside), **_prefixed("p.", draw.norm(need.norm))}
    if need.biased:
        leaves["b"] = draw(outside)

    def call(fn: Callable[..., Any], at: Leaves) -> Outputs:
        out = fn(at["x"], _pick(at, "p."), _args(need.norm, 1.0), at["w"], at.get("b"), Alone())
        return tuple(out) if need.keep else (out,)

    return Example(leaves, call)


def _grouped(need: Need, draw: _Draw) -> Example:
    """Three experts, one of which sees no token."""
    inside, outside = need.features
    counts = torch.tensor([9, 0, 6])
    leaves = {"x": draw(15, inside), "w": draw(3, outside, inside)}

    def call(fn: Callable[..., Any], at: Leaves) -> Outputs:
        there = counts.to(at["x"].device)
        return fn(at["x"], at["w"], there), fn(at["x"][:0], at["w"], torch.zeros_like(there))

    return Example(leaves, call)


def _permute(need: Need, draw: _Draw) -> Example:
    """Two of four experts for every token, and none for any."""
    tokens = 11
    routes = torch.zeros(tokens, 4, dtype=torch.bool)
    routes.scatter_(1, torch.stack([torch.randperm(4, generator=draw.generator)[:2] for _ in range(tokens)]), True)
    leaves = {"x": draw(tokens, 24), "weights": draw(tokens, 4)}

    def call(fn: Callable[..., Any], at: Leaves) -> Outputs:
        pair: Any = fn
        (there, back), x, mask = pair, at["x"], routes.to(at["x"].device)
        rows, where = there(x, mask, 2 * tokens)
        nothing, nowhere = there(x, torch.zeros_like(mask), 0)
        return rows, back(rows, where, at["weights"]), back(rows, where, None), back(nothing, nowhere, None)

    return Example(leaves, call)


def _adamw(need: Need, draw: _Draw) -> Example:
    """Three updates of two groups; the moments are outputs too. No gradients."""
    leaves = {"x": draw(7), "y": draw(3, 5), "g": draw(3, 7), "h": draw(3, 3, 5)}

    def call(fn: Callable[..., Any], at: Leaves) -> Outputs:
        x, y = (at[name].detach().clone() for name in "xy")
        groups = [{"params": [x], "weight_decay": 0.1}, {"params": [y], "weight_decay": 0.0}]
        optimizer = fn(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-6)
        for i in range(3):
            x.grad, y.grad = at["g"].detach()[i], at["h"].detach()[i]
            for group, factor in zip(optimizer.param_groups, (1.0, 0.5), strict=True):
                group["lr"] = 0.01 * factor * (i + 1)
            optimizer.step()
        return x, y, *(optimizer.state[p][kind] for p in (x, y) for kind in ("exp_avg", "exp_avg_sq"))

    return Example(leaves, call)


EXAMPLES: dict[str, Callable[[Need, _Draw], Example]] = {
    "norm": _norm,
    "sharded_norm": _norm,
    "add_norm": _join,
    "norm_add": _join,
    "norm_add_norm": _join,
    "qkv_norm_rope": _qkv,
    "act_stats": _act_stats,
    "head_scale": _head_scale,
    "attention": _attention,
    "rope": _rope,
    "activation": _activation,
    "cross_entropy": _cross_entropy,
    "linear": _linear,
    "norm_linear": _norm_linear,
    "adamw": _adamw,
    "grouped_gemm": _grouped,
    "permute": _permute,
}


def tolerance(need: Need) -> float:
    return QUANTIZED if need.quantize else TOLERANCE[need.dtype]


def typical(op: str, device: str, dtype: torch.dtype) -> Need:
    """A common need of an operation, in sizes of a small model: RMSNorm of 768, 12 heads of 64, SwiGLU."""
    wide, head = NormForm("rmsnorm", 768, cast_first=True), NormForm("rmsnorm", 64, cast_first=True)
    need = Need(op, device, dtype, heads=12, kv_heads=12, head_dim=64, features=(768, 3072))
    if op in ("norm", "sharded_norm"):
        return Need(op, device, dtype, norms=(wide,), sharded=op == "sharded_norm")
    if op in ("activation", "act_stats"):
        return Need(op, device, dtype, kind="silu", gated=op == "act_stats", norms=(wide,))
    norms = {
        "add_norm": (wide,),
        "norm_linear": (wide,),
        "norm_add": (wide,),
        "norm_add_norm": (wide, wide),
        "qkv_norm_rope": (head,) * 3,
    }
    return replace(need, norms=norms.get(op, ()))


def run(fn: Callable[..., Any], example: Example, like: torch.dtype, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Outputs and gradients in float64 on the CPU. Inputs are rounded to ``like`` and given in ``dtype``."""
    leaves = {
        name: x.to(like).to(device=device, dtype=dtype).requires_grad_(name != "angles")
        for name, x in example.leaves.items()
    }
    outputs = example.call(fn, leaves)
    draw = _Draw(4096, (0, 0))  # no example has this seed: gradients that are what is normalized would cancel
    tracked = [y for y in outputs if y.requires_grad]  # an optimizer's results are not
    torch.autograd.backward(tracked, [draw(*y.shape).to(device=y.device, dtype=y.dtype) for y in tracked])
    return [x.detach().double().cpu() for x in (*outputs, *(x.grad for x in leaves.values() if x.grad is not None))]


def difference(offer: Offer, need: Need, device: str, rows: tuple[int, int] = (5, 3), seed: int = 0) -> float:
    """The largest difference of an offer from the reference, relative to the largest value of each tensor."""
    reference = next(one for one in offers(need.op) if one.backend == "torch")
    example = EXAMPLES[need.op](need, _Draw(seed, rows))
    exact = replace(need, device="cpu", dtype=torch.float64, quantize="")
    wanted = run(reference.make(exact), example, need.dtype, torch.float64, "cpu")
    got = run(offer.make(need), example, need.dtype, need.dtype, device)
    if [x.shape for x in got] != [x.shape for x in wanted]:
        return float("inf")
    pairs = [(a, b) for a, b in zip(got, wanted, strict=True) if a.numel()]
    worst = [float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) for a, b in pairs]
    return max(float("inf") if value != value else value for value in worst)


@cache
def verify(offer: Offer, need: Need) -> Refusal:
    """Why an offer must not serve a need on this accelerator; None where it agrees with the reference."""
    if offer.backend == "torch" or need.device == "cpu" or need.op not in EXAMPLES:
        return None
    with torch.enable_grad():
        try:
            found = difference(offer, replace(need, ranks=1, split_tokens=False), need.device)
        except Exception as error:  # whatever a compiler or a library throws: it cannot serve here
            first = (str(error).splitlines() or [""])[0]
            return f"does not run on this machine ({type(error).__name__}: {first})"
    if found <= tolerance(need):
        return None
    return f"differs from the reference by {found:.1e} on this machine (kernels.check)"
