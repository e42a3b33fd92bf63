"""One optimizer step, and one evaluation."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from megnorm.data.batch import Batch
from megnorm.models.causal import Tokens
from megnorm.optim.clip import clip_factor, global_norm
from megnorm.optim.schedule import learning_rate
from megnorm.parallel.collectives import all_reduce
from megnorm.parallel.layout import reduce_replicated_grads
from megnorm.parallel.recorder import RECORDER
from megnorm.train.build import Run, Samples
from megnorm.train.config import TrainConfig
from megnorm.train.diagnose import explain
from megnorm.train.guard import Trouble

log = logging.getLogger("megnorm")


@dataclass(frozen=True)
class StepResult:
    """loss: mean over the step's tokens, in nats. tokens: that had a loss. grad_norm: before clipping.

    skipped: the update was left out (fp16 overflowed, or train.guard said so). probes: by name, on probed steps.
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
    run.model.train()
    run.buffer.zero()
    total = _passes(run, parts, tokens)
    local = total.clone()
    all_reduce(total, run.mesh.dp)
    run.buffer.reduce(run.mesh)
    reduce_replicated_grads(run.buffer.params, run.mesh)
    if run.scale.scale != 1.0:
        run.buffer.flat.mul_(1.0 / run.scale.scale)
    norm, loss = float(global_norm(run.named, run.mesh)), float(total)
    run.observer.before_update()
    # fp16 overflow is cured by a smaller loss scale, as long as there is one.
    scaled = config.train.precision == "fp16" and run.scale.scale > 1.0
    overflow = scaled and math.isfinite(loss) and not math.isfinite(norm)
    trouble = None if overflow else run.guard.judge(loss, norm)
    lr = learning_rate(config.optim, run.updates + 1, config.train.steps)
    if trouble is not None:
        _explain(run, trouble, float(local), lambda mark: _passes(run, parts, tokens, mark))
        run.guard.act(step, trouble, speak=run.mesh.rank == 0)
    elif not overflow:
        _update(run, norm, lr)
    if config.train.precision == "fp16":
        run.scale.update(math.isfinite(norm))
    run.step, run.consumed = step, run.consumed + config.train.global_batch
    probes = run.observer.collect()
    skipped = overflow or trouble is not None
    return StepResult(loss, tokens, norm, lr, time.perf_counter() - begin, skipped, probes)


def _passes(
    run: Run, parts: list[Tokens], tokens: int, mark: Callable[[int, int], None] = lambda micro_batch, stage: None
) -> torch.Tensor:
    """Forward and backward of this rank's micro-batches: its part of the loss. mark: called before each of them."""
    seed, mesh = run.plan.config.train.seed, run.mesh
    total = torch.zeros((), dtype=torch.float64, device=mesh.device)
    for i, part in enumerate(parts):
        RECORDER.tick()
        mark(i, 0)
        run.rng.start(seed, run.step + 1, i, mesh.dp.rank, mesh.pp.rank, tp_rank=mesh.tp.rank)
        loss = run.model(part) / tokens
        (loss * run.scale.scale).backward()
        total += loss.detach()
    return total


def _explain(run: Run, trouble: Trouble, loss: float, again: Callable[[Callable[[int, int], None]], object]) -> None:
    """Say on rank 0 where the trouble came from; collective."""
    t = run.plan.config.train
    first = run.consumed + run.mesh.dp.rank * (t.global_batch // run.mesh.dp.size)

    def samples(micro_batch: int) -> tuple[int, int]:
        begin = first + micro_batch * t.micro_batch
        return begin, begin + t.micro_batch - 1

    words = explain(trouble, [run.model], run.named, run.mesh, local_loss=loss, samples=samples, again=again)
    if run.mesh.rank == 0:
        log.error("step %d: %s: %s", run.step + 1, trouble.text, words)


@torch.no_grad()
def evaluate(run: Run) -> float:
    """Mean loss in nats over the first ``eval_batches`` batches of the validation split; the same samples every time."""
    assert run.valid_data is not None
    t, mesh = run.plan.config.train, run.mesh
    run.model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=mesh.device)
    for i in range(t.eval_batches):
        batch = _own_rows(run, run.valid_data, i * t.global_batch)
        for part in micro_batches(batch, t, mesh.device):
            RECORDER.tick()
            sums += torch.stack([run.model(part).double(), part.loss_mask.sum().double()])
    all_reduce(sums, mesh.dp)
    return float(sums[0] / sums[1].clamp_min(1.0))


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
        run.buffer.flat.mul_(factor)
    run.optimizer.step(lr)
    run.updates += 1
