"""On as many GPUs as there are, of 1, 2, 4 and 8: the parallel run is the serial one, over NCCL and the kernels chosen there.

fp64 is served by PyTorch, and holds to the last bits; fp32 by every kernel that takes it.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
LAYOUTS = {
    1: ["tp=1"],
    2: ["tp=2", "tp=2,sequence_parallel=false", "dp=2", "pp=2"],
    4: ["tp=4", "tp=2,dp=2", "pp=2,tp=2", "pp=2,virtual_stages=2,schedule=interleaved,dp=2"],
    8: ["tp=8", "tp=2,pp=2,dp=2", "tp=4,dp=2,keep_gathered=true"],
}
SCHEMES = ("hybridnorm", "sandwich", "olmo2")  # joined norms, norms behind sub-layers, norms over split features
MODEL = (
    "model.layers=4", "model.width=64", "model.heads=8", "model.ffn=96", "model.vocab_size=97", "model.max_positions=32",
    "train.sequence_length=16", "train.micro_batch=2", "train.global_batch=16",
)  # fmt: skip


@pytest.mark.parametrize("precision", ["fp64", "fp32"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("count", "layout"), [(n, layout) for n, every in LAYOUTS.items() for layout in every])
def test_the_parallel_run_is_the_serial_run(
    count: int, layout: str, scheme: str, precision: str, project: Path
) -> None:
    if torch.cuda.device_count() < count:
        pytest.skip(f"{torch.cuda.device_count()} GPUs of {count}")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), "tools/parity.py",
        "--device", "cuda", "--layout", layout, "--precision", precision, f"model.norm.scheme={scheme}", *MODEL,
    ]  # fmt: skip
    here = {**os.environ, "PYTHONPATH": str(project)}
    done = subprocess.run(command, cwd=project, env=here, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
