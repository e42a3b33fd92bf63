"""Options of a run: length, batch, precision, what happens when."""

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
class TrainConfig:
    """out: folder of the run. steps: optimizer steps in all.

    global_batch: sequences a step, over all ranks and micro-batches; micro_batch: sequences a rank computes at a time.
    batch_ramp: fewer sequences a step in the beginning.
    eval_batches: batches of global_batch in one evaluation; eval_every 0: only at the end. log_every: steps between
    records. threads: CPU threads a rank; None: the node's cores shared among its ranks. seed: of weights, data order
    and dropout. stop_after: leave after this many steps of this start (for time-limited queues); None: run to the end.
    recompute: activations that are computed again in backward instead of kept (docs/memory.md): "block" (everything but
    each block's input), or any of "attention" (all between the GEMMs of attention), "norms" (outputs of norms and head
    scales), "activations" (of the FFN), "projections" (outputs of W_o and W_down where a norm or a learned factor reads
    them: a GEMM each). recompute_blocks: only in the first n blocks of each pipeline stage; None: in all.
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
    log_every: int = 1
    threads: int | None = None
    stop_after: int | None = None
    recompute: tuple[Literal["block", "attention", "norms", "activations", "projections"], ...] = ()
    recompute_blocks: int | None = None

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
