"""Looking closely at a run by a switch in its config: torch's profiler, CUDA's memory history, the flight recorder.

What is off costs nothing. Files go to ``<train.out>/profile``.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megnorm.parallel.recorder import RECORDER
from megnorm.train.config import TrainConfig

log = logging.getLogger("megnorm")

KEPT = 2000  # collectives that NCCL's own recorder keeps
MEMORY_EVENTS = 100_000


def prepare(config: TrainConfig, device: torch.device) -> None:
    """Before process groups are made: refuse what this device cannot do, and switch on NCCL's own recorder."""
    if config.profile.memory_snapshot and device.type != "cuda":
        raise ValueError(
            "train.profile.memory_snapshot records CUDA's allocator, and this run is on the CPU; set it to false"
        )
    if config.profile.flight_recorder and device.type == "cuda":
        crash = Path(config.out) / "crash"
        crash.mkdir(parents=True, exist_ok=True)
        # Read by torch when groups are made; what the user has set stays. The second name is that of torch before 2.8.
        for key in ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"):
            os.environ.setdefault(key, str(KEPT))
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
        os.environ.setdefault("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", str(crash / "nccl-rank-"))


class Profile:
    """The switches of ``train.profile`` around a run: a context, and one around each step.

    memory: the snapshot is written when the context ends, also by an error such as running out of memory.
    """

    def __init__(self, config: TrainConfig, rank: int) -> None:
        self.config, self.rank, self.folder = config.profile, rank, Path(config.out) / "profile"
        self._profiler: Any = None

    def __enter__(self) -> "Profile":
        if self.config.memory_snapshot:
            torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)
        return self

    def __exit__(self, *error: object) -> None:
        if self._profiler is not None:
            self._finish()
        if self.config.memory_snapshot:
            torch.cuda.memory._dump_snapshot(str(self._file("memory", "pickle")))
            torch.cuda.memory._record_memory_history(enabled=None)
        if self.config.flight_recorder:
            RECORDER.dump(self._file("collectives", "jsonl"), rank=self.rank)

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around step ``number``: begins the trace before its first step, writes it after its last."""
        trace = self.config.trace
        if trace is not None and trace[0] <= number < trace[1] and self._profiler is None:
            # acc_events: a run may be traced for longer than one cycle of a schedule, which there is none of here
            self._profiler = torch.profiler.profile(record_shapes=True)
            self._profiler.start()
        yield
        if trace is not None and number == trace[1] - 1 and self._profiler is not None:
            self._finish()

    def _finish(self) -> None:
        assert self.config.trace is not None
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        first, end = self.config.trace
        path = self._file(f"trace-steps-{first}-to-{end - 1}", "json")
        profiler.export_chrome_trace(str(path))
        if self.rank == 0:
            log.info("trace of the steps %d to %d: %s (open it in chrome://tracing or perfetto)", first, end - 1, path)

    def _file(self, what: str, suffix: str) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / f"{what}-rank-{self.rank:05d}.{suffix}"
