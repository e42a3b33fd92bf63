"""Our Triton kernels, interpreted, against the reference in float64: values and all gradients."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megnorm.kernels import backends, check, registry, triton_offers
from megnorm.kernels.registry import Need, NormForm
from megnorm.kernels.torch_ref import NormArgs, make_norm
from tests.kernels.needs import needs

assert backends.REFERENCE
OURS = [offer for offer in registry.offers() if offer.backend == triton_offers.BACKEND]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _as_if_on_cuda(interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megnorm.kernels.libraries.missing", lambda name: None)


@pytest.mark.parametrize(
    "dtype", [DTYPES[0], *(pytest.param(dtype, marks=pytest.mark.full) for dtype in DTYPES[1:])], ids=str
)
@pytest.mark.parametrize("offer", OURS, ids=lambda offer: offer.op)
def test_agrees_with_the_reference(offer: registry.Offer, dtype: torch.dtype) -> None:
    served = [need for need in needs(offer.op, dtype) if offer.reason(need) is None]
    assert served
    for i, need in enumerate(served):
        rows = ((3, 2), (1, 1), (2, 3))[i % 3]
        found = check.difference(offer, need, "cpu", rows=rows, seed=i)
        assert found <= check.TOLERANCE[dtype], (need, found)


@pytest.mark.parametrize("op", ["norm", "add_norm", "norm_add", "norm_add_norm", "act_stats", "head_scale"])
def test_no_rows_have_no_gradient(op: str) -> None:
    ours = next(offer for offer in OURS if offer.op == op)
    need = next(need for need in needs(op, torch.float32) if ours.reason(need) is None)
    assert check.difference(ours, need, "cpu", rows=(0, 2)) == 0.0


@pytest.mark.full
def test_the_compiler_takes_them(tmp_path: Path) -> None:
    """For a GPU that is not there, in a process of its own: here they are interpreted."""
    here = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.compiling", "90"]
    env = {**here, "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert re.fullmatch(r"sm_90: [1-9]\d\d kernels compiled\n", done.stdout), done.stdout


def test_what_has_no_kernel_is_refused() -> None:
    norm = next(offer for offer in OURS if offer.op == "norm")
    need = Need("norm", "cuda", torch.float32, norms=(NormForm("rmsnorm", 8),))
    assert norm.reason(need) is None
    assert "fp32" in str(norm.reason(replace(need, dtype=torch.float64)))
    assert "gain per head" in str(norm.reason(replace(need, norms=(NormForm("rmsnorm", 8, gain="per_head"),))))
    assert "too long" in str(norm.reason(replace(need, norms=(NormForm("rmsnorm", 16385),))))
    assert "CUDA" in str(norm.reason(replace(need, device="cpu")))


class _TwoRanks:
    """Sums over two ranks, of which the other one holds nothing but zeros."""

    def __init__(self, kind: str, width: int) -> None:
        self.kind, self.width, self.calls = kind, width, 0
        self.mean = torch.zeros(())

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.kind == "layernorm" and self.calls == 1:
            self.mean = x / (2 * self.width)
        if self.kind == "layernorm" and self.calls == 2:  # zeros deviate from the common mean by that mean
            return x + self.width * self.mean.square()
        return x.clone()


@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])
def test_statistics_cross_ranks(kind: str) -> None:
    """One of two ranks, the other's features zero: the same as a norm over both halves."""
    width, n = 19, 38
    form = NormForm(kind, width)
    reduce = _TwoRanks(kind, width)
    ours = next(offer for offer in OURS if offer.op == "sharded_norm")
    fn = ours.make(Need("sharded_norm", "cuda", torch.float32, norms=(form,), sharded=True))
    x, w = (3.0 + torch.randn(7, width)).requires_grad_(), torch.randn(width).requires_grad_()
    y = fn(x, {"weight": w}, NormArgs(1e-5, n, False, 1.0, reduce))
    g = torch.randn(7, width)
    y.backward(g)
    assert reduce.calls == (2 if kind == "rmsnorm" else 3)

    x64, w64 = x.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    whole, gain = torch.cat([x64, torch.zeros_like(x64)], 1), torch.cat([w64, torch.zeros_like(w64)])
    need = Need("norm", "cpu", torch.float64, norms=(NormForm(kind, n),))
    wanted = make_norm(need)(whole, {"weight": gain}, NormArgs(1e-5, n, False, 1.0, lambda t: t))[:, :width]
    wanted.backward(g.double())
    for got, exact in ((y, wanted), (x.grad, x64.grad), (w.grad, w64.grad)):
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)
