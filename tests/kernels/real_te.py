"""Transformer Engine's own Python over an extension that is not there: what its modules do with our calls.

    python -m tests.kernels.real_te        # in an environment with its wheel and what that imports; see scripts/real_te.sh

The extension's kernels for norms and products are PyTorch's here, in the precision of their inputs; everything between our call
and a kernel is the library's: parameters, communication flags, the gradient of a returned norm, regions and histories.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

os.environ |= {"NVTE_FLASH_ATTN": "0", "NVTE_FUSED_ATTN": "0"}
os.environ |= {
    "NVTE_PROJECT_BUILDING": "1",
    "NVTE_UNFUSED_FP8_UPDATE": "1",
    "NVTE_TORCH_COMPILE": "0",
}  # read at its import, and later


class DType(IntEnum):
    kByte, kInt32, kFloat32, kFloat16, kBFloat16, kFloat8E4M3, kFloat8E5M2, kFloat4E2M1 = range(8)


class NVTE_Fused_Attn_Backend(IntEnum):
    NVTE_No_Backend, NVTE_F16_arbitrary_seqlen, NVTE_FP8 = -1, 0, 1


def generic_gemm(a: Tensor, ta: bool, b: Tensor, tb: bool, *rest: Any, **kwargs: Any) -> tuple[Any, ...]:
    """Column-major: b times a. rest: out, quantizer, dtype, bias, its dtype, gelu, its input, grad, ..., accumulate."""
    out, quantizer, _, bias, _, gelu, _, grad, _, _, accumulate = rest[:11]
    assert out is None and quantizer is None and not gelu and not accumulate
    lead = b.shape[:-1] if not tb else ()
    y = (b.flatten(0, -2).t() if tb else b.flatten(0, -2)) @ (a.t() if ta else a.flatten(0, -2))
    y = y.unflatten(0, lead) if lead else y
    if bias is None:
        return y, None, None, None
    return (y, b.flatten(0, -2).sum(0), None, None) if grad else (y + bias, None, None, None)


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, *, rms: bool) -> tuple[Any, ...]:
    mean = None if rms else x.mean(-1)
    centred = x if mean is None else x - mean[:, None]
    rstd = (centred.square().mean(-1) + eps).rsqrt()
    y = centred * rstd[:, None] * weight
    return y if bias is None else y + bias, mean, rstd


def layernorm_fwd(x: Tensor, weight: Tensor, bias: Tensor, eps: float, *rest: Any) -> Any:
    assert rest[1] is None, "no quantizer"
    return _forward(x, weight, bias, eps, rms=False)


def rmsnorm_fwd(x: Tensor, weight: Tensor, eps: float, *rest: Any) -> Any:
    assert rest[1] is None, "no quantizer"
    return _forward(x, weight, None, eps, rms=True)


def layernorm_bwd(g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, *rest: Any) -> Any:
    xh = (x - mean[:, None]) * rstd[:, None]
    gw = g * weight
    dx = (gw - gw.mean(-1, keepdim=True) - xh * (gw * xh).mean(-1, keepdim=True)) * rstd[:, None]
    return dx, (g * xh).sum(0), g.sum(0)


def rmsnorm_bwd(g: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, *rest: Any) -> Any:
    xh = x * rstd[:, None]
    gw = g * weight
    return (gw - xh * (gw * xh).mean(-1, keepdim=True)) * rstd[:, None], (g * xh).sum(0)


def convert_thd_to_bshd(x: Tensor, ends: Tensor, b: int, longest: int) -> Tensor:
    out = x.new_zeros(b, longest, *x.shape[1:])
    for i, (first, last) in enumerate(zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)):
        out[i, : last - first] = x[first:last]
    return out


def convert_bshd_to_thd(x: Tensor, ends: Tensor, tokens: int) -> Tensor:
    sizes = ends.diff().tolist()
    assert sum(sizes) == tokens
    return torch.cat([row[:size] for row, size in zip(x, sizes, strict=True)])


def multi_tensor_adam(chunk: int, noop: Tensor, lists: list[list[Tensor]], *rest: Any) -> None:
    lr, one, two, eps, step, decoupled, corrected, decay = rest
    assert decoupled == 1 and corrected == 1 and not noop.any()
    for g, p, mean, square in zip(*lists, strict=True):
        mean.mul_(one).add_(g, alpha=1 - one)
        square.mul_(two).addcmul_(g, g, value=1 - two)
        update = (mean / (1 - one**step)) / ((square / (1 - two**step)).sqrt() + eps)
        p.sub_(lr * (update + decay * p))


class _Here(TorchFunctionMode):
    """What is made on a CUDA device is made here."""

    def __torch_function__(self, fn: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        where = kwargs.get("device")
        if isinstance(where, int) or "cuda" in str(where):
            kwargs["device"] = "cpu"
        return fn(*args, **kwargs)


class _OnCuda(Tensor):
    """A tensor of the CPU that says what the library asks."""

    is_cuda = property(lambda self: True)  # type: ignore[assignment]


def load() -> Any:
    """Import the library over the extension; transformer_engine.pytorch."""
    extension = mock.MagicMock(name="transformer_engine_torch")
    extension.__spec__ = None
    products = (generic_gemm, layernorm_fwd, layernorm_bwd, rmsnorm_fwd, rmsnorm_bwd)
    for one in (DType, NVTE_Fused_Attn_Backend, *products, convert_thd_to_bshd, convert_bshd_to_thd, multi_tensor_adam):
        setattr(extension, one.__name__, one)
    sys.modules["transformer_engine_torch"] = extension
    import transformer_engine.common

    transformer_engine.common.load_framework_extension = lambda *args, **kwargs: None
    import transformer_engine.pytorch as te

    return te


@contextmanager
def device() -> Iterator[None]:
    """As if there were a Hopper device; what the library would put there lies on the CPU."""
    from transformer_engine.pytorch import utils
    from transformer_engine.pytorch.attention.dot_product_attention import utils as attention
    from transformer_engine.pytorch.attention.dot_product_attention.dot_product_attention import DotProductAttention
    from transformer_engine.pytorch.cpp_extensions import gemm
    from transformer_engine.pytorch.module.base import TransformerEngineBaseModule as Base

    properties = mock.Mock(multi_processor_count=132, major=9, minor=0)
    prepare, attend = Base.prepare_forward, DotProductAttention.forward

    def on_cuda(x: Any) -> Any:
        return x.as_subclass(_OnCuda) if isinstance(x, Tensor) else x

    def attend_here(self: Any, *qkv: Tensor, **kwargs: Any) -> Tensor:
        out = attend(self, *map(on_cuda, qkv), **{name: on_cuda(x) for name, x in kwargs.items()})
        return out.as_subclass(Tensor)

    def from_cpu(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = prepare(self, x.as_subclass(_OnCuda), *args, **kwargs)
        return out if isinstance(x, _OnCuda) else out.as_subclass(Tensor)

    with (
        mock.patch.object(torch.cuda, "is_available", lambda: True),
        mock.patch.object(torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
        mock.patch.object(torch.cuda, "current_device", lambda: 0),
        mock.patch.object(torch.cuda, "get_device_properties", lambda device=None: properties),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: False),
        mock.patch.object(Base, "prepare_forward", from_cpu),
        mock.patch.object(utils, "_empty_tensor", torch.Tensor),
        mock.patch.object(gemm, "get_cublas_workspace", lambda *args: torch.empty(1)),
        mock.patch.object(attention, "get_cudnn_version", lambda: (9, 12, 0)),
        mock.patch.object(DotProductAttention, "forward", attend_here),
        _Here(),
    ):
        yield


def check_offers() -> int:
    """Every offer whose kernels are here, over the registry's own examples: values and gradients. Attention is its own unfused
    one, which knows layouts, masks, groups of heads and packed documents as the fused ones do."""
    from megnorm.kernels import check, registry, te_products
    from tests.kernels.needs import needs

    compared = 0
    precise = [(op, torch.float32) for op in ("norm", "linear", "norm_linear", "adamw")]
    for op, dtype in (*precise, ("attention", torch.bfloat16)):
        for need in needs(op, dtype):
            offers = [o for o in registry.offers(op) if o.backend == te_products.BACKEND and not o.reason(need)]
            for offer in offers:
                found = check.difference(offer, need, "cpu")
                assert found <= check.TOLERANCE[dtype], (need, found)
                compared += 1
    return compared


def check_construction(te: Any) -> int:
    """Our keywords build its modules on meta, with the parameters that we lend."""
    grouped = te.GroupedLinear(3, 48, 32, bias=False, params_dtype=torch.bfloat16, device="meta")
    assert [name for name, _ in grouped.named_parameters()] == ["weight0", "weight1", "weight2"]
    assert {tuple(p.shape) for p in grouped.parameters()} == {(32, 48)}
    attention = te.DotProductAttention(
        8, 64, num_gqa_groups=2, attention_dropout=0.0, qkv_format="sbhd", attn_mask_type="causal", tp_size=1
    )
    assert not list(attention.parameters())
    column = te.LayerNormLinear(
        48, 64, eps=1e-6, bias=True, normalization="LayerNorm", params_dtype=torch.bfloat16, parallel_mode="column",
        tp_group=None, tp_size=2, sequence_parallel=True, return_layernorm_output=True, device="meta",
    )  # fmt: skip
    shapes = {name: tuple(p.shape) for name, p in column.named_parameters()}
    assert shapes == {"layer_norm_weight": (48,), "layer_norm_bias": (48,), "weight": (32, 48), "bias": (32,)}
    te.Fp8Padding(3, align_size=16), te.Fp8Unpadding(3, align_size=16)
    return 5


def check_regions() -> int:
    """Histories move at the end of an outermost region, and not within another one; state is what it keeps."""
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    from megnorm.kernels import te_delayed
    from megnorm.kernels.registry import Need

    need = Need("linear", "cuda", torch.bfloat16, features=(48, 32), tokens=64, quantize="delayed")
    product = te_delayed.Delayed(need)
    state = product.state()
    assert {name: tuple(x.shape) for name, x in state.items()} == {
        "forward.scale": (3,), "forward.history": (1024, 3), "backward.scale": (2,), "backward.history": (1024, 2),
    }  # fmt: skip
    assert all(product.state()[name] is x for name, x in state.items()), "the library's own tensors"
    meta = product.module.fp8_meta

    def seen(value: float) -> None:
        """As its quantizers do: the largest value of a tensor goes to the front."""
        state["forward.history"][0] = value

    with te_delayed.region(None):
        product.module.init_fp8_metadata()
        assert meta["scaling_fwd"].scale is state["forward.scale"], "a product that was loaded is not set up anew"
        FP8GlobalStateManager.add_fp8_tensors_to_global_buffer(meta)
        seen(4.0)
        assert (state["forward.scale"] == 1).all()
    assert torch.allclose(state["forward.scale"], torch.tensor(448 / 4.0)), "updated where the region ends"
    assert (state["forward.history"][0] == 0).all() and (state["forward.history"][-1] == 4).all()
    seen(8.0)
    with FP8.module().autocast(enabled=False), FP8.module().autocast(enabled=True, recipe=meta["recipe"]):
        pass
    assert (state["forward.history"][0] == 8).all(), "nothing is updated by a region inside another one"
    with torch.no_grad(), te_delayed.region(None):
        pass
    assert (state["forward.history"][0] == 8).all(), "nor by an evaluation"
    with te_delayed.region(None):
        assert FP8GlobalStateManager.is_first_fp8_module() and not FP8GlobalStateManager.is_first_fp8_module()
    return 7


def check_models() -> int:
    """A model of its products is the model without them, and the same bit for bit with recompute: what its autograd functions
    save and free fits what recompute leaves out."""
    from megnorm.kernels.config import KernelConfig
    from megnorm.layers.env import Env
    from megnorm.layers.recompute import Recompute
    from megnorm.models.causal import build_model
    from tests.distributed import cases
    from tests.kernels.serving import asked_of_cuda
    from tests.layers.tiny import batches

    config = cases.config("hybridnorm", precision="fp32")
    ops = ("linear", "norm_linear")
    runs = []
    for served, modes in (((), ()), (ops, ()), (ops, ("block",)), (ops, ("projections", "activations"))):
        kernels = KernelConfig(prefer=dict.fromkeys(served, "transformer_engine"), check=False)
        with asked_of_cuda(served):
            net = build_model(config.model, Env(kernels=kernels, recompute=Recompute(modes), tokens=16), seed=1)
        assert bool(served) == (net.blocks["0"].ffn.entry is not None)
        for batch in batches(config):
            net(batch).backward()
        runs.append({name: p.grad for name, p in net.named_parameters() if p.grad is not None})
    plain, first, *others = runs
    for name, grad in first.items():
        torch.testing.assert_close(grad, plain[name], rtol=1e-4, atol=1e-5)
        assert all(torch.equal(grad, other[name]) for other in others), name
    return len(runs) - 1


def _rank(rank: int, store: str) -> None:
    """One of two gloo ranks: every case of test_te_ranks, over the library."""
    import torch.distributed as dist

    from megnorm.plan import make_plan
    from megnorm.train.build import mesh_of
    from tests.kernels import test_te_ranks as cases
    from tests.kernels.serving import asked_of_cuda
    from tools import parity

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    load()
    for case in cases.CASES:
        config = cases.config_of({**case, "precision": "fp32"})
        plan = make_plan(config, 2)
        with device(), asked_of_cuda(["norm_linear"]):
            parallel = parity.trace(plan, mesh_of(plan, torch.device("cpu")), cases.STEPS)
        if rank == 0:
            found = parity.compare(cases.serial(config), parallel)
            assert found.initial_equal and found.worst <= parity.TOLERANCE["fp32"], (case, found)
    dist.barrier()
    dist.destroy_process_group()


def check_ranks() -> int:
    """Norm and product over tp ranks: the library gathers, and sums gradients, over our groups."""
    import tempfile

    import torch.multiprocessing as mp

    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (f"{folder}/store",), nprocs=2)
    return 3


if __name__ == "__main__":
    te = load()
    with device():
        from megnorm.kernels import backends
        from megnorm.kernels.te_products import FP8

        assert backends.REFERENCE and FP8.missing() is None, FP8.missing()
        found = [check_offers(), check_construction(te), check_regions(), check_models()]
    found.append(check_ranks())
    print("{} comparisons, {} modules, {} facts of regions, {} models, {} runs of two ranks: passed".format(*found))
