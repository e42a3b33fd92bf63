"""One optimizer step, and one evaluation."""

import functools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from megnorm.data.batch import Batch
from megnorm.models.causal import Tokens
from megnorm.optim.clip import clip_factor, global_norm
from megnorm.optim.schedule import learning_rate
from megnorm.parallel.collectives import all_reduce
from megnorm.parallel.config import ParallelConfig
from megnorm.parallel.schedule import Action, Schedule, forward_only, make_schedule
from megnorm.train.build import Run, Samples
from megnorm.train.config import TrainConfig


class DivergedError(RuntimeError):
    """Loss or gradients are not finite; nothing of this step was applied."""


@dataclass(frozen=True)
class StepResult:
    """loss: mean over the step's tokens, in nats. tokens: that had a loss. grad_norm: before clipping.

    skipped: fp16 overflowed and the update was left out. probes: by name, on probed steps.
    """

    loss: float
    tokens: int
    grad_norm: float
    lr: float
    seconds: float
    skipped: bool
    probes: dict[str, float]


def train_step(run: Run) -> StepResult:
    """Forward, backward, reduce, clip, update: from ``run.step`` to ``run.step + 1``.

    The loss is the sum over all tokens divided by their global number, so micro-batches and ranks with different loss
    masks weigh what they should. Raises DivergedError.
    """
    begin = time.perf_counter()
    config, step = run.plan.config, run.step + 1
    run.observer.begin(step)
    batch = _own_rows(run, run.train_data, run.consumed)
    tokens = _global_tokens(run, batch)
    parts = list(micro_batches(batch, config.train, run.mesh.device))
    run.flat.zero()
    set_training(run, True)

    def before(action: Action, final: bool) -> None:
        run.rng.begin(config.train.seed, step, action.micro_batch, run.mesh.dp.rank, run.mesh.tp.rank)
        if final:
            run.flat.expect(action.stage)

    schedule = _schedule(config.parallel, len(parts))
    total = run.pipeline.run(schedule, parts, weight=1.0 / tokens, scale=run.scale.scale, before=before)
    for axis in (run.mesh.pp, run.mesh.dp):
        all_reduce(total, axis)
    run.flat.finish()
    if run.scale.scale != 1.0:
        run.flat.scale_grads(1.0 / run.scale.scale)
    if run.observer.active:
        run.flat.gather_grads()
    norm = float(global_norm(run.flat.pieces, run.mesh, sharded=run.flat.shard))
    run.observer.before_update()
    finite = math.isfinite(norm)
    lr = learning_rate(config.optim, run.updates + 1, config.train.steps)
    if finite:
        _update(run, norm, lr)
    elif config.train.precision != "fp16" or run.scale.scale <= 1.0 or not math.isfinite(float(total)):
        # fp16 overflow is cured by a smaller loss scale, as long as there is one.
        raise DivergedError(
            f"step {step}: loss {float(total)}, gradient norm {norm}; nothing was saved. Lower optim.lr, lengthen "
            "optim.warmup_steps or choose a more stable norm.scheme"
        )
    if config.train.precision == "fp16":
        run.scale.update(finite)
    run.step, run.consumed = step, run.consumed + config.train.global_batch
    if run.observer.active:
        run.flat.wait_weights()
    probes = run.observer.collect()
    return StepResult(float(total), tokens, norm, lr, time.perf_counter() - begin, not finite, probes)


@torch.no_grad()
def evaluate(run: Run) -> float:
    """Mean loss in nats over the first ``eval_batches`` batches of the validation split; the same samples every time."""
    assert run.valid_data is not None
    config, mesh = run.plan.config, run.mesh
    t = config.train
    set_training(run, False)
    sums = torch.zeros(2, dtype=torch.float64, device=mesh.device)
    for i in range(t.eval_batches):
        batch = _own_rows(run, run.valid_data, i * t.global_batch)
        parts = list(micro_batches(batch, t, mesh.device))
        schedule = forward_only(config.parallel.pp, config.parallel.virtual_stages, len(parts))
        loss = run.pipeline.run(schedule, parts)
        sums += torch.stack([all_reduce(loss, mesh.pp), batch.loss_mask.sum(dtype=torch.float64).to(mesh.device)])
    all_reduce(sums, mesh.dp)
    return float(sums[0] / sums[1].clamp_min(1.0))


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


def _own_rows(run: Run, data: Samples, first_sample: int) -> Batch:
    """This rank's rows of a global batch; padding is never a label that counts."""
    config, dp = run.plan.config, run.mesh.dp
    batch = data.batch(first_sample, config.train.global_batch, dp.rank, dp.size)
    if config.model.padding_id is None:
        return batch
    return replace(batch, loss_mask=batch.loss_mask * (batch.labels != config.model.padding_id))


def _global_tokens(run: Run, batch: Batch) -> int:
    count = batch.loss_mask.sum(dtype=torch.float64).to(run.mesh.device)
    return max(round(float(all_reduce(count, run.mesh.dp))), 1)


def _update(run: Run, norm: float, lr: float) -> None:
    factor = clip_factor(torch.tensor(norm), run.plan.config.optim.clip)
    if factor != 1.0:
        run.flat.scale_grads(factor)
    run.optimizer.step(lr)
    run.flat.publish()
    run.updates += 1
