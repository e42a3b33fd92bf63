"""FLOPs against counts by hand and by torch's own counter; peaks by name."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megnorm.metrics.throughput import flops_per_token, measured_peak, mfu, peak_flops, table_peak


@dataclass(frozen=True)
class Sizes:
    layers: int
    width: int
    heads: int
    kv: int
    hd: int
    ffn: int
    vocab_size: int
    gated: bool
    source_layers: int = 0

    @property
    def head_weights(self) -> int:
        return self.width * self.vocab_size

    def ffn_weights(self, layer: int) -> int:
        return (3 if self.gated else 2) * self.width * self.ffn


def test_gpt2_small_by_hand() -> None:
    sizes = Sizes(12, 768, 12, 12, 64, 3072, 50257, gated=False)
    matrices = 12 * 12 * 768**2 + 50257 * 768
    assert flops_per_token(sizes, 1024) == 6 * matrices + 12 * 12 * 768 * 1024


def test_grouped_queries_and_gates_by_hand() -> None:
    sizes = Sizes(2, 64, 4, 2, 32, 96, 100, gated=True)
    layer = 64 * 128 + 2 * 64 * 64 + 128 * 64 + 3 * 64 * 96 + 2 * 10 * 128
    assert flops_per_token(sizes, 10) == 6 * (2 * layer + 64 * 100)


def test_two_stacks_by_hand() -> None:
    """Three encoder layers, and two decoder layers that read the encoder's output too."""
    sizes = Sizes(2, 64, 4, 2, 32, 96, 100, gated=True, source_layers=3)
    attention = 64 * 128 + 2 * 64 * 64 + 128 * 64 + 2 * 10 * 128
    assert flops_per_token(sizes, 10) == 6 * (5 * (attention + 3 * 64 * 96) + 2 * attention + 64 * 100)


@given(kv=st.sampled_from([1, 2, 4]), gated=st.booleans(), s=st.sampled_from([8, 16]), layers=st.integers(1, 2))
def test_agrees_with_torchs_counter_on_the_model_itself(kv: int, gated: bool, s: int, layers: int) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from megnorm.models.causal import Tokens, build_model
    from megnorm.models.config import ModelConfig

    activation = "swiglu" if gated else "gelu"
    cfg = ModelConfig(
        layers=layers, width=32, heads=4, kv_heads=kv, ffn=48, vocab_size=64, max_positions=16, activation=activation
    )
    tokens = torch.randint(0, 64, (s, 2))
    model = build_model(cfg)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # fused ones it does not count on CPU
        model(Tokens(tokens, tokens, torch.ones(s, 2))).backward()
    assert counter.get_total_flops() == flops_per_token(cfg, s) * tokens.numel()


def test_peaks_by_device_name() -> None:
    assert table_peak("NVIDIA H100 80GB HBM3") == 989e12
    assert table_peak("NVIDIA H100 PCIe") == 756e12
    assert table_peak("NVIDIA A100-SXM4-80GB") == 312e12
    assert table_peak("NVIDIA H200") == 989e12
    assert table_peak("NVIDIA B200") == 2250e12
    assert table_peak("NVIDIA L40S") == 362e12
    assert table_peak("NVIDIA GeForce GTX 1080") is None


def test_the_measured_peak_is_what_a_large_product_reaches() -> None:
    peak = measured_peak(torch.device("cpu"), torch.float32, seconds=0.1)
    assert 1e9 < peak < 1e14
    assert peak_flops(torch.device("cpu"), torch.bfloat16) > 1e8


def test_mfu_is_a_fraction() -> None:
    assert mfu(1000.0, 6e9, 12e12) == pytest.approx(0.5)
