"""The contract tests bite: every mistake of a caller that is usual with these libraries fails, or gives wrong numbers.

A mutation changes a call on its way from our code to the fake, as if our code had made it so.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from megnorm.kernels import backends, check, registry
from megnorm.kernels.registry import Need, NormForm
from megnorm.layers import loss
from tests.kernels.needs import needs
from tests.kernels.serving import installed

assert backends.REFERENCE and loss.make_cross_entropy
Call = Callable[..., Any]
TE = "transformer_engine.pytorch"


@pytest.fixture(autouse=True)
def _installed() -> Iterator[None]:
    with installed():
        yield


@dataclass(frozen=True)
class Mistake:
    """at: the function, or a class's method that is called. change: what becomes of it."""

    offer: tuple[str, str]  # operation, backend
    at: tuple[str, str, str | None]  # module, name, method
    change: Callable[[Call], Call]
    need: Callable[[Need], bool] = lambda need: True


def given(**changed: Any) -> Callable[[Call], Call]:
    """Keywords that are passed otherwise; a function is applied to what was passed, None drops it."""

    def change(call: Call) -> Call:
        def wrong(*args: Any, **kwargs: Any) -> Any:
            for name, value in changed.items():
                if callable(value):
                    kwargs[name] = value(kwargs[name])
                elif value is None:
                    kwargs.pop(name)
                else:
                    kwargs[name] = value
            return call(*args, **kwargs)

        return wrong

    return change


def placed(order: Callable[..., tuple[Any, ...]]) -> Callable[[Call], Call]:
    """Arguments by place in another order or form."""

    def change(call: Call) -> Call:
        return lambda *args, **kwargs: call(*order(*args), **kwargs)

    return change


def method(order: Callable[..., tuple[Any, ...]]) -> Callable[[Call], Call]:
    def change(call: Call) -> Call:
        return lambda self, *args, **kwargs: call(self, *order(*args), **kwargs)

    return change


def renamed(old: str, new: str) -> Callable[[Call], Call]:
    def change(call: Call) -> Call:
        return lambda *args, **kwargs: call(*args, **{new if name == old else name: x for name, x in kwargs.items()})

    return change


def result(turn: Callable[[Any], Any]) -> Callable[[Call], Call]:
    def change(call: Call) -> Call:
        return lambda *args, **kwargs: turn(call(*args, **kwargs))

    return change


def _norm(kind: str) -> Callable[[Need], bool]:
    return lambda need: need.norm == NormForm(kind, need.norm.width, bias=kind == "layernorm")


DENSE, MASKED, PACKED = (
    lambda need: not need.mask and not need.packed,
    lambda need: need.mask,
    lambda need: need.packed,
)
FLASH = ("attention", "flash_attn")
FLASH_CALL = ("flash_attn", "flash_attn_func", None)
TE_ATTENTION = ("attention", "transformer_engine")
TE_CALL = (TE, "DotProductAttention", "forward")
ADD_NORM = ("flash_attn.ops.triton.layer_norm", "layer_norm_fn", None)
JOINED = (TE, "LayerNormLinear", "__init__")

MISTAKES: dict[str, Mistake] = {
    "keys for queries": Mistake(FLASH, FLASH_CALL, placed(lambda q, k, v: (q, v, k)), DENSE),
    "sequence and batch swapped": Mistake(
        FLASH, FLASH_CALL, placed(lambda *qkv: tuple(x.transpose(0, 1) for x in qkv)), DENSE
    ),
    "heads before tokens": Mistake(
        FLASH, FLASH_CALL, placed(lambda *qkv: tuple(x.transpose(1, 2) for x in qkv)), DENSE
    ),
    "not causal": Mistake(FLASH, FLASH_CALL, given(causal=False), DENSE),
    "repeated heads": Mistake(
        TE_ATTENTION, TE_CALL, method(lambda q, k, v: (q, *(x.repeat_interleave(3, 2) for x in (k, v)))), DENSE
    ),
    "bshd for sbhd": Mistake(
        TE_ATTENTION, TE_CALL, method(lambda *qkv: tuple(x.transpose(0, 1) for x in qkv)), DENSE
    ),
    "bottom-right for top-left": Mistake(
        TE_ATTENTION, TE_CALL, given(attn_mask_type="causal_bottom_right"), DENSE
    ),
    "causal for both sides": Mistake(
        TE_ATTENTION, TE_CALL, given(attn_mask_type="causal"), lambda need: DENSE(need) and not need.causal
    ),
    "heads taken for apart": Mistake(
        TE_ATTENTION, TE_CALL, result(lambda y: y.unflatten(-1, (-1, 6)).transpose(-1, -2).flatten(-2)), DENSE
    ),
    "inverted mask": Mistake(TE_ATTENTION, TE_CALL, given(attention_mask=torch.logical_not), MASKED),
    "dropped mask": Mistake(TE_ATTENTION, TE_CALL, given(attention_mask=None, attn_mask_type="causal"), MASKED),
    "documents see each other": Mistake(
        TE_ATTENTION, TE_CALL, given(cu_seqlens_q=lambda at: at[[0, -1]], cu_seqlens_kv=lambda at: at[[0, -1]]), PACKED
    ),
    "ends of documents in int64": Mistake(
        TE_ATTENTION, TE_CALL, given(cu_seqlens_q=lambda at: at.long()), PACKED
    ),
    "a longest document that the device knows": Mistake(
        TE_ATTENTION, TE_CALL, given(max_seqlen_q=torch.tensor), PACKED
    ),
    "dropped alpha": Mistake(("add_norm", "flash_attn"), ADD_NORM, given(rowscale=None), _norm("rmsnorm")),
    "dropped residual": Mistake(("add_norm", "flash_attn"), ADD_NORM, given(residual=None), _norm("rmsnorm")),
    "alpha on the branch": Mistake(
        ("add_norm", "flash_attn"), ADD_NORM,
        lambda call: lambda x, *args, residual, **kwargs: call(residual, *args, residual=x, **kwargs), _norm("rmsnorm"),
    ),
    "renamed keyword": Mistake(("norm", "flash_attn"), ADD_NORM, renamed("eps", "epsilon"), _norm("rmsnorm")),
    "a norm of another kind": Mistake(
        ("norm", "flash_attn"), ADD_NORM, given(is_rms_norm=True), _norm("layernorm")
    ),
    "dropped eps": Mistake(("norm", "transformer_engine"), (TE, "RMSNorm", "__init__"), given(eps=None), _norm("rmsnorm")),
    "a keyword that it swallows": Mistake(
        ("norm", "transformer_engine"), (TE, "RMSNorm", "__init__"), renamed("device", "devices"), _norm("rmsnorm")
    ),
    "in and out swapped": Mistake(
        ("linear", "transformer_engine"), (TE, "Linear", "__init__"), method(lambda i, o: (o, i)),
        lambda need: need.quantize == "current",
    ),
    "a first micro-batch": Mistake(
        ("linear", "transformer_engine"), (TE, "Linear", "forward"), given(is_first_microbatch=True)
    ),
    "norm and product: the output taken for the norm": Mistake(
        ("norm_linear", "transformer_engine"), (TE, "LayerNormLinear", "forward"),
        result(lambda both: (both[0], both[0][..., :1].expand_as(both[1]))), lambda need: need.keep,
    ),
    "norm and product: dropped eps": Mistake(
        ("norm_linear", "transformer_engine"), JOINED, given(eps=None), _norm("rmsnorm")
    ),
    "rows that a recipe cannot take": Mistake(
        ("grouped_gemm", "transformer_engine"), (TE, "Fp8Padding", "__init__"), given(align_size=8),
        lambda need: bool(need.quantize),
    ),
    "counts on the device": Mistake(
        ("grouped_gemm", "transformer_engine"), (TE, "GroupedLinear", "forward"),
        method(lambda x, splits: (x, torch.tensor(splits))),
    ),
    "routes by bool": Mistake(
        ("permute", "transformer_engine"), (TE, "moe_permute", None), placed(lambda x, routes: (x, routes.bool()))
    ),
    "weights left out": Mistake(
        ("permute", "transformer_engine"), (TE, "moe_unpermute", None),
        lambda call: lambda y, rows, merging_probs, **kwargs: call(y, rows, merging_probs=None, **kwargs),
    ),
    "padding in the loss": Mistake(
        ("cross_entropy", "transformer_engine"), (TE, "parallel_cross_entropy", None),
        placed(lambda logits, *rest: (logits.clamp_min(0.0), *rest)),
    ),
    "label smoothing for the ignored label": Mistake(
        ("cross_entropy", "transformer_engine"), (TE, "parallel_cross_entropy", None),
        placed(lambda logits, labels, smoothing, mean, group, ignored: (logits, labels, ignored, mean, group, smoothing)),
    ),
    "L2 for decoupled decay": Mistake(
        ("adamw", "transformer_engine"), (f"{TE}.optimizers", "FusedAdam", None), given(adam_w_mode=False)
    ),
    "moments swapped": Mistake(
        ("adamw", "apex"), ("apex.optimizers", "FusedAdam", None), given(betas=lambda betas: betas[::-1])
    ),
    "Liger in place": Mistake(
        ("norm", "liger"), ("liger_kernel.transformers.functional", "liger_rms_norm", None), given(in_place=True),
        _norm("rmsnorm"),
    ),
    "apex: a view": Mistake(
        ("norm", "apex"), ("apex.normalization.fused_layer_norm", "fused_rms_norm_affine", None),
        placed(lambda x, *rest: (x.transpose(0, 1), *rest)), _norm("rmsnorm"),
    ),
}  # fmt: skip


def _served(mistake: Mistake) -> tuple[registry.Offer, Need]:
    op, backend = mistake.offer
    for offer in registry.offers(op):
        for dtype in (torch.float32, torch.bfloat16):  # what is small is seen in fp32
            for need in needs(op, dtype):
                if offer.backend == backend and mistake.need(need) and offer.reason(need) is None:
                    return offer, need
    raise AssertionError("no need that the offer serves")


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mistake = MISTAKES[name]
    offer, need = _served(mistake)
    assert check.difference(offer, need, "cpu") <= check.tolerance(need)
    path, attribute, inside = mistake.at
    owner = sys.modules[path] if inside is None else getattr(sys.modules[path], attribute)
    member = attribute if inside is None else inside
    monkeypatch.setattr(owner, member, mistake.change(getattr(owner, member)))
    try:
        found = check.difference(offer, need, "cpu")
    except (AssertionError, TypeError, RuntimeError, KeyError, ValueError, IndexError):
        return
    assert found > 2 * check.tolerance(need)
