"""Our Triton kernels compiled for GPUs that are not there: what the interpreter takes and the compiler does not.

    python -m tests.kernels.compiling [capability ...]     (80 and 90 unless said)

Every kernel that the needs of the tests launch, forward and backward, in bf16, is compiled and not run. Needs triton alone.
"""

import sys
from collections.abc import Iterable
from typing import Any, NamedTuple
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget  # type: ignore[import-not-found, unused-ignore]
from triton.runtime import driver  # type: ignore[import-not-found, unused-ignore]
from triton.runtime.jit import JITFunction  # type: ignore[import-not-found, unused-ignore]

from megnorm.kernels import backends, check, libraries, registry, triton_offers
from tests.kernels.needs import needs

assert backends.REFERENCE


class Device(NamedTuple):
    """What the compiler asks of a driver."""

    capability: int

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", self.capability, 32)


def compiled(capability: int, ops: Iterable[str] = registry.OPS) -> int:
    """How many kernels were compiled."""
    run, found = JITFunction.run, set[str]()

    def warm(self: Any, *args: Any, grid: Any, warmup: bool, **given: Any) -> None:
        found.add(run(self, *args, grid=grid, warmup=True, **given).hash)

    driver.set_active(Device(capability))
    with (
        mock.patch.object(JITFunction, "run", warm),
        mock.patch.object(libraries, "missing", lambda name: None),
    ):
        ours = (offer for op in ops for offer in registry.offers(op) if offer.backend == triton_offers.BACKEND)
        for offer in ours:
            for need in needs(offer.op, torch.bfloat16):
                if offer.reason(need) is None:
                    example = check.EXAMPLES[offer.op](need, check._Draw(0, (3, 2)))
                    check.run(offer.make(need), example, need.dtype, need.dtype, "cpu")
    return len(found)


if __name__ == "__main__":
    for capability in [int(word) for word in sys.argv[1:]] or [80, 90]:
        print(f"sm_{capability}: {compiled(capability)} kernels compiled", flush=True)
