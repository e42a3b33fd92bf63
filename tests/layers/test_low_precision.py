"""bf16 and fp16: no layer changes the dtype of the stream, and dropout keeps its mean."""

import pytest
import torch

from megnorm.layers.env import Env
from megnorm.layers.norm import NormLayer
from megnorm.layers.sublayer import Dropout
from megnorm.norms.scheme import NORM_KINDS, Norm


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("bias", (False, True))
@pytest.mark.parametrize("gain", ("vector", "scalar", "one_plus"))
@pytest.mark.parametrize("kind", NORM_KINDS)
def test_a_norm_keeps_the_dtype_and_is_near_its_fp32_self(kind: str, gain: str, bias: bool, dtype: torch.dtype) -> None:
    norm = Norm(kind=kind, gain=gain, bias=bias, eps=1e-5, cast="before_gain", alpha=0.5)
    layer = NormLayer(norm, "input", 1, 16, Env())
    x = torch.randn(3, 2, 16, generator=torch.Generator().manual_seed(0))
    exact = layer(x)
    low = layer.to(dtype)(x.to(dtype).requires_grad_())
    assert low.dtype == dtype
    low.float().sum().backward()
    torch.testing.assert_close(low.float(), exact, atol=0.03, rtol=0.03)


def test_dropout_in_bf16_keeps_the_mean() -> None:
    """1/0.9 is no bf16 number: as a mask it would shrink the stream by 0.16%. Products of 9 are exact."""
    dropout = Dropout(0.1, Env(), "embed", local=False)
    kept = dropout(torch.full((64,), 9.0, dtype=torch.bfloat16))
    assert set(kept.tolist()) == {0.0, 10.0}
