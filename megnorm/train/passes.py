"""The passes of a step: a rank's micro-batches forward and backward through its stages."""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megnorm.models.build import Input
from megnorm.parallel.collectives import all_reduce
from megnorm.parallel.config import ParallelConfig
from megnorm.parallel.recorder import RECORDER
from megnorm.parallel.schedule import Action, Schedule, forward_only, make_schedule
from megnorm.train.build import Run


def forward_backward(run: Run, parts: Sequence[Input], tokens: int) -> Tensor:
    """This rank's part of the mean loss over ``tokens``; gradients end in ``run.flat``, being summed over the dp axis."""
    run.flat.zero()

    def final(action: Action, last: bool) -> None:
        if last:
            run.flat.expect(action.stage)

    return _run(run, parts, tokens, final)


def repeat(run: Run, parts: Sequence[Input], tokens: int, mark: Callable[[int, int], None]) -> Tensor:
    """The same passes once more, to look at; gradients pile up and are not summed.

    mark: called with micro-batch and stage before each forward pass.
    """
    return _run(
        run, parts, tokens, lambda action, last: mark(action.micro_batch, action.stage) if action.kind == "F" else None
    )


def _run(run: Run, parts: Sequence[Input], tokens: int, tell: Callable[[Action, bool], None]) -> Tensor:
    config, mesh = run.plan.config, run.mesh
    set_training(run, True)

    def before(action: Action, last: bool) -> None:
        RECORDER.tick()
        run.rng.begin(config.train.seed, run.step + 1, action.micro_batch, mesh.dp.rank, mesh.tp.rank)
        tell(action, last)

    schedule = _schedule(config.parallel, len(parts))
    return run.pipeline.run(schedule, parts, weight=1.0 / tokens, scale=run.scale.scale, before=before)


@torch.no_grad()
def loss_sum(run: Run, parts: Sequence[Input]) -> Tensor:
    """Sum of the losses of this rank's micro-batches, on every rank of its pipeline; no gradient."""
    parallel = run.plan.config.parallel
    set_training(run, False)
    schedule = forward_only(parallel.pp, parallel.virtual_stages, len(parts))

    def before(action: Action, last: bool) -> None:
        RECORDER.tick()
        run.rng.begin(run.plan.config.train.seed, run.step, action.micro_batch, run.mesh.dp.rank, run.mesh.tp.rank)

    total = run.pipeline.run(schedule, parts, before=before)
    return all_reduce(total, run.mesh.pp)


@functools.lru_cache(maxsize=64)
def _schedule(parallel: ParallelConfig, micro_batches: int) -> Schedule:
    return make_schedule(parallel.schedule, parallel.pp, parallel.virtual_stages, micro_batches)


def set_training(run: Run, mode: bool) -> None:
    for stage in run.stages.values():
        stage.train(mode)
