"""What NCCL and the driver are told: defaults of the environment, which the user's own win over, and streams of groups.

Nothing here is asked on a CPU. Whatever is set is set before the first CUDA context and the first communicator.
"""

import logging
import os
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

log = logging.getLogger("megnorm")
QUEUES = "CUDA_DEVICE_MAX_CONNECTIONS"
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
BLACKWELL = (10, 0)  # from here on the order of kernels no longer depends on the number of queues
URGENT = frozenset({"tp", "kv", "pp", "ep"})  # what computation waits for at once; sums of gradients have time


def defaults(
    env: Mapping[str, str], *, tp: int, capability: tuple[int, int], deterministic: bool, graphs: bool
) -> dict[str, str]:
    """What to add to ``env``, which holds the user's wishes.

    One queue of kernels where tensor parallelism multiplies beside collectives: a collective begins before the product that was
    started after it, which would take all processors otherwise. No sums inside switches where runs must repeat: they add in
    the order of arrival. No registered buffers where segments of memory may grow under a graph that knows their addresses.

    Raises ValueError where a wish contradicts the run.
    """
    found: dict[str, str] = {}
    if tp > 1 and capability < BLACKWELL:
        found[QUEUES] = "1"
    if deterministic:
        wish = env.get("NCCL_ALGO", "")
        if "nvls" in wish.lower() and not wish.startswith("^"):
            raise ValueError(
                f"kernels.deterministic promises the same bits, which NCCL_ALGO={wish} does not; unset it, or set "
                "NCCL_ALGO=^NVLS,NVLSTree"
            )
        found["NCCL_ALGO"] = "^NVLS,NVLSTree"
    if graphs and any("expandable_segments:True" in env.get(key, "") for key in ALLOCATOR):
        found["NCCL_GRAPH_REGISTER"] = "0"
    return {key: value for key, value in found.items() if key not in env}


def prepare(*, tp: int, deterministic: bool, graphs: bool) -> None:
    """Set the defaults of this machine, if it has an accelerator. Call it before anything is put on the device."""
    if not torch.cuda.is_available():
        return
    # Properties alone are asked for, which makes no context yet.
    capability = torch.cuda.get_device_capability()
    added = defaults(os.environ, tp=tp, capability=capability, deterministic=deterministic, graphs=graphs)
    os.environ.update(added)
    if tp > 1 and capability < BLACKWELL and os.environ[QUEUES] != "1":
        log.warning(
            "warning: %s=%s lets products run ahead of tensor parallelism's collectives, which then overlap less; 1 is what "
            "parallel.tp=%d runs best with on this device",
            QUEUES,
            os.environ[QUEUES],
            tp,
        )


def options(name: str, device_type: str, timeout: timedelta | None) -> Any | None:
    """Options of a group for the axis ``name``: NCCL's, with a stream of high priority where computation waits for it.

    None on a CPU. timeout: of the group, which NCCL's options name too.
    """
    if device_type != "cuda":
        return None
    made = dist.ProcessGroupNCCL.Options(is_high_priority_stream=name in URGENT)
    if timeout is not None:
        made._timeout = timeout
    return made
