"""How much of the machine a run uses: model FLOPs, the machine's peak, and their ratio (MFU)."""

import re
import time
from typing import Protocol

import torch

# Dense bf16 / fp16 FLOP/s by device name, from the makers' data sheets (without sparsity). A key's words all stand in
# the name; of several keys that fit the one with the most words counts.
PEAKS = {
    "A10": 125e12,
    "A10G": 70e12,
    "A40": 149.7e12,
    "A100": 312e12,
    "A800": 312e12,
    "B200": 2250e12,
    "B300": 2250e12,
    "GB200": 2500e12,
    "GB300": 2500e12,
    "GH200": 989e12,
    "H20": 148e12,
    "H100": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H200": 989e12,
    "H800": 989e12,
    "L4": 121e12,
    "L40": 181e12,
    "L40S": 362e12,
    "MI250X": 191.5e12,  # a device is one of the two dies
    "MI300X": 1307e12,
    "MI325X": 1307e12,
    "RTX 3090": 71e12,
    "RTX 4090": 165e12,
    "RTX A6000": 154.8e12,
}


class Sizes(Protocol):
    """The fields of ModelConfig that count."""

    @property
    def layers(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def kv(self) -> int: ...
    @property
    def hd(self) -> int: ...
    @property
    def source_layers(self) -> int: ...
    @property
    def head_weights(self) -> int: ...
    def ffn_weights(self, layer: int) -> int: ...


def flops_per_token(model: Sizes, sequence_length: int, predicted: float = 1.0) -> int:
    """FLOPs of one training token: matrix products only, forward + backward = 3 x forward, recompute not counted.

    Attention counts q k^T and p v over the whole square of scores, as PaLM (arXiv:2204.02311, appendix B) and
    Megatron-LM do; a kernel that leaves out the masked half works less than it is credited for. Token lookup counts
    nothing, the head counts tied or not. The padding of the vocabulary is not counted. Of an encoder-decoder a token is one
    of the source and one of the target. Of experts those that a token chooses count, served or not. predicted: share of
    tokens that the head reads.
    """
    attention = model.heads * model.hd
    projections = model.width * (2 * attention + 2 * model.kv * model.hd)
    scores = 2 * attention * sequence_length
    ffn = sum(model.ffn_weights(layer) for layer in range(model.layers))
    crossing = projections + scores if model.source_layers else 0
    multiplications = model.layers * (projections + scores + crossing) + ffn + round(predicted * model.head_weights)
    multiplications += model.source_layers * (projections + scores + model.ffn_weights(0))
    return 3 * 2 * multiplications


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Peak FLOP/s of one device in ``dtype``: from the table for known GPUs in bf16 and fp16, else measured (0.2 s)."""
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        known = table_peak(torch.cuda.get_device_name(device))
        if known is not None:
            return known
    return measured_peak(device, dtype)


def table_peak(device_name: str) -> float | None:
    """The entry of PEAKS for a name such as "NVIDIA H100 80GB HBM3"; None for a device that is not there."""
    words = set(re.split(r"[\s-]+", device_name.lower()))
    fitting = [key for key in PEAKS if set(key.lower().split()) <= words]
    return PEAKS[max(fitting, key=lambda key: len(key.split()))] if fitting else None


def measured_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.2) -> float:
    """FLOP/s of the best square matrix product, sizes doubling from 256 while ``seconds`` last."""
    best, size = 0.0, 256
    a = torch.randn(size, size, device=device, dtype=dtype)
    torch.mm(a, a)  # the first product also sets the library up
    begin = time.perf_counter()
    while best == 0.0 or time.perf_counter() - begin < seconds:
        _wait(device)
        start = time.perf_counter()
        torch.mm(a, a)
        _wait(device)
        took = time.perf_counter() - start
        best = max(best, 2.0 * size**3 / took)
        if took < seconds / 10 and size < 8192:  # small products say little on a busy machine
            size *= 2
            a = torch.randn(size, size, device=device, dtype=dtype)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def mfu(tokens_per_second: float, flops_per_token: float, peak: float) -> float:
    """Model FLOPs utilization, a fraction. peak: of all devices together."""
    return tokens_per_second * flops_per_token / peak
