"""The verb ``train``: config, plan, build, resume, fit."""

import argparse
import logging
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megnorm import config as configs
from megnorm.checkpoint import io
from megnorm.checkpoint.saver import Saver
from megnorm.kernels import registry
from megnorm.metrics.sinks import Sinks
from megnorm.models.config import ModelConfig
from megnorm.norms.resolve import Resolved, from_json
from megnorm.parallel import launch, nccl
from megnorm.parallel.pages import keep_pages
from megnorm.plan import Plan, make_plan
from megnorm.refuse import PlanError
from megnorm.train import profile, state
from megnorm.train.agree import gathered
from megnorm.train.build import Run, build
from megnorm.train.guard import DivergedError
from megnorm.train.hang import Identity
from megnorm.train.loop import fit
from megnorm.train.memory import MemoryEndedError, remedied
from megnorm.train.signals import EXIT_STOPPED
from megnorm.train.text_units import TextUnits
from megnorm.train.watchdog import Watchdog

log = logging.getLogger("megnorm")
MAY_CHANGE = ("dropout", "attention_dropout", "label_smoothing", "init")  # of ModelConfig, when a run goes on


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Train as a config says; continues from the newest checkpoint in train.out by itself."
    parser.add_argument("--config", type=Path, help="YAML file")
    parser.add_argument("--fresh", action="store_true", help="refuse to continue: train.out must hold no checkpoint")
    parser.add_argument("--help-config", action="store_true", help="list every key and its default, then leave")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. model.layers=24 optim.lr=1e-3")


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("megnorm train")
    add_train_arguments(parser)
    return run_train(parser.parse_args(argv))


def run_train(args: argparse.Namespace) -> int:
    """Exit code of a training run: 0 done, EXIT_STOPPED (75) saved and left early, 2 refused, 1 failed."""
    if args.help_config:
        print(_describe())
        return 0
    where = launch.world()
    logging.basicConfig(
        level=logging.INFO if where.rank == 0 else logging.WARNING, format="%(message)s", stream=sys.stderr
    )
    try:
        return _train(args, where)
    except (ValueError, DivergedError, MemoryEndedError) as error:
        if not _is_ours(error):
            print(f"megnorm train: rank {where.rank} failed:", file=sys.stderr)
            traceback.print_exc()
            return 1
        # One sentence, not a trace: the message is written for the person who can mend it. What every rank finds alike
        # rank 0 says; the others leave after it, because launchers kill the rest when the first rank has gone.
        if where.rank == 0 or not isinstance(error, PlanError | configs.ConfigError):
            who = f"rank {where.rank}: " if where.size > 1 else ""
            print(f"megnorm train: {who}{error}", file=sys.stderr, flush=True)
        else:
            time.sleep(1.0)
        return 1 if isinstance(error, DivergedError | MemoryEndedError) else 2
    except Exception:
        print(f"megnorm train: rank {where.rank} failed:", file=sys.stderr)
        traceback.print_exc()
        return 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _train(args: argparse.Namespace, where: launch.World) -> int:
    config = configs.load(args.config, args.overrides)
    make_plan(config, where.size)
    with remedied(config.train):
        return _run(args, config, where)


def _run(args: argparse.Namespace, config: configs.RunConfig, where: launch.World) -> int:
    launch.set_threads(where, config.train.threads)
    torch.manual_seed(config.train.seed)
    kernels = config.kernels
    nccl.prepare(tp=config.parallel.tp, deterministic=kernels.deterministic, graphs=kernels.graphs)
    device = launch.device_of(where)
    if config.kernels.deterministic and device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS refuses to be deterministic without
        torch.use_deterministic_algorithms(True)
    if device.type == "cpu":
        keep_pages()
    profile.prepare(config.train, device)
    launch.init(where, device, config.parallel.timeout)
    folder = Path(config.train.out) / "checkpoints"
    found = launch.from_rank_zero(lambda: io.latest(folder) if folder.is_dir() else None)
    if found is not None and args.fresh:
        raise ValueError(f"{found} exists and --fresh was given; choose another train.out or remove the run")
    resolved = None if found is None else _continued(io.read_meta(found), config, found)
    run = build(make_plan(config, where.size, resolved), device)
    if config.train.eval_units:
        run.evaluators.append(TextUnits(config.data.tokenizer))
    if found is not None:
        found = state.resume(run, folder)
    elif config.checkpoint.init_from is not None:
        state.start_from(run, Path(config.checkpoint.init_from))
    if where.rank == 0:
        _announce(run.plan, run, found)
    if run.step >= config.train.steps:
        log.info("all %d steps are done; raise train.steps to go on", config.train.steps)
        return 0
    code = _fit(run, where)
    if code == EXIT_STOPPED and launch.restarts_failures(where):
        log.info("stopped and saved; exit code 0, because torchrun would restart after any other")
        return 0
    return code


def _is_ours(error: BaseException) -> bool:
    """Whether megnorm raised it, with a sentence for the user, or something that it called."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return frame is not None and str(frame.tb_frame.f_globals.get("__name__", "")).startswith("megnorm")


def _fit(run: Run, where: launch.World) -> int:
    config = run.plan.config
    out = Path(config.train.out)
    total, resume = config.train.steps, run.step
    plain = configs.to_dict(config)
    with (
        Saver(config.checkpoint, out / "checkpoints", where.rank, where.size, run.barrier) as saver,
        Sinks(config.metrics, out, total, resume_step=resume, rank=where.rank, run_config=plain) as sinks,
        profile.Profile(config.train, where.rank) as profiler,
        _watchdog(run, where) as watchdog,
    ):
        if where.rank == 0:
            configs.save(config, out / "config.yaml")
        saver.prepare(state.shards(run, owned=True))
        return fit(run, saver, sinks, watchdog, profiler)


def _watchdog(run: Run, where: launch.World) -> Watchdog:
    config = run.plan.config
    wanted = config.train.watchdog.timeout > 0.0
    store, keeper = launch.own_store(where, config.parallel.timeout) if wanted else (None, None)
    people = [Identity(**one) for one in gathered(vars(Identity.mine(where.rank)), run.mesh)]
    folder = Path(config.train.out) / "crash"
    return Watchdog(
        config.train.watchdog, rank=where.rank, people=people, store=store, keeper=keeper,
        patience=config.parallel.timeout, folder=folder,
    )  # fmt: skip


def _continued(record: dict[str, Any], config: configs.RunConfig, found: Path | None) -> Resolved:
    """The scheme of the run that goes on, in the numbers it began with. Raises PlanError if the model is another."""
    name = record["config"]["optim"].get("name", "adamw")
    if name != config.optim.name:
        raise PlanError(
            f"optim.name is {config.optim.name}, but {found} holds the state of {name}; keep it, or begin a new train.out "
            "with checkpoint.init_from"
        )
    now = configs.to_dict(config)["model"]
    before = configs.to_dict(configs.RunConfig())["model"] | record["config"]["model"]  # of before an option was there
    for model in (before, now):  # where a plug-in lies is no part of the model: its numbers are in the checkpoint
        model["norm"] = {**model["norm"], "plugins": []}
    for key in ModelConfig.__dataclass_fields__:
        if key not in MAY_CHANGE and before[key] != now[key]:
            raise PlanError(
                f"model.{key} is {now[key]!r}, but {found} was trained with {before[key]!r}; "
                "keep it, or choose another train.out"
            )
    return from_json(record["resolved"])


def _announce(plan: Plan, run: Run, found: Path | None) -> None:
    m = plan.config.model
    log.info(
        "megnorm: %s, %d layers, %.1fM parameters, %s; %d rank(s): tp %d, dp %d; %d micro-batches a step, %s",
        plan.resolved.scheme,
        m.layers,
        plan.parameters / 1e6,
        plan.config.train.precision,
        plan.world,
        plan.config.parallel.tp,
        plan.dp,
        plan.micro_batches,
        _tokens_a_step(plan),
    )
    served = sorted({f"{choice.need.op}: {choice.backend}" for choice in registry.report()})
    log.info("kernels: %s", ", ".join(served))
    if run.mesh.device.type == "cuda":
        log.info("%s", "\n".join(f"  {line}" for line in registry.summary()))
    for warning in plan.warnings:
        log.warning("warning: %s", warning)
    if found is not None:
        log.info("continuing from %s: step %d, %d samples consumed", found, run.step, run.consumed)


def _tokens_a_step(plan: Plan) -> str:
    t = plan.config.train
    first = "" if t.batch_ramp.start is None else f"{t.batch_ramp.start * plan.tokens_per_sample} to "
    return f"{first}{plan.tokens_per_step} tokens a step"


def _describe() -> str:
    import yaml

    return yaml.safe_dump(configs.to_dict(configs.RunConfig()), sort_keys=False)
