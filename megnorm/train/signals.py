"""Being asked to stop: SIGTERM and SIGUSR1 set a flag that all ranks agree on after each step."""

import signal
from collections.abc import Sequence
from types import FrameType

import torch
import torch.distributed as dist

from megnorm.parallel.mesh import Mesh

EXIT_STOPPED = 75  # EX_TEMPFAIL: saved and left; start again to continue


class StopRequest:
    """Whether this rank was asked to stop. It is acted on at the end of a step, so that a checkpoint is whole."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True


def agreed(mine: Sequence[bool], mesh: Mesh) -> list[bool]:
    """For each question whether any rank says yes; the same answers on every rank."""
    if mesh.size == 1:
        return list(mine)
    flags = torch.tensor(mine, dtype=torch.int32, device=mesh.device)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return [bool(flag) for flag in flags.tolist()]
