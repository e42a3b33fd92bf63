"""From a plan to a run: mesh, model, optimizer, data, all that a step touches."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from megnorm.checkpoint.saver import own_barrier
from megnorm.data.batch import Batch
from megnorm.data.loader import Loader
from megnorm.layers.env import Env
from megnorm.metrics.observe import Observer
from megnorm.models.causal import CausalLM, build_model
from megnorm.optim.loss_scale import LossScale
from megnorm.optim.optimizer import Optimizer
from megnorm.parallel.collectives import all_reduce
from megnorm.parallel.data_parallel import GradBuffer
from megnorm.parallel.layout import Named, named_matrices
from megnorm.parallel.mesh import Mesh, build_mesh
from megnorm.parallel.rng import DropoutRng
from megnorm.plan import Plan
from megnorm.train.guard import Guard

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


class Samples(Protocol):
    """What a step needs of a loader."""

    def batch(self, first_sample: int, count: int, dp_rank: int = 0, dp_size: int = 1) -> Batch: ...
    def state(self, consumed_samples: int) -> dict[str, Any]: ...


@dataclass
class Run:
    """A training run as one rank holds it. step: updates done. consumed: samples used, over all ranks."""

    plan: Plan
    mesh: Mesh
    model: CausalLM
    rng: DropoutRng
    named: list[Named]
    buffer: GradBuffer
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


def build(plan: Plan, device: torch.device, train_data: Samples | None = None) -> Run:
    """Build what ``plan`` says on this rank; data first, since bad input is found there.

    train_data: instead of what the config names, without a validation split (for benchmarks).
    """
    config = plan.config
    valid_data = None
    if train_data is None:
        train_data = open_data(plan, "train")
        valid_data = open_data(plan, "valid") if config.train.eval_batches else None
    mesh = mesh_of(plan, device)
    model, rng = build_trained_model(plan, mesh)
    named = list(named_matrices(model))
    dtype = DTYPES[config.train.precision]
    optimizer = Optimizer(named, config.optim, dtype)
    params = list(model.parameters())
    return Run(
        plan,
        mesh,
        model,
        rng,
        named,
        GradBuffer(params, torch.promote_types(dtype, torch.float32)),
        optimizer,
        LossScale(config.optim.loss_scale if dtype == torch.float16 else 1.0, config.optim.loss_scale_window),
        Observer(
            model,
            config.metrics.probes,
            every=config.metrics.probe_every,
            reduce_sum=lambda x: all_reduce(x, mesh.tp),
            reduce_activations=lambda x: all_reduce(all_reduce(x, mesh.tp), mesh.dp),
        ),
        train_data,
        valid_data,
        barrier=own_barrier(),
        guard=Guard(config.train.guard),
    )


def mesh_of(plan: Plan, device: torch.device) -> Mesh:
    """The mesh of a plan; the default process group must hold ``plan.world`` ranks."""
    parallel = plan.config.parallel
    return build_mesh(
        tp=parallel.tp,
        pp=parallel.pp,
        dp=plan.dp,
        kv_heads=plan.config.model.kv,
        device=device,
        sequence_parallel=plan.sequence_parallel,
        keep_gathered=parallel.keep_gathered,
    )


def build_trained_model(plan: Plan, mesh: Mesh) -> tuple[CausalLM, DropoutRng]:
    """The model with its initial weights, in fp32 (fp64 for fp64), and the random streams of its dropout."""
    config, rng = plan.config, DropoutRng(mesh.device)
    compute = DTYPES[config.train.precision]
    env = Env(mesh, torch.promote_types(compute, torch.float32), config.kernels.prefer, rng, compute)
    multiple = config.parallel.vocab_multiple
    model = build_model(config.model, env, seed=config.train.seed, resolved=plan.resolved, vocab_multiple=multiple)
    return model, rng


def open_data(plan: Plan, split: str, state: Mapping[str, Any] | None = None) -> Loader:
    """The loader of a split; state: of the checkpoint that the run continues."""
    config, t = plan.config, plan.config.train
    return Loader(
        config.data,
        split,
        sequence_length=t.sequence_length,
        seed=t.seed,
        vocab_size=config.model.vocab_size,
        samples=(t.steps if split == "train" else t.eval_batches) * t.global_batch,
        state=state,
    )
