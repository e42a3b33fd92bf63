"""On an accelerator: a training step of captured blocks is that of the same blocks without graphs, bit for bit."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megnorm.kernels.config import KernelConfig
from megnorm.parallel.mesh import Mesh
from megnorm.plan import make_plan
from megnorm.train.build import build_stages, capture_blocks, flatten
from tests.distributed import cases
from tools import parity

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


def results(precision: str, *, graphs: bool) -> list[Tensor]:
    config = cases.config("sandwich", precision=precision)
    plan = make_plan(replace(config, kernels=KernelConfig(graphs=graphs, deterministic=True)), 1)
    mesh = Mesh(device=torch.device("cuda"))
    stages, _ = build_stages(plan, mesh)
    flat = flatten(plan, mesh, stages)
    if graphs:
        capture_blocks(plan, mesh, stages)
    flat.zero()
    losses = []
    for i in range(3):
        loss = stages[0](parity.on_device(parity.random_batch(config, 0, i), mesh.device))
        loss.backward()
        losses.append(loss.detach())
    return [*losses, flat.grads]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_graphs_are_the_run_without_them(precision: str) -> None:
    for a, b in zip(results(precision, graphs=True), results(precision, graphs=False), strict=True):
        assert torch.equal(a, b)
