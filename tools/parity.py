"""Is the parallel run the serial run? The worst difference of loss, gradients and weights, for any config and layout.

    python tools/parity.py --config run.yaml --layout tp=2 [key=value ...]
    torchrun --nproc-per-node 4 tools/parity.py --device cuda --layout tp=2,dp=2 [key=value ...]

Starts its own gloo ranks on this machine, or is one of those that a launcher started, with a GPU of its own. It builds the
config's model twice with the training code (once serially, once in the layout), feeds both the same random tokens with an
uneven loss mask, and compares. A difference is measured relative to
max(norm of the tensor, 1e-3 of the norm of all). Exit code 1 above tolerance.
"""

import argparse
import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from megnorm import config as configs
from megnorm.config import RunConfig
from megnorm.data.config import MULTIPLE
from megnorm.layers import router
from megnorm.models.build import Input
from megnorm.models.causal import Tokens
from megnorm.models.encdec import Pairs
from megnorm.models.masked import MaskedTokens
from megnorm.optim.clip import global_norm
from megnorm.parallel import launch, nccl
from megnorm.parallel.collectives import all_reduce, gather_objects
from megnorm.parallel.data_parallel import DataParallel
from megnorm.parallel.layout import full_tensor, named_matrices
from megnorm.parallel.mesh import Mesh
from megnorm.parallel.pipeline import Pipeline
from megnorm.parallel.rng import derive
from megnorm.parallel.schedule import Action, make_schedule
from megnorm.plan import Plan, make_plan
from megnorm.train.build import build_stages, flatten, mesh_of

TOLERANCE = {"fp64": 1e-10, "fp32": 1e-5}
SGD_STEPS, SGD_RATE = 10, 0.05
PARTS = 4  # micro-batches of a step over all data-parallel ranks, whatever the layout
ALONE = 2  # where there are neither stages nor replicas, which share them


@dataclass
class Trace:
    """What one run of a layout showed: full logical tensors by name, on the CPU."""

    initial: dict[str, Tensor]
    losses: list[float]
    grads: dict[str, Tensor]
    grad_norm: float
    weights: dict[str, Tensor]


@dataclass(frozen=True)
class Difference:
    """The worst relative differences between two traces, and where. initial_equal: bit for bit."""

    initial_equal: bool
    loss: float
    grad: float
    grad_name: str
    norm: float
    weight: float
    weight_name: str

    @property
    def worst(self) -> float:
        return max(self.loss, self.grad, self.norm, self.weight)


def trace(plan: Plan, mesh: Mesh, steps: int, parts: int = PARTS) -> Trace:
    """Run ``steps`` SGD steps of ``parts`` micro-batches in the layout of ``mesh``: initial weights, losses, first gradients,
    last weights.

    Whole tensors are on the ranks of the first stage.
    """
    stages, rng = build_stages(plan, mesh)
    flat = flatten(plan, mesh, stages)
    named = list(named_matrices(*stages.values()))
    pipeline = Pipeline(stages, mesh)

    def whole(storage: Callable[[nn.Parameter], Tensor]) -> dict[str, Tensor]:
        own = {n.name: full_tensor(n, storage(n.param), mesh).cpu() for n in named}
        found: dict[str, Tensor] = {}
        for part in (part for stage in gather_objects(gather_objects(own, mesh.ep), mesh.pp) for part in stage):
            for name, tensor in part.items():
                if not torch.equal(found.setdefault(name, tensor), tensor):
                    found[name] = torch.full_like(tensor, float("nan"))  # two stages hold different copies
        return found

    initial = whole(lambda param: param.detach())
    losses: list[float] = []
    grads: dict[str, Tensor] = {}
    norm = 0.0
    for step in range(steps):
        losses.append(_forward_backward(plan, mesh, pipeline, flat, step, parts))
        if step == 0:
            norm = float(global_norm(flat.pieces, mesh, sharded=flat.shard))
            flat.gather_grads()
            grads = whole(lambda param: param.main_grad)  # type: ignore[attr-defined]
        for piece in flat.pieces:
            piece.master.add_(piece.grad, alpha=-SGD_RATE)
        flat.publish()
        router.update_biases(router.loads(mesh, *stages.values()), *stages.values())
    flat.wait_weights()
    weights = whole(lambda param: param.detach())
    for found in gather_objects({k: x.cpu() for k, x in router.biases(*stages.values())}, mesh.pp):
        weights |= found
    return Trace(initial, losses, grads, norm, weights)


def _forward_backward(plan: Plan, mesh: Mesh, pipeline: Pipeline, flat: DataParallel, step: int, count: int) -> float:
    """One step's global loss, with that of sparse layers; gradients end in flat storage, reduced as training reduces them."""
    parts = [on_device(random_batch(plan.config, step, i), mesh.device) for i in range(count)]
    tokens = sum(float(part.loss_mask.sum()) for part in parts)
    own, parallel = parts[mesh.dp.rank :: mesh.dp.size], plan.config.parallel
    schedule = make_schedule(parallel.schedule, parallel.pp, parallel.virtual_stages, len(own))
    flat.zero()
    router.reset_loads(*pipeline.stages.values())  # type: ignore[arg-type]

    def before(action: Action, final: bool) -> None:
        if final:
            flat.expect(action.stage)

    total = pipeline.run(schedule, own, weight=1.0 / tokens, before=before) + pipeline.extra
    for axis in (mesh.pp, mesh.dp):
        all_reduce(total, axis)
    flat.finish()
    return float(total)


def on_device(batch: Input, device: torch.device) -> Input:
    """The batch with its tensors there."""
    moved = {key: x.to(device) for key, x in vars(batch).items() if isinstance(x, Tensor)}
    return dataclasses.replace(batch, **moved)


def random_batch(config: RunConfig, step: int, index: int) -> Input:
    """Random tokens [s, b] with a random loss mask whose sum differs between micro-batches, and padding if there is any.

    Of an encoder-decoder the source is longer than the target, by a number that differs between micro-batches.
    """
    generator = torch.Generator().manual_seed(derive(7, step, index))
    m, s, b = config.model, config.train.sequence_length, config.train.micro_batch
    tokens = torch.randint(0, m.vocab_size, (s + 1, b), generator=generator)
    if m.padding_id is not None:
        tokens[-(index + 1) :, 0] = m.padding_id
    mask = (torch.rand(s, b, generator=generator) < (0.5 + 0.1 * index)).float()
    plain = tokens[:-1], tokens[1:], mask
    if m.family == "causal":
        return Tokens(*plain)
    longer = s + MULTIPLE * (index % 2) if m.family == "encdec" else s
    real = torch.ones(longer, b, dtype=torch.bool)
    real[-(index + 1) :, 0] = False
    other = torch.randint(0, m.vocab_size, (longer, b), generator=generator)
    if m.family == "encdec":
        return Pairs(other, real, *plain)
    if m.family == "classifier":
        classes = torch.randint(0, m.classes, (b,), generator=generator)
        return MaskedTokens(tokens[:-1], classes, torch.ones(b), real=real, segments=other % max(m.segments, 1))
    return MaskedTokens(
        *plain, real=None if m.padding_id else real, segments=other % m.segments if m.segments else None
    )


def compare(serial: Trace, parallel: Trace) -> Difference:
    """The worst differences; every name of one must be in the other."""
    if set(serial.grads) != set(parallel.grads):
        raise AssertionError(f"the runs differ in their tensors: {sorted(set(serial.grads) ^ set(parallel.grads))}")
    grad, grad_name = _worst(serial.grads, parallel.grads)
    weight, weight_name = _worst(serial.weights, parallel.weights)
    loss = max(abs(a - b) / max(abs(a), 1e-30) for a, b in zip(serial.losses, parallel.losses, strict=True))
    norm = abs(serial.grad_norm - parallel.grad_norm) / serial.grad_norm
    equal = all(torch.equal(serial.initial[name], parallel.initial[name]) for name in serial.initial)
    return Difference(equal, loss, grad, grad_name, norm, weight, weight_name)


def _worst(a: dict[str, Tensor], b: dict[str, Tensor]) -> tuple[float, str]:
    everything = float(torch.stack([x.double().norm() for x in a.values()]).norm())
    if not everything:
        return float("inf"), "all zero"
    found = [
        (
            float((a[name].double() - b[name].double()).norm())
            / max(float(a[name].double().norm()), 1e-3 * everything),
            name,
        )
        for name in a
    ]
    return max((value if value == value else float("inf"), name) for value, name in found)


CPU = torch.device("cpu")


def on_rank(
    rank: int, world: int, config: RunConfig, steps: int = SGD_STEPS, device: torch.device = CPU
) -> Difference | None:
    """The body of a rank: both runs and their difference on rank 0. The default process group must be initialized."""
    plan = make_plan(config, world)
    mesh = mesh_of(plan, device)
    parts = ALONE if mesh.pp.size == mesh.dp.size == 1 else PARTS
    parallel = trace(plan, mesh, steps, parts)
    if rank != 0:
        return None
    return compare(trace(make_plan(serial_of(config), 1), Mesh(device=device), steps, parts), parallel)


def serial_of(config: RunConfig) -> RunConfig:
    """The same run on one rank, without recompute."""
    alone = dataclasses.replace(
        config.parallel,
        tp=1,
        pp=1,
        dp=1,
        ep=1,
        sequence_parallel=None,
        schedule="1f1b",
        virtual_stages=1,
        stage_layers=None,
    )
    plain = dataclasses.replace(config.train, recompute=(), recompute_blocks=None)
    return dataclasses.replace(config, parallel=alone, train=plain)


def parse_layout(text: str) -> list[str]:
    """``tp=2,dp=2`` -> overrides of the parallel section."""
    return [f"parallel.{part.strip()}" for part in text.split(",") if part.strip()]


def _spawned(rank: int, world: int, store: str, config: RunConfig, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    difference = on_rank(rank, world, config)
    if difference is not None:
        with open(out, "w", encoding="utf-8") as file:
            json.dump(dataclasses.asdict(difference), file)
    dist.barrier()  # a rank that leaves early breaks the connections of those still at work
    dist.destroy_process_group()


def run(config: RunConfig, world: int) -> Difference:
    """Start ``world`` ranks and measure."""
    make_plan(config, world)
    with tempfile.TemporaryDirectory() as folder:
        out = os.path.join(folder, "difference.json")
        mp.spawn(_spawned, (world, os.path.join(folder, "store"), config, out), nprocs=world)
        with open(out, encoding="utf-8") as file:
            found: dict[str, Any] = json.load(file)
    return Difference(**found)


def launched(config: RunConfig, where: launch.World) -> Difference | None:
    """As one of the ranks that a launcher started."""
    nccl.prepare(tp=config.parallel.tp, deterministic=config.kernels.deterministic, graphs=False)
    device = launch.device_of(where)
    launch.init(where, device, config.parallel.timeout)
    difference = on_rank(where.rank, where.size, config, device=device)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    return difference


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="YAML file of a run")
    parser.add_argument("--layout", required=True, help="e.g. tp=2 or tp=2,dp=2,sequence_parallel=false")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="cuda: started by a launcher, a GPU a rank"
    )
    parser.add_argument("--precision", choices=sorted(TOLERANCE), default="fp64")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    try:
        layout = parse_layout(args.layout)
        config = configs.load(args.config, [*args.overrides, f"train.precision={args.precision}", *layout])
        sizes = config.parallel
        world = sizes.tp * sizes.pp * (sizes.dp or 1)
        where = launch.world()
        if args.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: there is no CUDA device")
        if args.device == "cuda" and where.size != world:
            raise ValueError(f"--layout {args.layout} needs {world} ranks, {where.size} were started; use torchrun")
        found = launched(config, where) if args.device == "cuda" else run(config, world)
        if found is None:
            return 0
        difference = found
    except ValueError as error:
        print(f"parity: {error}", file=sys.stderr)
        return 2
    bound = TOLERANCE[args.precision]
    good = difference.initial_equal and difference.worst <= bound
    print(
        f"scheme {config.model.norm.scheme}, layout {args.layout} on {world} ranks, {args.precision}, tolerance {bound:g}"
    )
    print(f"initial weights   {'equal bit for bit' if difference.initial_equal else 'DIFFERENT'}")
    print(f"loss              {difference.loss:.2e}")
    print(f"gradient          {difference.grad:.2e}  {difference.grad_name}")
    print(f"clip norm         {difference.norm:.2e}")
    print(f"weights, {SGD_STEPS} steps  {difference.weight:.2e}  {difference.weight_name}")
    print("pass" if good else "FAIL")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
