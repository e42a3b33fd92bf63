"""Being asked to stop: SIGTERM and SIGUSR1 set a flag that all ranks agree on after each step."""

import signal
from types import FrameType

EXIT_STOPPED = 75  # EX_TEMPFAIL: saved and left; start again to continue


class StopRequest:
    """Whether this rank was asked to stop. It is acted on at the end of a step, so that a checkpoint is whole."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
