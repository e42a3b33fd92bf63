"""What every rank of a plan would hold, counted without starting any: stages are built on the meta device, which has shapes
and no memory, and laid out as training lays them out.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from megnorm.layers.env import Env
from megnorm.models.build import FAMILIES, Model
from megnorm.optim.muon import takes
from megnorm.parallel.data_parallel import DataParallel
from megnorm.parallel.layout import named_matrices, share_copies
from megnorm.parallel.mesh import Axis, Mesh
from megnorm.plan import Plan
from megnorm.train.build import DTYPES, flatten, own_stages

META = torch.device("meta")


@dataclass(frozen=True)
class Memory:
    """Bytes that the ranks of one (pp, tp) place hold between steps; they differ in ``state`` alone, listed by dp rank.

    state: fp32 masters (where weights are lowered) and the optimizer's moments.
    """

    pp: int
    tp: int
    stages: tuple[int, ...]
    weights: int
    grads: int
    state: tuple[int, ...]

    @property
    def totals(self) -> tuple[int, ...]:
        """By dp rank."""
        return tuple(self.weights + self.grads + state for state in self.state)


def memory(plan: Plan) -> Iterator[Memory]:
    """Of every (pp, tp) place, pp outermost."""
    parallel, kv = plan.config.parallel, plan.config.model.kv
    replicas = max(1, parallel.tp // kv)
    base = Mesh(
        dp=Axis("dp", plan.dp),
        ep=Axis("ep", parallel.ep),
        edp=Axis("edp", plan.dp // parallel.ep),
        device=META,
        sequence_parallel=plan.sequence_parallel,
    )
    for pp in range(parallel.pp):
        for tp in range(parallel.tp):
            mesh = replace(
                base,
                pp=Axis("pp", parallel.pp, pp),
                tp=Axis("tp", parallel.tp, tp),
                kv=Axis("kv", replicas, tp % replicas),
            )
            yield _place(plan, mesh)


def _place(plan: Plan, mesh: Mesh) -> Memory:
    compute = DTYPES[plan.config.train.precision]
    env = Env(mesh, torch.promote_types(compute, torch.float32))
    m = plan.config.model
    stages = {
        index: FAMILIES[m.family](m, plan.resolved, plan.padded_vocab, env, plan.stages[index])
        for index in own_stages(plan, mesh)
    }
    share_copies(stages.values())
    flat = flatten(plan, mesh, stages)
    lowered = env.dtype != compute
    held, moments = _shares(plan, flat, stages)
    state = (held * lowered + moments) * env.dtype.itemsize
    return Memory(
        mesh.pp.rank, mesh.tp.rank, tuple(stages), flat.weights.nbytes, flat.grads.nbytes, tuple(state.tolist())
    )


def _shares(plan: Plan, flat: DataParallel, stages: dict[int, Model]) -> tuple[np.ndarray, np.ndarray]:
    """By dp rank: elements of the ranges that it updates, and moments kept for them (none for padding)."""
    muon = plan.config.optim.name == "muon"
    matrices = [(n.view(), 1 if muon and takes(n.matrix) else 2) for n in named_matrices(*stages.values())]
    starts, sizes, times = np.array(sorted((x.storage_offset(), x.numel(), kept) for x, kept in matrices)).T
    # Moments of what lies below a place in storage: 0, then rising through every matrix, level between them.
    places = np.stack([starts, starts + sizes], 1).ravel()
    below = np.repeat(np.concatenate([[0], (sizes * times).cumsum()]), 2)[1:-1]
    held, moments = np.zeros(plan.dp, np.int64), np.zeros(plan.dp, np.int64)
    for bucket in flat.buckets:
        parts = bucket.axis.size if flat.shard else 1
        edges = np.linspace(bucket.start, bucket.stop, parts + 1, dtype=np.int64)
        covered = np.interp(edges, places, below).round().astype(np.int64)
        # A part of what edp ranks share is the same on the dp / edp neighbours, who hold as much of other experts.
        for total, of_part in ((held, np.diff(edges)), (moments, np.diff(covered))):
            total += of_part.repeat(plan.dp // parts)
    return held, moments


def table(plan: Plan) -> list[str]:
    """Text: for every pipeline rank the fullest of its ranks, and that against their mean."""
    places: dict[int, list[Memory]] = {}
    for place in memory(plan):
        places.setdefault(place.pp, []).append(place)
    lines = [
        f"{'memory in GB':<16}{'weights':>9}{'gradients':>11}{'optimizer':>11}{'together':>10}{'fullest / mean':>16}"
    ]
    for pp, found in places.items():
        fullest = max(found, key=lambda place: max(place.totals))
        mean = float(np.mean([place.totals for place in found]))
        parts = (fullest.weights, fullest.grads, max(fullest.state), max(fullest.totals))
        weights, grads, state, total = (f"{n / 1e9:.3f}" for n in parts)
        name = f"  pipeline rank {pp}" if len(places) > 1 else "  every rank"
        lines.append(f"{name:<18}{weights:>7}{grads:>11}{state:>11}{total:>10}{max(fullest.totals) / mean:>16.4f}")
    return lines
