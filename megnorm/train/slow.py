"""Which ranks are slower than the others: by the time that each spends on its own work, outside of collectives.

On the CPU a collective blocks until it is done, so that the rest of a step is a rank's own work. On CUDA collectives only
enter a queue: there the times are those of the host, and tell of slow data and slow hosts, not of slow accelerators.
"""

import logging
import statistics
import time

import torch

from megnorm.parallel.collectives import all_gather
from megnorm.parallel.mesh import Mesh
from megnorm.parallel.recorder import RECORDER
from megnorm.train.agree import world

log = logging.getLogger("megnorm")

STEPS = 10  # steps of one comparison at least: single steps are noisy
LEAST = 1e-3  # seconds a step that a slow rank must lose at least


class Slow:
    """Compares the ranks, at most every STEPS steps. factor: of the median rank's time, above which one is named; 0: off."""

    def __init__(self, mesh: Mesh, factor: float) -> None:
        self.mesh, self.factor = mesh, factor
        self.steps, self.own, self.named = 0, 0.0, frozenset[int]()
        self.restart()

    def restart(self) -> None:
        """Time begins now; what lay before (evaluation, checkpoints) does not count."""
        self.begin, self.waited = time.monotonic(), RECORDER.seconds

    def add(self) -> None:
        """A step has ended."""
        self.own += time.monotonic() - self.begin - (RECORDER.seconds - self.waited)
        self.steps += 1
        self.restart()

    def values(self) -> dict[str, float]:
        """For the record: the median and the longest time of own work a step, in seconds, and whose it is. Collective."""
        if self.mesh.size == 1 or not self.factor or self.steps < STEPS:
            return {}
        mine = torch.tensor([self.own / self.steps], dtype=torch.float64, device=self.mesh.device)
        times = all_gather(mine, world(self.mesh)).tolist()
        self.steps, self.own = 0, 0.0
        median = statistics.median_low(times)
        late = {rank for rank, one in enumerate(times) if one > self.factor * median and one > median + LEAST}
        if self.mesh.rank == 0:
            for rank in sorted(late - self.named):
                log.warning(
                    "rank %d is slow: %.3f s a step of its own work, the median rank %.3f s; the others wait for it",
                    rank, times[rank], median,
                )  # fmt: skip
        self.named = frozenset(late)
        slowest = max(range(len(times)), key=times.__getitem__)
        return {"own_seconds": median, "own_seconds_longest": times[slowest], "slowest_rank": float(slowest)}
