"""Options of checkpoints: how often, how many to keep, how they are written."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class CheckpointConfig:
    """every: steps between checkpoints; 0 saves at the end and on a signal only.
    keep_last: newest checkpoints to keep. keep_every: also keep those whose step is a multiple of it; 0 is off.
    keep_best: also keep that many with the best ``score``, a number that the training loop puts in the meta;
    best: whether the lowest or the highest score is the best. The checkpoint that ``latest`` names is never deleted.
    asynchronous: write in a background thread from a copy in CPU memory (a second copy of the saved state stays there).
    max_file_mb: size (10^6 bytes) at which a rank begins its next file. threads: per rank, for writing and reading.
    verify: compare checksums when loading.
    init_from: run folder or checkpoint whose weights a new run starts from (fine-tuning, imported models); not used once
    the run has a checkpoint of its own.
    """

    every: int = 1000
    keep_last: int = 3
    keep_every: int = 0
    keep_best: int = 0
    best: Literal["lowest", "highest"] = "lowest"
    asynchronous: bool = True
    max_file_mb: int = 512
    threads: int = 4
    verify: bool = True
    init_from: str | None = None

    def __post_init__(self) -> None:
        least = {"every": 0, "keep_last": 1, "keep_every": 0, "keep_best": 0, "max_file_mb": 1, "threads": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"checkpoint.{name} is {getattr(self, name)}; set it to {low} or more")
