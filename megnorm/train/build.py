"""From a plan to a run: mesh, model, optimizer, data, all that a step touches."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch

from megnorm.checkpoint.saver import own_barrier
from megnorm.config import RunConfig
from megnorm.data.choose import Samples, open_split
from megnorm.data.classes import ClassLoader
from megnorm.kernels import backends, registry
from megnorm.layers import graphs
from megnorm.layers.env import Env
from megnorm.layers.recompute import Recompute
from megnorm.metrics import scores
from megnorm.metrics.observe import Observer
from megnorm.models.build import Model, build_model
from megnorm.models.causal import Tokens
from megnorm.optim.loss_scale import LossScale
from megnorm.optim.optimizer import Optimizer
from megnorm.parallel.collectives import all_reduce, gather_objects
from megnorm.parallel.data_parallel import DataParallel
from megnorm.parallel.layout import Named, named_matrices, share_copies
from megnorm.parallel.mesh import Mesh, build_mesh, stage_axis
from megnorm.parallel.pipeline import Pipeline
from megnorm.parallel.rng import DropoutRng
from megnorm.plan import Plan
from megnorm.refuse import PlanError
from megnorm.train.guard import Guard

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


@dataclass
class Run:
    """A training run as one rank holds it. step: updates done. consumed: samples used, over all ranks.

    stages: of this rank, by global index. named: their logical matrices. pipeline: runs them. flat: their weights and
    gradients, and the pieces of them that it updates. evaluators: called by every rank with the run and its held-out loss each
    time that this is measured; what they give is logged.
    """

    plan: Plan
    mesh: Mesh
    stages: dict[int, Model]
    named: list[Named]
    pipeline: Pipeline
    rng: DropoutRng
    flat: DataParallel
    optimizer: Optimizer
    scale: LossScale
    observer: Observer
    train_data: Samples
    valid_data: Samples | None
    step: int = 0
    consumed: int = 0
    updates: int = 0
    barrier: Callable[[], None] = field(default=lambda: None)
    guard: Guard = field(default_factory=Guard)
    evaluators: "list[Callable[[Run, float], Mapping[str, float]]]" = field(default_factory=list)


def build(plan: Plan, device: torch.device, train_data: Samples | None = None) -> Run:
    """Build what ``plan`` says on this rank; data first, since bad input is found there.

    train_data: instead of what the config names, without a validation split (for benchmarks).
    """
    config = plan.config
    valid_data = None
    if train_data is None:
        if config.model.family == "classifier" and config.train.eval_batches:
            scores.require()
        train_data = open_data(plan, "train")
        valid_data = open_data(plan, "valid") if config.train.eval_batches else None
    mesh = mesh_of(plan, device)
    stages, rng = build_stages(plan, mesh)
    masters = torch.promote_types(DTYPES[config.train.precision], torch.float32)
    adamw = backends.chosen(registry.Need("adamw", device.type, masters), config.kernels)[1]
    _agree_on_kernels(mesh)
    flat = flatten(plan, mesh, stages)
    if config.kernels.graphs:
        capture_blocks(plan, mesh, stages)
    return Run(
        plan,
        mesh,
        stages,
        list(named_matrices(*stages.values())),
        Pipeline(stages, mesh),
        rng,
        flat,
        Optimizer(flat.pieces, config.optim, mesh, sharded=flat.shard, adamw=adamw),
        LossScale(config.optim.loss_scale if config.train.precision == "fp16" else 1.0, config.optim.loss_scale_window),
        Observer(
            list(stages.values()),
            config.metrics.probes,
            every=config.metrics.probe_every,
            reduce_sum=lambda x: all_reduce(x, mesh.tp),
            reduce_activations=lambda x: all_reduce(all_reduce(x, mesh.tp), mesh.dp),
            gather=lambda sums: chain(*gather_objects(gather_objects(sums, mesh.ep), mesh.pp)),
            counts=lambda matrix: matrix.replicas == "edp" or mesh.ep.rank == 0,
        ),
        train_data,
        valid_data,
        barrier=own_barrier(),
        guard=Guard(config.train.guard),
    )


def _agree_on_kernels(mesh: Mesh) -> None:
    """Every rank of an accelerator takes the same kernels. Raises ValueError: one rank's machine lacks a library."""
    if mesh.device.type == "cpu":  # the reference alone
        return
    mine = {choice.need: choice.backend for choice in registry.report()}
    for axis in (mesh.tp, mesh.dp, mesh.pp):
        for other in gather_objects({str(need): backend for need, backend in mine.items()}, axis):
            registry.check_agreement(mine, other)


def mesh_of(plan: Plan, device: torch.device) -> Mesh:
    """The mesh of a plan; the default process group must hold ``plan.world`` ranks."""
    parallel = plan.config.parallel
    return build_mesh(
        tp=parallel.tp,
        pp=parallel.pp,
        dp=plan.dp,
        ep=parallel.ep,
        kv_heads=plan.config.model.kv,
        device=device,
        sequence_parallel=plan.sequence_parallel,
        keep_gathered=parallel.keep_gathered,
        ties=plan.ties,
        timeout=parallel.timeout,
    )


def build_stages(plan: Plan, mesh: Mesh) -> tuple[dict[int, Model], DropoutRng]:
    """This rank's stages by global index, with initial weights in fp32 (fp64 for fp64), and the place of their dropout."""
    config, rng = plan.config, DropoutRng(mesh.device)
    compute = DTYPES[config.train.precision]
    recompute = Recompute(config.train.recompute, config.train.recompute_blocks)
    env = Env(
        mesh,
        torch.promote_types(compute, torch.float32),
        config.kernels,
        rng,
        compute,
        recompute,
        packed=config.data.separate_documents,
        tokens=config.train.micro_batch * config.train.sequence_length,
        region=_region(config, mesh),
    )
    stages = {
        index: build_model(
            config.model,
            env,
            seed=config.train.seed,
            resolved=plan.resolved,
            vocab_multiple=config.parallel.vocab_multiple,
            layers=plan.stages[index],
        )
        for index in own_stages(plan, mesh)
    }
    share_copies(stages.values())
    return stages, rng


def capture_blocks(plan: Plan, mesh: Mesh, stages: Mapping[int, Model]) -> None:
    """kernels.graphs: of this rank's only stage, whose weights lie where they will stay. Raises PlanError on a CPU."""
    if mesh.device.type != "cuda":
        raise PlanError("kernels.graphs captures CUDA graphs, and there is no CUDA device; set kernels.graphs=false")
    (stage,), t = stages.values(), plan.config.train
    tokens = torch.zeros(t.sequence_length, t.micro_batch, dtype=torch.int64, device=mesh.device)
    batch = Tokens(tokens, tokens, torch.ones(tokens.shape, device=mesh.device))
    graphs.capture(list(graphs.blocks_of(stage)), lambda: stage(batch))


def _region(config: RunConfig, mesh: Mesh) -> Callable[[], AbstractContextManager[None]]:
    return backends.delayed_region(stage_axis(mesh).group) if config.kernels.fp8 == "delayed" else nullcontext


def own_stages(plan: Plan, mesh: Mesh) -> range:
    """The global indices of this rank's stages."""
    return range(mesh.pp.rank, len(plan.stages), mesh.pp.size)


def flatten(plan: Plan, mesh: Mesh, stages: Mapping[int, Model]) -> DataParallel:
    """Flat storage of the stages in the precision of the run."""
    parallel, compute = plan.config.parallel, DTYPES[plan.config.train.precision]
    return DataParallel(
        stages,
        mesh,
        compute=compute,
        accumulate=torch.promote_types(compute, torch.float32),
        shard=parallel.zero == 1,
        bucket_bytes=parallel.bucket_mb * 1e6,
    )


def open_data(plan: Plan, split: str, state: Mapping[str, Any] | None = None, done: int = 0) -> Samples:
    """The loader of a split; state: of the checkpoint that the run continues, after ``done`` steps."""
    config, t = plan.config, plan.config.train
    used = 0 if state is None else state["samples"]
    loader = open_split(
        config.data,
        split,
        sequence_length=t.sequence_length,
        seed=t.seed,
        vocab_size=config.model.vocab_size,
        samples=t.consumed_after(t.steps - done, used) if split == "train" else used + t.eval_batches * t.global_batch,
        state=state,
    )
    if isinstance(loader, ClassLoader) and (found := len(loader.classes) or 1) != config.model.classes:
        what = f"{found} classes" if loader.classes else "numbers"
        raise PlanError(
            f"model.classes={config.model.classes}, but data.path has {what} as labels; set model.classes={found}"
        )
    if isinstance(loader, ClassLoader):
        if config.data.test:
            raise PlanError("data.test: training scores data.valid alone; leave it out, or name its file as data.valid")
        loader.types = config.model.segments
        texts = loader.texts
        if 1 < loader.types < texts:
            raise PlanError(
                f"model.segments={loader.types}, but rows of data.path have {texts} texts; set model.segments={texts} for a "
                "token type each, 1 for one that all share, or 0"
            )
    return loader
