"""The update of masters is that of torch.optim.AdamW, bit for bit."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megnorm.kernels.torch_ref import AdamW


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adamw_is_torchs(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    start = [torch.randn(shape, dtype=dtype, generator=generator) for shape in ((100,), (7, 3), (5,))]

    def groups(params: list[Tensor]) -> list[dict[str, Any]]:
        return [{"params": params[:1], "weight_decay": 0.1}, {"params": params[1:], "weight_decay": 0.0}]

    ours, theirs = ([x.clone() for x in start] for _ in range(2))
    options: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8}
    mine, torchs = AdamW(groups(ours), **options), torch.optim.AdamW(groups(theirs), fused=True, **options)
    for i in range(6):
        for x, y in zip(ours, theirs, strict=True):
            x.grad = torch.randn(x.shape, dtype=dtype, generator=generator)
            y.grad = x.grad.clone()
        ours[2].grad = theirs[2].grad = None  # no gradient, no update
        for group in (*mine.param_groups, *torchs.param_groups):
            group["lr"] = 0.01 / (i + 1)
        mine.step()
        torchs.step()
    assert all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))
    assert torch.equal(ours[2], start[2]) and not torch.equal(ours[0], start[0])
    for x, y in zip(ours[:2], theirs[:2], strict=True):
        assert all(
            torch.equal(mine.state[x][name], torchs.state[y][name]) for name in ("exp_avg", "exp_avg_sq", "step")
        )
