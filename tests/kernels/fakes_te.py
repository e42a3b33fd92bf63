"""Transformer Engine as its record and its sources describe it: layouts, dtypes, what it communicates, what it keeps."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megnorm.parallel.collectives import copy_to, gather_sequence
from megnorm.parallel.mesh import Axis
from tests.kernels.contract import bind
from tests.kernels.faking import CALLS, Adam, normalized, packed_attention, record, softmax_attention, triangle


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
            mask, whole = given["attention_mask"], (q.shape[1], 1, q.shape[0], k.shape[0])
            assert mask.dtype == torch.bool and mask.shape in (whole, (*whole[:2], 1, whole[3]))
            allowed = ~mask
        else:
            assert kind in ("causal", "no_mask") and given.get("attention_mask") is None
            allowed = triangle(q.shape[0], k.shape[0], bottom_right=False) | (kind == "no_mask")
        out = softmax_attention(*(x.permute(1, 2, 0, 3) for x in (q, k, v)), allowed)
        return out.permute(2, 0, 1, 3).flatten(-2)


class _Global:
    """The library's state of FP8: the region that we are in, and the histories that it updates when one ends."""

    def __init__(self) -> None:
        self.enabled, self.recipe, self.group, self.first = False, None, None, False
        self.depth = 0
        self.regions = 0
        self.histories: dict[Any, list[dict[str, Any]]] = {}

    def update(self, key: str) -> None:
        """All scales of a direction from the largest values in their histories, which then move on."""
        for (recipe, _), metas in self.histories.items():
            if (
                recipe.reduce_amax
            ):  # each product has a history a rank; this fake has no ranks, but must be told of them
                assert metas[0]["fp8_group"] is not None
            for meta in metas:
                state = meta[key]
                top = state.amax_history.max(0).values
                state.scale.copy_(torch.where(top > 0, 448.0 / top, state.scale))
                state.amax_history.copy_(state.amax_history.roll(-1, 0))
                state.amax_history[0].zero_()


STATE = _Global()


@dataclass(frozen=True)
class Recipe:
    """What it holds is compared by value."""

    name: str
    reduce_amax: bool = True
    amax_history_len: int = 4

    def delayed(self) -> bool:
        return self.name == "DelayedScaling"


class Scaling:
    """Of the tensors of a product in one direction."""

    def __init__(self, tensors: int, length: int) -> None:
        self.scale, self.amax_history = torch.ones(tensors), torch.zeros(length, tensors)


class Product(nn.Module):
    """What linear modules share: lent parameters, an autocast region, and with delayed scaling a history."""

    def __init__(self, name: str, given: dict[str, Any]) -> None:
        super().__init__()
        self.name, self.given = name, given
        self.fp8_meta: dict[str, Any] = {}
        self.fp8_meta_tensors_initialized = False
        self.ran_in = -1
        self.make = {"device": given["device"], "dtype": given["params_dtype"]}
        outside = given["out_features"] // (given.get("tp_size", 1) if given.get("parallel_mode") else 1)
        self.shape = (outside, given["in_features"])
        self.weight = nn.Parameter(torch.empty(self.shape, **self.make))
        if given["bias"]:
            self.bias = nn.Parameter(torch.empty(outside, **self.make))

    def init_fp8_meta_tensors(self, recipe: Recipe) -> None:
        if not self.fp8_meta_tensors_initialized:
            assert self.fp8_meta["num_gemms"] == 1
            self.fp8_meta["scaling_fwd"] = Scaling(3, recipe.amax_history_len)
            self.fp8_meta["scaling_bwd"] = Scaling(2, recipe.amax_history_len)
            self.fp8_meta_tensors_initialized = True

    def product(self, x: Tensor) -> Tensor:
        bias = self.bias if self.given["bias"] else None
        assert x.dtype == self.weight.dtype and self.weight.device.type != "meta"
        assert self.weight.shape == self.shape, "a weight that it was not built for"
        CALLS.append((f"{self.name}.forward", {"recipe": STATE.recipe.name if STATE.enabled else None}))
        if not STATE.enabled:
            return F.linear(x, self.weight, bias)
        assert x.shape[:-1].numel() % 8 == 0 and all(size % 16 == 0 for size in self.weight.shape)
        if STATE.recipe.delayed():
            y = _Delayed.apply(x, self.weight, self._meta(), self._is_first())
        else:
            y = _round(x) @ _round(self.weight).t()
        return y if bias is None else y + bias

    def _is_first(self) -> bool:
        first, STATE.first = STATE.first, False
        return first

    def _meta(self) -> dict[str, Any]:
        self.fp8_meta.update(num_gemms=1, recipe=STATE.recipe, fp8_group=STATE.group)
        self.init_fp8_meta_tensors(STATE.recipe)
        if "added" not in self.fp8_meta:
            self.fp8_meta["added"] = True
            STATE.histories.setdefault((STATE.recipe, id(STATE.group)), []).append(self.fp8_meta)
        if STATE.depth == 1 and torch.is_grad_enabled():
            assert self.ran_in != STATE.regions, "twice in a region: the first run's largest values are lost"
            self.ran_in = STATE.regions
        return self.fp8_meta


class _Delayed(torch.autograd.Function):
    """Both operands rounded with the scales that there are; what is seen goes to the histories."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, meta: dict[str, Any], first: bool) -> Tensor:
        state = meta["scaling_fwd"]
        operands = []
        for i, tensor in enumerate((x, weight)):
            state.amax_history[0, i] = tensor.abs().max()
            operands.append(_rounded(tensor, state.scale[i]))
        ctx.save_for_backward(*operands)
        ctx.meta, ctx.first = meta, first
        return operands[0] @ operands[1].t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        state = ctx.meta["scaling_bwd"]
        state.amax_history[0, 0] = grad.abs().max()
        g = _rounded(grad, state.scale[0])
        out = g @ weight, g.flatten(0, -2).t() @ x.flatten(0, -2), None, None
        if ctx.first:
            STATE.update("scaling_bwd")
        return out


def _rounded(x: Tensor, scale: Tensor) -> Tensor:
    return ((x.float() * scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() / scale).to(x.dtype)


def _round(x: Tensor) -> Tensor:
    """To e4m3 with one scale, with the gradient of the identity."""
    return x + (_rounded(x.detach(), 448.0 / x.detach().abs().max().float()) - x.detach())


class Linear(Product):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = record("transformer_engine.pytorch.Linear", args, kwargs)
        assert given.get("parallel_mode") is None and given.get("tp_size", 1) == 1, "collectives are ours"
        super().__init__("Linear", given)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        given = bind("transformer_engine.pytorch.Linear", args, kwargs, "forward")
        assert given.get("is_first_microbatch") is None, "else a first micro-batch overwrites gradients"
        return self.product(given["inp"])


class LayerNormLinear(Product):
    """With tp a column-parallel product: tokens are gathered after the norm, or gradients of the norm's output summed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = record("transformer_engine.pytorch.LayerNormLinear", args, kwargs)
        super().__init__("LayerNormLinear", given)
        tp = given["tp_size"]
        assert given["parallel_mode"] == ("column" if tp > 1 else None)
        self.sequence_parallel = given["sequence_parallel"] and tp > 1
        self.axis = Axis("tp", tp, dist.get_rank(given["tp_group"]), given["tp_group"]) if tp > 1 else None
        self.layer_norm_weight = nn.Parameter(torch.empty(given["in_features"], **self.make))
        self.layer_norm_bias = None
        if given["normalization"] == "LayerNorm":
            self.layer_norm_bias = nn.Parameter(torch.empty(given["in_features"], **self.make))
        else:
            assert given["normalization"] == "RMSNorm"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = bind("transformer_engine.pytorch.LayerNormLinear", args, kwargs, "forward")
        assert given.get("is_first_microbatch") is None, "else a first micro-batch overwrites gradients"
        x = given["inp"]
        assert x.is_contiguous() and self.layer_norm_weight.dtype == x.dtype
        rms = self.given["normalization"] == "RMSNorm"
        u = normalized(x, self.layer_norm_weight, self.layer_norm_bias, self.given["eps"], rms=rms).to(x.dtype)
        full = u
        if self.axis is not None:
            full = gather_sequence(u, self.axis) if self.sequence_parallel else copy_to(u, self.axis)
        y = self.product(full)
        return (y, u) if self.given["return_layernorm_output"] else y


class GroupedLinear(Product):
    """A weight for each product; rows that a recipe quantizes must be padded."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = record("transformer_engine.pytorch.GroupedLinear", args, kwargs)
        assert not given["bias"] and given.get("parallel_mode") is None
        super().__init__("GroupedLinear", given)
        self.count = given["num_gemms"]
        for i in range(self.count):
            self.register_parameter(f"weight{i}", nn.Parameter(self.weight))

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        given = bind("transformer_engine.pytorch.GroupedLinear", args, kwargs, "forward")
        x, splits = given["inp"], given["m_splits"]
        assert type(splits) is list and len(splits) == self.count and sum(splits) == len(x) > 0
        CALLS.append(("GroupedLinear.forward", {"recipe": STATE.recipe.name if STATE.enabled else None}))
        parts = []
        for i, part in enumerate(x.split(splits)):
            weight = getattr(self, f"weight{i}")
            assert weight.device.type != "meta" and weight.dtype == x.dtype
            if STATE.enabled and len(part):
                assert len(part) % 16 == 0, "pad it"
                part, weight = _round(part), _round(weight)
            parts.append(part @ weight.t())
        return torch.cat(parts)


class Fp8Padding(nn.Module):
    padding = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.given = record(f"transformer_engine.pytorch.{type(self).__name__}", args, kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = bind(f"transformer_engine.pytorch.{type(self).__name__}", args, kwargs, "forward")
        x, splits, step = given["inp"], given["m_splits"], self.given["align_size"]
        padded = [-(-n // step) * step for n in splits]
        if not self.padding:
            return torch.cat([part[:n] for part, n in zip(x.split(padded), splits, strict=True)])
        parts = zip(x.split(splits), splits, padded, strict=True)
        return torch.cat([F.pad(part, (0, 0, 0, more - n)) for part, n, more in parts]), padded


class Fp8Unpadding(Fp8Padding):
    padding = False


def moe_permute(*args: Any, **kwargs: Any) -> Any:
    given = record("transformer_engine.pytorch.moe_permute", args, kwargs)
    x, routes = given["inp"], given["routing_map"]
    assert routes.dtype == torch.int32 and routes.shape[0] == len(x) and given["map_type"] == "mask"
    assert given["num_out_tokens"] == int(routes.sum()) > 0
    order = [(e, t) for e in range(routes.shape[1]) for t in range(len(x)) if routes[t, e]]
    return x[[t for _, t in order]], torch.tensor(order)


def moe_unpermute(*args: Any, **kwargs: Any) -> Tensor:
    given = record("transformer_engine.pytorch.moe_unpermute", args, kwargs)
    y, order, weights = given["inp"], given["row_id_map"], given.get("merging_probs")
    assert given["map_type"] == "mask" and len(given["restore_shape"]) == 2
    out = [y.new_zeros(given["restore_shape"][1]) for _ in range(given["restore_shape"][0])]
    for row, (e, t) in zip(y, order.tolist(), strict=True):
        out[t] = out[t] + (row if weights is None else row * weights[t, e])
    return torch.stack(out)


class autocast:
    """Regions nest; what ends the outermost one updates the scales of the forward pass, if it is enabled."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.given = record("transformer_engine.pytorch.autocast", args, kwargs)

    def __enter__(self) -> None:
        self.before = (STATE.enabled, STATE.recipe, STATE.group, STATE.first)
        STATE.enabled, STATE.recipe = self.given["enabled"], self.given.get("recipe")
        STATE.group = self.given.get("amax_reduction_group")
        assert STATE.recipe is not None or not STATE.enabled, "the default recipe keeps a history"
        if STATE.depth == 0:
            STATE.first = True
            STATE.regions += 1
        STATE.depth += 1

    def __exit__(self, *error: Any) -> None:
        STATE.enabled, STATE.recipe, STATE.group, STATE.first = self.before
        STATE.depth -= 1
        if self.given["enabled"] and STATE.depth == 0 and torch.is_grad_enabled():
            STATE.update("scaling_fwd")


def recipe(name: str) -> Any:
    def make(*args: Any, **kwargs: Any) -> Recipe:
        given = record(f"transformer_engine.common.recipe.{name}", args, kwargs)
        return Recipe(name, **({"reduce_amax": given["reduce_amax"]} if "reduce_amax" in given else {}))

    return make


def available(name: str) -> Any:
    def ask(*args: Any, **kwargs: Any) -> Any:
        given = bind(f"transformer_engine.pytorch.{name}", args, kwargs)
        return (True, "") if given.get("return_reason") else True

    return ask


def contents() -> dict[str, dict[str, Any]]:
    """Its modules by path, fresh: no history, no region."""
    STATE.__init__()  # type: ignore[misc]
    classes = (
        LayerNorm,
        RMSNorm,
        DotProductAttention,
        Linear,
        LayerNormLinear,
        GroupedLinear,
        Fp8Padding,
        Fp8Unpadding,
    )
    asked = ("is_fp8_available", "is_fp8_block_scaling_available", "is_mxfp8_available")
    recipes = ("Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling", "DelayedScaling")
    return {
        "transformer_engine": {},
        "transformer_engine.common": {},
        "transformer_engine.common.recipe": {n: recipe(n) for n in recipes},
        "transformer_engine.pytorch": {
            **{one.__name__: one for one in (*classes, autocast, moe_permute, moe_unpermute)},
            **{n: available(n) for n in asked},
            "parallel_cross_entropy": te_cross_entropy,
        },
        "transformer_engine.pytorch.optimizers": {
            "FusedAdam": partial(Adam, "transformer_engine.pytorch.optimizers.FusedAdam")
        },
    }
