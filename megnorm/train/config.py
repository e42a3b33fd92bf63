"""Options of a run: length, batch, precision, what happens when, and what is done about faults."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class BatchRamp:
    """Small batches first: ``start`` sequences a step, then by ``increment`` more, up to global_batch.

    The first ``samples`` sequences of the run are shared evenly among the sizes below global_batch (Megatron's
    --rampup-batch-size start increment samples). start None: no ramp. Learning rates keep following steps.
    """

    start: int | None = None
    increment: int | None = None
    samples: int | None = None

    def __post_init__(self) -> None:
        values = {"start": self.start, "increment": self.increment, "samples": self.samples}
        missing = [name for name, value in values.items() if value is None]
        if missing and len(missing) < len(values):
            raise ValueError(f"train.batch_ramp.{missing[0]} is missing; a ramp needs start, increment and samples")
        for name, value in values.items():
            if value is not None and value < 1:
                raise ValueError(f"train.batch_ramp.{name} is {value}; it must be at least 1")

    def problem(self, whole: int, unit: int, what: str) -> str | None:
        """What is wrong with a climb to ``whole`` sequences by multiples of ``unit``, which is made of ``what``; or None."""
        if self.start is None or self.increment is None:
            return None
        if self.start >= whole:
            return (
                f"train.batch_ramp.start={self.start} is not below train.global_batch={whole}, to which it climbs; use a "
                "smaller one, or train.batch_ramp=null"
            )
        for key, value in (("start", self.start), ("increment", self.increment)):
            if value % unit:
                near = sorted({value // unit * unit, -(-value // unit) * unit} - {0})
                return f"train.batch_ramp.{key}={value} is not a multiple of {what}; use {' or '.join(map(str, near))}"
        climb = whole - self.start
        if climb % self.increment:
            fitting = [n for n in range(unit, climb + 1, unit) if climb % n == 0]
            near = [n for n in fitting if n < self.increment][-1:] + [n for n in fitting if n > self.increment][:1]
            return (
                f"train.batch_ramp.increment={self.increment} does not lead from start={self.start} to train.global_batch="
                f"{whole}; use {' or '.join(map(str, near))}"
            )
        return None


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
    batch_ramp: fewer sequences a step in the beginning.
    eval_batches: batches of global_batch in one evaluation; eval_every 0: only at the end; eval_units: held-out loss by byte
    and word too, with data.tokenizer. log_every: steps between records. threads: CPU threads a rank; None: the node's cores
    shared among its ranks. seed: of weights, data order and dropout. stop_after: leave after this many steps of this start
    (for time-limited queues); None: run to the end.
    recompute: activations that are computed again in backward instead of kept (docs/memory.md): "block" (everything but
    each block's input), or any of "attention" (all between the GEMMs of attention), "norms" (outputs of norms and head
    scales), "activations" (of the FFN), "projections" (outputs of W_o and W_down where a norm or a learned factor reads
    them: a GEMM each). recompute_blocks: only in the first n blocks of each pipeline stage (of each stack in it); None: in all.
    check_replicas_every: steps between comparisons of what several ranks hold, made before every save too; 0: never.
    """

    out: str = "runs/run"
    steps: int = 1000
    sequence_length: int = 1024
    global_batch: int = 64
    micro_batch: int = 8
    batch_ramp: BatchRamp = field(default_factory=BatchRamp)
    seed: int = 1234
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = "fp32"
    eval_every: int = 0
    eval_batches: int = 8
    eval_units: bool = False
    log_every: int = 1
    threads: int | None = None
    stop_after: int | None = None
    recompute: tuple[Literal["block", "attention", "norms", "activations", "projections"], ...] = ()
    recompute_blocks: int | None = None
    check_replicas_every: int = 0
    guard: GuardConfig = field(default_factory=GuardConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)

    def batch_at(self, consumed: int) -> int:
        """Sequences of the step that begins when ``consumed`` samples are used."""
        start, increment, samples = self.batch_ramp.start, self.batch_ramp.increment, self.batch_ramp.samples
        if start is None or increment is None or samples is None or consumed >= samples:
            return self.global_batch
        sizes = (self.global_batch - start) // increment  # below global_batch
        return start + increment * (consumed * sizes // samples)

    def consumed_after(self, steps: int, consumed: int = 0) -> int:
        """Samples used once ``steps`` more steps are done, beginning at ``consumed``."""
        while steps and self.batch_at(consumed) != self.global_batch:
            consumed, steps = consumed + self.batch_at(consumed), steps - 1
        return consumed + steps * self.global_batch


def _at_least(section: str, config: object, **least: float) -> None:
    """``not >=`` refuses NaN too."""
    for name, low in least.items():
        value = getattr(config, name)
        if not value >= low:
            raise ValueError(f"{section}.{name} is {value}; set it to {low:g} or more")
