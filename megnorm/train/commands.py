"""The verbs ``plan`` (what would run) and ``doctor`` (what is installed and what serves which operation)."""

import argparse
import importlib.util
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from megnorm import config as configs
from megnorm.hf import custom
from megnorm.hf.families.registry import choose
from megnorm.kernels import backends, check, libraries, registry
from megnorm.models.count import active_parameters
from megnorm.parallel.schedule import simulate
from megnorm.parallel.schedule_text import draw
from megnorm.plan import Plan, make_plan
from megnorm.train import dryrun
from megnorm.train.build import DTYPES

OPTIONAL = {
    "transformers": "export, generation (megnorm[hf])",
    "lm_eval": "tasks in megnorm eval (megnorm[eval])",
    "tensorboard": "TensorBoard (megnorm[tensorboard])",
    "wandb": "Weights & Biases (megnorm[wandb])",
    "mpi4py": "ranks from mpirun (megnorm[mpi])",
    "zstandard": ".zst input (megnorm[data])",
    "fsspec": "token files in object stores (megnorm[remote])",
}


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "What a config would run on a number of ranks; starts nothing."
    parser.add_argument("--config", type=Path, help="YAML file")
    parser.add_argument("--ranks", type=int, default=1, help="number of ranks (default 1)")
    parser.add_argument("--memory", action="store_true", help="count weights, gradients and optimizer state by rank")
    parser.add_argument("overrides", nargs="*", metavar="key=value")


def run_plan(args: argparse.Namespace) -> int:
    plan = make_plan(configs.load(args.config, args.overrides), args.ranks)
    print(describe(plan))
    if args.memory:
        print("\n".join(dryrun.table(plan)))
    return 0


def describe(plan: Plan) -> str:
    """The plan as text: layout, parameters by role, stages of a pipeline."""
    m, config = plan.config.model, plan.config
    t, ramp = config.train, config.train.batch_ramp
    climb = (
        f", batches from {ramp.start} by {ramp.increment} over the first {ramp.samples} samples" if ramp.start else ""
    )
    stacks = f"{m.source_layers} encoder and {m.layers} decoder layers" if m.source_layers else f"{m.layers} layers"
    lines = [
        f"scheme          {plan.resolved.scheme}, {m.norm.kind}",
        f"model           {stacks}, width {m.width}, {m.heads} heads ({m.kv} kv) of {m.hd}",
        f"feed-forward    {m.ffn} {m.activation}",
        *describe_experts(plan),
        f"vocabulary      {m.vocab_size}, stored as {plan.padded_vocab}; head {'tied' if m.tied_head else 'untied'}",
        f"parameters      {plan.parameters:,}",
        *(f"  {role:<14}{count:,}" for role, count in sorted(plan.parameters_by_role.items(), key=lambda x: -x[1])),
        f"ranks           {plan.world}: tp {config.parallel.tp} x pp {config.parallel.pp} x dp {plan.dp}"
        + (f" of which {config.parallel.ep} share the experts" if config.parallel.ep > 1 else "")
        + (", sequence parallel" if plan.sequence_parallel else ""),
        f"step            {config.train.global_batch} sequences of {plan.tokens_per_sample}: {plan.tokens_per_step:,} "
        f"tokens in {plan.micro_batches} micro-batches a rank, {config.train.precision}",
        f"run             {t.steps} steps, {t.consumed_after(t.steps) * plan.tokens_per_sample:,} tokens{climb}",
        f"folder          {config.train.out}",
        f"Hugging Face    {native_target(plan)}",
    ]
    if config.parallel.pp > 1:
        lines += describe_pipeline(plan)
    return "\n".join([*lines, *(f"warning         {warning}" for warning in plan.warnings)])


def describe_experts(plan: Plan) -> list[str]:
    """Sparse layers and what of the parameters a token meets; nothing for a dense model."""
    m = plan.config.model
    if not m.moe.experts:
        return []
    shared = f" and one of {m.moe.shared_ffn} for all" if m.moe.shared_ffn else ""
    return [
        f"experts         {m.moe.experts} of {m.expert_ffn} in {m.sparse_layers} layers, a token takes {m.moe.top_k}{shared}; "
        f"{active_parameters(m, plan.resolved):,} parameters are active"
    ]


def describe_pipeline(plan: Plan) -> list[str]:
    """Stages with their layers and share of the work, the bubble with these stages and with equal ones, a picture."""
    schedule, costs = plan.schedule, plan.stage_costs
    timeline, even = simulate(schedule, forward=costs, backward=[2 * cost for cost in costs]), simulate(schedule)
    lines = [
        f"schedule        {schedule.name}, bubble {timeline.bubble:.1%} ({even.bubble:.1%} were all stages alike)",
        f"activations     held at most, in micro-batches of a stage, by rank: {' '.join(map(str, timeline.peak))}",
    ]
    for stage, (first, last) in enumerate(plan.stages):
        layers = f"layer {first}" if last == first + 1 else f"layers {first} to {last - 1}"
        more = ["embedding"] * (stage == 0) + ["final norm", "head"] * (stage == schedule.stages - 1)
        held = ", ".join([layers, *more])
        lines.append(
            f"  stage {stage:<8}rank {schedule.placement[stage]}: {held}; {costs[stage] / sum(costs):.1%} of FLOPs"
        )
    return [*lines, *draw(timeline).splitlines()]


def native_target(plan: Plan) -> str:
    """The class that ``megnorm convert --to hf`` would choose."""
    model = plan.config.model
    if custom.problem(model) is not None:
        return "none; megnorm convert says why"
    family, _ = choose(model, plan.resolved)
    return family.architecture if family else f"{custom.architecture(model.family)} (code travels with the model)"


def add_doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "What this machine has, which optional packages are missing, which kernel serves what."
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16", help="of activations (default bf16)")


def run_doctor(args: argparse.Namespace) -> int:
    print(f"python {platform.python_version()}, torch {torch.__version__}, {torch.get_num_threads()} CPU threads")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            print(f"cuda:{i} {torch.cuda.get_device_name(i)}")
    else:
        print("no CUDA device: everything runs on the CPU, ranks talk over gloo")
    for package, use in OPTIONAL.items():
        print(f"{package:<14} {_version(package):<12} {use}")
    print("\n".join(["", *describe_kernels(args.dtype)]))
    return 0


def describe_kernels(dtype: str) -> list[str]:
    """The libraries of kernels, and for every operation what would serve it in ``dtype`` on this machine, and why not."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lines = ["kernels from"]
    for library in libraries.known():
        lines.append(f"  {library.name:<34} {library.version():<12} {library.missing() or 'serves'}")
    lines.append(f"operations, {dtype} on {device} (an example of each; a run asks for its own sizes)")
    for op, meaning in registry.OPS.items():
        need = check.typical(op, device, DTYPES[dtype])
        served = registry.choose(need, {})
        lines.append(f"  {op:<14} {served.backend:<19} {meaning}")
        for offer in registry.offers(op):
            reason = offer.reason(need)
            if offer is not served:
                lines.append(f"  {'':<14}   {offer.backend:<17} {reason or 'if kernels.prefer asks for it'}")
    lines.append(f"the reference of every operation is {backends.REFERENCE}")
    return lines


def _version(package: str) -> str:
    if importlib.util.find_spec(package) is None:
        return "missing"
    try:
        return version(package)
    except PackageNotFoundError:
        return "present"
