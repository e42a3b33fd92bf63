"""One optimizer step, and one evaluation."""

import logging
import math
import time
from dataclasses import dataclass, field
from functools import partial

import torch

from megnorm.layers import router
from megnorm.models.build import Input
from megnorm.optim.clip import clip_factor, global_norm
from megnorm.optim.schedule import learning_rate
from megnorm.parallel.collectives import all_reduce
from megnorm.train.build import Run
from megnorm.train.diagnose import explain
from megnorm.train.guard import Trouble
from megnorm.train.passes import forward_backward, loss_sum, repeat
from megnorm.train.rows import global_tokens, label_count, micro_batches, own_rows

log = logging.getLogger("megnorm")


@dataclass(frozen=True)
class StepResult:
    """loss: mean over the step's tokens, in nats. sequences: of the step, over all ranks. tokens: that had a loss.

    grad_norm: before clipping. skipped: the update was left out (fp16 overflowed, or train.guard said so). probes: by
    name, on probed steps. routing: of sparse layers, by name: their own losses, the load of the fullest expert over the
    mean of its layer, the part of slots that was dropped.
    """

    loss: float
    sequences: int
    tokens: int
    grad_norm: float
    lr: float
    seconds: float
    skipped: bool
    probes: dict[str, float]
    routing: dict[str, float] = field(default_factory=dict)


def train_step(run: Run) -> StepResult:
    """Forward, backward, reduce, clip, update: from ``run.step`` to ``run.step + 1``.

    The loss is the sum over all tokens divided by their global number, so micro-batches and ranks with different loss
    masks weigh what they should. Raises DivergedError.
    """
    begin = time.perf_counter()
    config, step = run.plan.config, run.step + 1
    run.observer.begin(step)
    sequences = config.train.batch_at(run.consumed)
    batch = own_rows(run, run.train_data, run.consumed, sequences)
    tokens = global_tokens(run, batch)
    parts = list(micro_batches(batch, config.train, run.mesh.device))
    stages = list(run.stages.values())
    router.reset_loads(*stages)
    total = forward_backward(run, parts, tokens)
    routing, loads = _routing(run)
    local = total.clone()
    for axis in (run.mesh.pp, run.mesh.dp):
        all_reduce(total, axis)
    run.flat.finish()
    if run.scale.scale != 1.0:
        run.flat.scale_grads(1.0 / run.scale.scale)
    if run.observer.active:
        run.flat.gather_grads()
    norm, loss = float(global_norm(run.flat.pieces, run.mesh, sharded=run.flat.shard)), float(total)
    run.observer.before_update()
    # fp16 overflow is cured by a smaller loss scale, as long as there is one.
    scaled = config.train.precision == "fp16" and run.scale.scale > 1.0
    overflow = scaled and math.isfinite(loss) and not math.isfinite(norm)
    trouble = None if overflow else run.guard.judge(loss, norm)
    lr = learning_rate(config.optim, run.updates + 1, config.train.steps)
    if trouble is not None:
        _explain(run, trouble, float(local), parts, tokens)
        run.guard.act(step, trouble, speak=run.mesh.rank == 0)
    elif not overflow:
        _update(run, norm, lr)
        router.update_biases(loads, *stages)
    if config.train.precision == "fp16":
        run.scale.update(math.isfinite(norm))
    run.step, run.consumed = step, run.consumed + sequences
    if run.observer.active:
        run.flat.wait_weights()
    probes = run.observer.collect()
    skipped = overflow or trouble is not None
    return StepResult(loss, sequences, tokens, norm, lr, time.perf_counter() - begin, skipped, probes, routing)


def _routing(run: Run) -> tuple[dict[str, float], torch.Tensor | None]:
    """What sparse layers did in the passes of this step, and the loads of their experts; collective."""
    if not run.plan.config.model.sparse_layers:
        return {}, None
    loads, extra = router.loads(run.mesh, *run.stages.values()), run.pipeline.extra.clone()
    for axis in (run.mesh.pp, run.mesh.dp):
        all_reduce(extra, axis)
    found = {"routing_loss": float(extra), "fullest_expert": router.fullest(loads, run.mesh)}
    if run.plan.config.model.moe.capacity is not None:
        found["dropped"] = router.dropped(loads, run.mesh, *run.stages.values())
    return found, loads


def _update(run: Run, norm: float, lr: float) -> None:
    factor = clip_factor(torch.tensor(norm), run.plan.config.optim.clip)
    if factor != 1.0:
        run.flat.scale_grads(factor)
    run.optimizer.step(lr)
    run.flat.publish()
    run.updates += 1


def _explain(run: Run, trouble: Trouble, loss: float, parts: list[Input], tokens: int) -> None:
    """Say on rank 0 where the trouble came from; collective. loss: this rank's part of it."""
    t = run.plan.config.train
    first = run.consumed + run.mesh.dp.rank * (t.batch_at(run.consumed) // run.mesh.dp.size)

    def samples(micro_batch: int) -> tuple[int, int]:
        begin = first + micro_batch * t.micro_batch
        return begin, begin + t.micro_batch - 1

    run.flat.gather_grads()
    again = partial(repeat, run, parts, tokens)
    stages = list(run.stages.values())
    words = explain(trouble, stages, run.named, run.mesh, local_loss=loss, samples=samples, again=again)
    if run.mesh.rank == 0:
        log.error("step %d: %s: %s", run.step + 1, trouble.text, words)


@torch.no_grad()
def evaluate(run: Run) -> float:
    """Mean loss in nats over the first ``eval_batches`` batches of the validation split; the same samples every time."""
    assert run.valid_data is not None
    t, mesh = run.plan.config.train, run.mesh
    sums = torch.zeros(2, dtype=torch.float64, device=mesh.device)
    for i in range(t.eval_batches):
        batch = own_rows(run, run.valid_data, i * t.global_batch, t.global_batch)
        parts = list(micro_batches(batch, t, mesh.device))
        sums += torch.stack([loss_sum(run, parts), label_count(batch).to(mesh.device)])
    all_reduce(sums, mesh.dp)
    return float(sums[0] / sums[1].clamp_min(1.0))
