"""Options of the parallel layout."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ParallelConfig:
    """Sizes of the mesh axes; their product is the number of ranks.

    tp: tensor parallel. dp: data parallel; None: what is left of the ranks. pp: pipeline parallel.
    ep: expert parallel: so many data-parallel ranks share the experts of sparse layers, each holding 1 / ep of them.
    sequence_parallel: shard the residual stream over tp between the linear layers; None: whenever tp > 1.
    keep_gathered: with sequence parallelism, keep the gathered inputs of linear layers for backward (4 all-gathers a
    layer instead of 6, for tp times the memory of those inputs).
    schedule: in which order pipeline ranks run the micro-batches. virtual_stages: stages of layers that each of them
    holds; more than one with schedule interleaved only. stage_layers: layers of each of the pp * virtual_stages stages,
    from the first of the model to the last; None: balanced by cost.
    zero: 1: each data-parallel rank holds a part of the optimizer's state (ZeRO-1); 0: each holds all of it.
    bucket_mb: MiB of gradients that data-parallel ranks sum at a time, while backward goes on.
    vocab_multiple: the vocabulary is padded to a multiple of this times tp.
    timeout: seconds after which a collective that does not complete ends the job.
    """

    tp: int = 1
    pp: int = 1
    dp: int | None = None
    ep: int = 1
    sequence_parallel: bool | None = None
    keep_gathered: bool = False
    schedule: Literal["1f1b", "gpipe", "interleaved"] = "1f1b"
    virtual_stages: int = 1
    stage_layers: tuple[int, ...] | None = None
    zero: Literal[0, 1] = 1
    bucket_mb: float = 40.0
    vocab_multiple: int = 64
    timeout: float = 600.0
