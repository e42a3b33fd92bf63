"""Options of a run: length, batch, precision, what happens when."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class TrainConfig:
    """out: folder of the run. steps: optimizer steps in all.

    global_batch: sequences a step, over all ranks and micro-batches; micro_batch: sequences a rank computes at a time.
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
    seed: int = 1234
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = "fp32"
    eval_every: int = 0
    eval_batches: int = 8
    log_every: int = 1
    threads: int | None = None
    stop_after: int | None = None
    recompute: tuple[Literal["block", "attention", "norms", "activations", "projections"], ...] = ()
    recompute_blocks: int | None = None
