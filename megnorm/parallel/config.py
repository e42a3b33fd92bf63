"""Options of the parallel layout."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ParallelConfig:
    """Sizes of the mesh axes; their product is the number of ranks.

    tp: tensor parallel. dp: data parallel; None: what is left of the ranks. pp: pipeline stages.
    sequence_parallel: shard the residual stream over tp between the linear layers; None: whenever tp > 1.
    keep_gathered: with sequence parallelism, keep the gathered inputs of linear layers for backward (4 all-gathers a
    layer instead of 6, for tp times the memory of those inputs).
    vocab_multiple: the vocabulary is padded to a multiple of this times tp.
    timeout: seconds after which a collective that does not complete ends the job.
    """

    tp: int = 1
    pp: int = 1
    dp: int | None = None
    sequence_parallel: bool | None = None
    keep_gathered: bool = False
    vocab_multiple: int = 64
    timeout: float = 600.0
