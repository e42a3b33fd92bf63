"""What a checkpoint of a run holds: shards of logical tensors and a small record."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megnorm.checkpoint import io
from megnorm.checkpoint.folder import latest, read_manifest
from megnorm.checkpoint.shard import Shard
from megnorm.config import to_dict
from megnorm.kernels.registry import Keeper
from megnorm.layers.router import biases
from megnorm.parallel.layout import Piece
from megnorm.train import report
from megnorm.train.build import Run, open_data

log = logging.getLogger("megnorm")
KEPT = "kernels"  # first part of the names of what kernels keep
NEW = ("classifier.", "pooler.")


def shards(run: Run, *, owned: bool) -> list[Shard]:
    """Weights (fp32 masters where they exist), moments, and what kernels keep; owned: only slices that this rank must write."""
    found = [
        Shard(name, view, piece.named.matrix.shape, offset)
        for name, piece, tensor in _tensors(run)
        if not owned or (piece.named.matrix.owner and (run.flat.shard or _replica(run, piece) == 0))
        for offset, view in piece.boxes(tensor)
    ]
    if not owned or run.mesh.dp.rank == run.mesh.tp.rank == 0:
        found += [Shard.whole(name, bias) for name, bias in biases(*run.stages.values())]
        found += _kept(run)
    return found


def _replica(run: Run, piece: Piece) -> int:
    """Which of the ranks that hold the same slice for other tokens this one is."""
    return run.mesh.axis(piece.named.matrix.replicas).rank


def _tensors(run: Run) -> Iterator[tuple[str, Piece, Tensor]]:
    for piece in run.flat.pieces:
        yield piece.named.name, piece, piece.master
    for state in run.optimizer.states():
        yield f"optim.{state.kind}.{state.piece.named.name}", state.piece, state.tensor


def _kept(run: Run) -> Iterator[Shard]:
    """Scales and histories of products with delayed scaling, which are the same on all ranks of a stage."""
    for stage in run.stages.values():
        for name, module in stage.named_modules():
            product = getattr(module, "product", None)
            if isinstance(product, Keeper):
                for kind, tensor in product.state().items():
                    yield Shard.whole(f"{KEPT}.{name}.{kind}", tensor)


def meta(run: Run) -> dict[str, Any]:
    """The record beside the tensors: enough to repeat, continue or export the run."""
    return {
        "step": run.step,
        "ranks": run.plan.world,
        "consumed_samples": run.consumed,
        "updates": run.updates,
        "loss_scale": {"scale": run.scale.scale, "good": run.scale.good},
        "guard": run.guard.state(),
        "data": run.train_data.state(run.consumed),
        "config": to_dict(run.plan.config),
        "resolved": run.plan.resolved.to_json(),
    }


def resume(run: Run, folder: Path) -> Path:
    """Continue from the newest checkpoint in ``folder`` that is whole on every rank; its path. Raises CheckpointError."""
    config = run.plan.config.checkpoint
    run.flat.wait_weights()
    wanted = _without_strangers(folder, shards(run, owned=False))
    loaded = io.resume(folder, wanted, agree=_agreement(run), verify=config.verify, threads=config.threads)
    assert loaded is not None, "the caller has seen a checkpoint"
    record = loaded.meta
    run.step, run.consumed, run.updates = record["step"], record["consumed_samples"], record["updates"]
    if {run.plan.config.train.precision, record["config"]["train"]["precision"]} == {"fp16"}:
        run.scale.scale, run.scale.good = record["loss_scale"]["scale"], record["loss_scale"]["good"]
    run.guard.load(record.get("guard", {}))
    run.optimizer.set_updates(run.updates)
    run.flat.publish()
    run.train_data = open_data(run.plan, "train", record["data"], run.step)
    for line in report.lines(run.plan, loaded):
        log.info("%s", line)
    return loaded.path


def _without_strangers(folder: Path, wanted: list[Shard]) -> list[Shard]:
    """A run may change to delayed scaling: what kernels keep begins anew where the newest checkpoint has none."""
    newest = latest(folder)
    if newest is None or not any(shard.name.startswith(f"{KEPT}.") for shard in wanted):
        return wanted
    there = read_manifest(newest)[0].tensors
    if any(name.startswith(f"{KEPT}.") for name in there):
        return wanted
    log.warning("the checkpoint was written without kernels.fp8=delayed: histories of largest values begin anew")
    return [shard for shard in wanted if not shard.name.startswith(f"{KEPT}.")]


def start_from(run: Run, source: Path) -> None:
    """Take the weights, and nothing else, of a run folder or checkpoint: step 0 of a new run. Raises CheckpointError."""
    folder = source / "checkpoints"
    path = io.latest(folder) if folder.is_dir() else source
    if path is None:
        raise io.CheckpointError(f"checkpoint.init_from: {folder} holds no whole checkpoint; name another run")
    run.flat.wait_weights()
    weights = [shard for shard in shards(run, owned=False) if not shard.name.startswith(("optim.", f"{KEPT}."))]
    if run.plan.config.model.family == "classifier":
        there = set(io.available(path))
        # A classifier begins as the encoder of a masked language model, with scores of its own.
        weights = [shard for shard in weights if shard.name in there or not shard.name.startswith(NEW)]
    io.load(path, weights, verify=run.plan.config.checkpoint.verify, convert=True)
    run.flat.publish()
    log.info("weights from %s; optimizer, data and step start anew", path)


def _agreement(run: Run) -> Callable[[bool], bool]:
    """true on every rank -> true on every rank."""
    if run.mesh.size == 1:
        return lambda good: good

    def agree(good: bool) -> bool:
        flag = torch.tensor(int(good), device=run.mesh.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MIN)
        return bool(flag)

    return agree
