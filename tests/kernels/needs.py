"""What layers ask for, in sizes that are no powers of two: one list for all tests that go over the registry."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from megnorm.kernels.registry import Need, NormForm, Scores

WIDTH, HEAD = 37, 10
KINDS = ("layernorm", "rmsnorm", "l2", "scalenorm", "dyt", "derf", "seednorm")


def forms(width: int = WIDTH) -> Iterator[NormForm]:
    for kind in KINDS:
        yield NormForm(kind, width, bias=kind in ("layernorm", "dyt", "derf"))
    yield NormForm("rmsnorm", width, cast_first=True)
    yield NormForm("rmsnorm", width, bias=True)
    yield NormForm("layernorm", width)
    yield NormForm("rmsnorm", width, gain="none")
    yield NormForm("layernorm", width, gain="none")


def needs(op: str, dtype: torch.dtype, device: str = "cuda") -> list[Need]:
    """Every kind of need of an operation."""
    base = Need(op, device, dtype)
    heads = replace(base, heads=6, kv_heads=2, head_dim=HEAD)
    if op in ("norm", "add_norm", "norm_add"):
        return [replace(base, norms=(form,)) for form in forms()]
    if op == "sharded_norm":
        return [replace(base, norms=(form,), sharded=True) for form in forms()]
    if op == "norm_add_norm":
        both = list(forms())
        return [replace(base, norms=(form, other)) for form, other in zip(both, both[1:] + both[:1], strict=True)]
    if op == "qkv_norm_rope":
        made = [replace(heads, norms=(form, form, None)) for form in forms(HEAD)]
        made += [replace(heads, norms=(form, None, form)) for form in forms(HEAD)]
        odd = NormForm("layernorm", 7, bias=True)
        return [*made, replace(heads, head_dim=7, norms=(odd, odd, odd))]
    if op == "act_stats":
        return [
            replace(base, kind=kind, gated=gated, norms=(form,), sharded=gated)
            for kind in ("gelu", "gelu_tanh", "relu", "relu_squared", "silu")
            for gated in (False, True)
            for form in (NormForm("rmsnorm", WIDTH), NormForm("layernorm", WIDTH, bias=True))
        ]
    if op == "activation":
        kinds = ("gelu", "gelu_tanh", "relu", "relu_squared", "silu")
        return [replace(base, kind=kind, gated=gated) for kind in kinds for gated in (False, True)]
    if op == "attention":
        even = replace(heads, head_dim=16)
        made = [even, replace(even, packed=True), replace(even, mask=True), replace(even, kv_heads=6)]
        made += [replace(need, causal=False) for need in made[:3]]
        made += [replace(need, biased=True) for need in (even, made[2], replace(even, causal=False))]
        slopes = tuple(2.0**-i for i in range(6))
        alone = [Scores(scale=0.3), Scores(softcap=1.5), Scores(window=3), Scores(alibi=slopes)]
        every = [replace(need, scores=Scores(0.7, 2.0, 2, slopes)) for need in made[:3]]
        return [*made, *(replace(even, scores=scores) for scores in alone), *every]
    if op == "linear":
        plain = replace(base, features=(48, 32), tokens=64)
        recipes = ("current", "block", "delayed")
        low = [replace(plain, quantize=recipe) for recipe in recipes] if dtype == torch.bfloat16 else []
        mx = [replace(plain, features=(64, 32), quantize="mxfp8")] if dtype == torch.bfloat16 else []
        return [plain, replace(plain, biased=True), *low, *(replace(need, biased=True) for need in mx)]
    if op == "norm_linear":
        plain = replace(base, features=(48, 32), tokens=64)
        made = [replace(plain, norms=(form,), keep=i % 2 == 1, biased=i % 3 == 0) for i, form in enumerate(forms(48))]
        if dtype == torch.bfloat16:
            made += [replace(need, quantize=recipe) for need in made[:2] for recipe in ("current", "block")]
        return made
    if op == "grouped_gemm":
        plain = replace(base, features=(48, 32))
        if dtype != torch.bfloat16:
            return [plain]
        return [plain, *(replace(plain, quantize=recipe) for recipe in ("current", "block", "delayed"))]
    return [heads]
