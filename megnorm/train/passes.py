"""The passes of a step: a rank's rows of a batch, cut into micro-batches, forward and backward through its stages."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megnorm.data.batch import Batch
from megnorm.models.causal import Tokens
from megnorm.parallel.collectives import all_reduce
from megnorm.parallel.config import ParallelConfig
from megnorm.parallel.recorder import RECORDER
from megnorm.parallel.schedule import Action, Schedule, forward_only, make_schedule
from megnorm.train.build import Run, Samples
from megnorm.train.config import TrainConfig


def forward_backward(run: Run, parts: Sequence[Tokens], tokens: int) -> Tensor:
    """This rank's part of the mean loss over ``tokens``; gradients end in ``run.flat``, being summed over the dp axis."""
    run.flat.zero()

    def final(action: Action, last: bool) -> None:
        if last:
            run.flat.expect(action.stage)

    return _run(run, parts, tokens, final)


def repeat(run: Run, parts: Sequence[Tokens], tokens: int, mark: Callable[[int, int], None]) -> Tensor:
    """The same passes once more, to look at; gradients pile up and are not summed.

    mark: called with micro-batch and stage before each forward pass.
    """
    return _run(
        run, parts, tokens, lambda action, last: mark(action.micro_batch, action.stage) if action.kind == "F" else None
    )


def _run(run: Run, parts: Sequence[Tokens], tokens: int, tell: Callable[[Action, bool], None]) -> Tensor:
    config, mesh = run.plan.config, run.mesh
    set_training(run, True)

    def before(action: Action, last: bool) -> None:
        RECORDER.tick()
        run.rng.begin(config.train.seed, run.step + 1, action.micro_batch, mesh.dp.rank, mesh.tp.rank)
        tell(action, last)

    schedule = _schedule(config.parallel, len(parts))
    return run.pipeline.run(schedule, parts, weight=1.0 / tokens, scale=run.scale.scale, before=before)


@torch.no_grad()
def loss_sum(run: Run, parts: Sequence[Tokens]) -> Tensor:
    """Sum of the losses of this rank's micro-batches, on every rank of its pipeline; no gradient."""
    parallel = run.plan.config.parallel
    set_training(run, False)
    schedule = forward_only(parallel.pp, parallel.virtual_stages, len(parts))
    total = run.pipeline.run(schedule, parts, before=lambda action, last: RECORDER.tick())
    return all_reduce(total, run.mesh.pp)


@functools.lru_cache(maxsize=64)
def _schedule(parallel: ParallelConfig, micro_batches: int) -> Schedule:
    return make_schedule(parallel.schedule, parallel.pp, parallel.virtual_stages, micro_batches)


def set_training(run: Run, mode: bool) -> None:
    for stage in run.stages.values():
        stage.train(mode)


def micro_batches(batch: Batch, train: TrainConfig, device: torch.device) -> Iterator[Tokens]:
    """The rows of a rank's batch, ``micro_batch`` sequences at a time; packed rows (b = 1) stand one behind the other."""
    ends = None if batch.cu_seqlens is None else batch.cu_seqlens[1:].cpu()
    dim, size = (1, train.micro_batch) if ends is None else (0, train.micro_batch * train.sequence_length)
    batch = batch.to(device)
    for first in range(0, batch.tokens.shape[dim], size):
        length = min(size, batch.tokens.shape[dim] - first)
        tokens, labels, mask = (x.narrow(dim, first, length) for x in (batch.tokens, batch.labels, batch.loss_mask))
        positions = None if batch.positions is None else batch.positions.narrow(dim, first, length)
        if ends is None:
            yield Tokens(tokens, labels, mask, positions)
            continue
        inside = ends[(ends > first) & (ends <= first + length)]  # every row ends a document piece
        yield Tokens(tokens, labels, mask, positions, tuple(inside.diff(prepend=inside.new_tensor([first])).tolist()))


def own_rows(run: Run, data: Samples, first_sample: int, sequences: int) -> Batch:
    """This rank's rows of a global batch of ``sequences``; padding is never a label that counts."""
    config, dp = run.plan.config, run.mesh.dp
    batch = data.batch(first_sample, sequences, dp.rank, dp.size)
    if config.model.padding_id is None:
        return batch
    return replace(batch, loss_mask=batch.loss_mask * (batch.labels != config.model.padding_id))


def global_tokens(run: Run, batch: Batch) -> int:
    count = batch.loss_mask.sum(dtype=torch.float64).to(run.mesh.device)
    return max(round(float(all_reduce(count, run.mesh.dp))), 1)
