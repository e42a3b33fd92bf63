"""Options of a run: length, batch, precision, what happens when, and what is done about faults."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class GuardConfig:
    """What is done where a loss or gradient is not finite (on_nonfinite), or far above those before it (on_spike).

    stop: end the run. skip: leave this update out, at most max_skips in a row. rewind: go on from the last checkpoint, at
    most max_rewinds times. Nothing is saved of such a step.
    spike_factor: a spike lies this many robust deviations (of the last spike_window good steps) above their median.
    rewind_data: after a rewind leave out the samples up to the bad step (skip), or take the same again (repeat).
    """

    on_nonfinite: Literal["stop", "skip", "rewind"] = "stop"
    on_spike: Literal["off", "stop", "skip", "rewind"] = "off"
    spike_factor: float = 10.0
    spike_window: int = 64
    max_skips: int = 10
    max_rewinds: int = 3
    rewind_data: Literal["skip", "repeat"] = "skip"

    def __post_init__(self) -> None:
        _at_least("train.guard", self, spike_factor=1.0, spike_window=4, max_skips=1, max_rewinds=1)

    @property
    def rewinds(self) -> bool:
        return "rewind" in (self.on_nonfinite, self.on_spike)


@dataclass(frozen=True)
class WatchdogConfig:
    """timeout: seconds without progress after which a rank counts as hung, or factor x the median step if that is longer;
    until five steps are done it is parallel.timeout, around checkpoints an hour. 0: no watchdog.
    slow: name a rank whose own work takes this many times the median rank's; 0: do not.
    """

    timeout: float = 60.0
    factor: float = 10.0
    slow: float = 2.0

    def __post_init__(self) -> None:
        _at_least("train.watchdog", self, timeout=0.0, factor=1.0, slow=0.0)
        if 0.0 < self.slow <= 1.0:
            raise ValueError(f"train.watchdog.slow is {self.slow}; set it above 1, or to 0 for no such warning")


@dataclass(frozen=True)
class ProfileConfig:
    """trace: [a, b]: torch's profiler records the steps a to b - 1. flight_recorder: write the last collectives when the run
    ends, not only when it hangs. memory_snapshot: record CUDA's allocations. All go to the folder profile of train.out.
    """

    trace: tuple[int, int] | None = None
    flight_recorder: bool = False
    memory_snapshot: bool = False

    def __post_init__(self) -> None:
        if self.trace is not None and not 1 <= self.trace[0] < self.trace[1]:
            raise ValueError(f"train.profile.trace is {list(self.trace)}; set it to [a, b] with 1 <= a < b")


@dataclass(frozen=True)
class TrainConfig:
    """out: folder of the run. steps: optimizer steps in all.

    global_batch: sequences a step, over all ranks and micro-batches; micro_batch: sequences a rank computes at a time.
    eval_batches: batches of global_batch in one evaluation; eval_every 0: only at the end. log_every: steps between
    records. threads: CPU threads a rank; None: the node's cores shared among its ranks. seed: of weights, data order
    and dropout. stop_after: leave after this many steps of this start (for time-limited queues); None: run to the end.
    check_replicas_every: steps between comparisons of what several ranks hold, made before every save too; 0: never.
    """

    out: str = "runs/run"
    steps: int = 1000
    sequence_length: int = 1024
    global_batch: int = 64
    micro_batch: int = 8
    seed: int = 1234
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = "fp32"
    eval_every: int = 0
    eval_batches: int = 8
    log_every: int = 1
    threads: int | None = None
    stop_after: int | None = None
    check_replicas_every: int = 0
    guard: GuardConfig = field(default_factory=GuardConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)


def _at_least(section: str, config: object, **least: float) -> None:
    """``not >=`` refuses NaN too."""
    for name, low in least.items():
        value = getattr(config, name)
        if not value >= low:
            raise ValueError(f"{section}.{name} is {value}; set it to {low:g} or more")
