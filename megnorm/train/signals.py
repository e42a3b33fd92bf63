"""Being asked to stop: SIGTERM and SIGUSR1 set a flag that all ranks agree on after each step."""

import signal
from types import FrameType

import torch
import torch.distributed as dist

from megnorm.parallel.mesh import Mesh

EXIT_STOPPED = 75  # EX_TEMPFAIL: saved and left; start again to continue


class StopRequest:
    """Whether any rank was asked to stop. Signals are noticed at the end of a step, so that a checkpoint is whole."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh, self.asked = mesh, False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True

    def agreed(self) -> bool:
        """The same answer on every rank."""
        return agreed(self.asked, self.mesh)


def agreed(mine: bool, mesh: Mesh) -> bool:
    """Whether ``mine`` is true on any rank."""
    if mesh.size == 1:
        return mine
    flag = torch.tensor(int(mine), device=mesh.device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)
