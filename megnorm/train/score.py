"""What a classifier says to the whole of a split, and how good that is."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megnorm.data.classes import ClassLoader
from megnorm.metrics import scores
from megnorm.models.build import Model
from megnorm.parallel.collectives import gather_objects
from megnorm.parallel.pipeline import Pipeline
from megnorm.parallel.schedule import forward_only
from megnorm.train.build import Run
from megnorm.train.passes import set_training
from megnorm.train.rows import micro_batches


class _Keep:
    """A stage for the executor, forward alone; the last one keeps what it says to each micro-batch."""

    def __init__(self, stage: Model) -> None:
        self.stage, self.edge = stage, stage.edge
        self.said: list[Tensor] = []

    def __call__(self, batch: Any, carry: Tensor | None) -> Tensor:
        x = self.stage.states(batch, carry)
        if not self.stage.last:
            return x
        self.said.append(x.double().cpu())
        return x.new_zeros(())


@torch.no_grad()
def score(run: Run, data: ClassLoader) -> dict[str, float]:
    """Metrics over every row of the split, on every rank; collective."""
    mesh, config = run.mesh, run.plan.config
    share = math.ceil(data.samples() / mesh.dp.size)
    first = min(mesh.dp.rank * share, data.samples())
    count = min(share, data.samples() - first)
    set_training(run, False)
    run.flat.wait_weights()
    stages = {index: _Keep(stage) for index, stage in run.stages.items()}
    pipeline = Pipeline(stages, mesh)
    if count:
        rows = data.batch(first, count, shuffle=False)
        parts = list(micro_batches(rows, config.train, mesh.device))
        pipeline.run(forward_only(config.parallel.pp, config.parallel.virtual_stages, len(parts)), parts)
    own = [part.numpy() for stage in stages.values() for part in stage.said]
    said = [part for parts in gather_objects(gather_objects(own, mesh.pp)[-1], mesh.dp) for part in parts]
    z = np.concatenate(said)
    if config.model.classes == 1:
        return scores.of_numbers(z[:, 0], data.labels.astype(np.float64))
    return scores.of_classes(z.argmax(1), data.labels.astype(np.int64), config.model.classes)
