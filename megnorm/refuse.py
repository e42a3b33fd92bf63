"""What a config contradicts by itself, on any number of ranks: each refusal is one sentence that says what to change.

No torch.
"""

import difflib
from collections.abc import Iterator
from typing import Any

from megnorm.config import RunConfig
from megnorm.data.config import MULTIPLE
from megnorm.models import check, family
from megnorm.models.config import ModelConfig
from megnorm.norms.resolve import Resolved, moves
from megnorm.norms.scheme import ROLES
from megnorm.optim import schedule

# The least value of a key by section; None (a default that is derived) passes.
LEAST: dict[str, dict[str, int]] = {
    "model": {"segments": 0, "relative_buckets": 4}
    | dict.fromkeys(("layers", "width", "heads", "kv_heads", "head_dim", "ffn", "vocab_size", "max_positions"), 1)
    | dict.fromkeys(("encoder_layers", "max_source_positions", "relative_distance"), 1),
    "model.moe": {"experts": 0, "top_k": 1, "ffn": 1, "shared_ffn": 0, "first": 0, "every": 1}
    | dict.fromkeys(("balance_loss", "z_loss", "bias_rate"), 0),
    "model.init": dict.fromkeys(("std", "embedding_std", "position_std", "head_std"), 0),
    "model.norm": {"eps": 0},
    "parallel": dict.fromkeys(("tp", "pp", "dp", "ep", "virtual_stages", "vocab_multiple"), 1),
    "optim": dict.fromkeys(("lr", "min_lr", "warmup_start_lr", "eps", "weight_decay", "clip"), 0)
    | dict.fromkeys(("loss_scale", "loss_scale_window"), 1),
    "train": dict.fromkeys(
        ("steps", "sequence_length", "global_batch", "micro_batch", "log_every", "threads", "stop_after"), 1
    )
    | {"eval_every": 0, "eval_batches": 0, "check_replicas_every": 0, "recompute_blocks": 1},
}
POSITIVE = ("model.rope_theta", "model.logit_scale", "parallel.timeout", "parallel.bucket_mb", "optim.power")


class PlanError(ValueError):
    """A layout or size that cannot be; the message names the keys and the numbers that would do."""


def check_config(config: RunConfig) -> None:
    """Raises PlanError for the first thing that cannot be."""
    check_model(config.model)
    for section in ("parallel", "optim", "train"):
        _check_ranges(config, section)
    _check_optim(config)
    _check_recompute(config)
    _check_guard(config)
    _check_kernels(config)
    schedule.check(config.optim, config.train.steps)
    if config.data.task not in family.TASKS[config.model.family]:
        raise PlanError(
            f"data.task={config.data.task} is nothing that model.family={config.model.family} can be trained for; use "
            f"{' or '.join(family.TASKS[config.model.family])}"
        )
    if config.train.eval_units and config.model.family != "causal":
        raise PlanError(
            f"train.eval_units reads samples as text, as model.family={config.model.family} does not; leave it out"
        )
    if config.model.padding_id is not None and (config.data.separate_documents or config.data.reset_positions):
        raise PlanError(
            "model.padding_id counts positions of real tokens itself and cannot be joined with data.separate_documents or "
            "data.reset_positions, which count them by document; set model.padding_id=null for packed data"
        )
    if config.model.positions == "alibi" and config.data.reset_positions and not config.data.separate_documents:
        raise PlanError(
            "data.reset_positions does not reset the distances of model.positions=alibi; set data.separate_documents=true, or "
            "drop it"
        )


def _check_kernels(config: RunConfig) -> None:
    """FP8 where it means something, and graphs of what is the same from step to step."""
    k, t = config.kernels, config.train
    _check_graphs(config)
    if k.fp8 is None:
        return
    if t.precision not in ("bf16", "fp16"):
        raise PlanError(f"kernels.fp8={k.fp8} quantizes bf16, but train.precision={t.precision}; use bf16")
    if min(k.fp8_spare) < 0 or sum(k.fp8_spare) >= config.model.layers:
        raise PlanError(f"kernels.fp8_spare={k.fp8_spare} leaves none of model.layers={config.model.layers} to FP8")
    if config.model.family == "encdec":
        known = f"batches of model.family=encdec are padded to multiples of {MULTIPLE}"
        raise PlanError(f"kernels.fp8={k.fp8} multiplies multiples of 16 tokens, and {known}; set kernels.fp8=null")


def _check_graphs(config: RunConfig) -> None:
    """A graph is a fixed row of kernels on fixed memory, with one place for what a block's backward pass needs."""
    m, t, d, p = config.model, config.train, config.data, config.parallel
    reasons = {
        f"model.family={m.family}": m.family != "causal" and "its batches differ in shape",
        "model.moe.experts": m.moe.experts and "the host counts the rows of experts",
        "model.dropout or attention_dropout": (m.dropout or m.attention_dropout) and "the host draws their masks anew",
        "data.separate_documents": d.separate_documents and "lengths of documents change",
        "data.reset_positions": d.reset_positions and "positions change",
        "train.recompute": t.recompute and "the host finds what is computed again",
        f"parallel.pp={p.pp} and schedule={p.schedule}": (p.pp > 1 or p.schedule == "gpipe") and "it needs several",
        f"kernels.fp8={config.kernels.fp8}": config.kernels.fp8 and "the host keeps its scales",
    }
    for key, why in reasons.items():
        if config.kernels.graphs and why:
            raise PlanError(f"kernels.graphs cannot be joined with {key}: {why}; set kernels.graphs=false or change it")


def check_moving(config: RunConfig, resolved: Resolved) -> None:
    """A factor that grows with the step is a number that a captured or compiled layer would keep."""
    for name in ("graphs", "compile"):
        if getattr(config.kernels, name) and moves(resolved):
            raise PlanError(
                f"kernels.{name} keeps the numbers of a layer, and model.norm.scheme={resolved.scheme} has factors that change "
                f"with the step; set kernels.{name}=false, or take another scheme"
            )


def check_model(m: ModelConfig) -> None:
    """Sizes that contradict each other."""
    _check_ranges(RunConfig(model=m), "model")
    refuse(check.model_problem(m))


def check_scheme(m: ModelConfig, resolved: Resolved) -> None:
    """Combinations of scheme and model that mean nothing."""
    refuse(check.scheme_problem(m, resolved))


def refuse(problem: str | None) -> None:
    """Raises PlanError with that sentence, if there is one."""
    if problem is not None:
        raise PlanError(problem)


def _check_ranges(config: RunConfig, top: str) -> None:
    """Numbers below what they can be, in a section and those below it. ``not >=`` refuses NaN too."""
    for section, keys in LEAST.items():
        if section.split(".")[0] == top:
            for key, least in keys.items():
                value = _value(config, f"{section}.{key}")
                if value is not None and not value >= least:
                    raise PlanError(f"{section}.{key} is {value}; it must be at least {least}")
    for path in POSITIVE:
        value = _value(config, path)
        if path.split(".")[0] == top and not value > 0:
            raise PlanError(f"{path} is {value}; it must be above 0")


def _value(config: RunConfig, path: str) -> Any:
    found: Any = config
    for name in path.split("."):
        found = getattr(found, name)
    return found


def _check_optim(config: RunConfig) -> None:
    optim, t = config.optim, config.train
    for beta in optim.betas:
        if not 0.0 <= beta < 1.0:
            raise PlanError(f"optim.betas: {beta} must be in [0, 1)")
    roles = (*ROLES, "norm", "bias", "scale")
    for name, factors in (("decay", optim.decay), ("rate", optim.rate)):
        for role, factor in factors.items():
            if role not in roles:
                close = difflib.get_close_matches(role, roles, n=1)
                hint = f"did you mean '{close[0]}'?" if close else f"roles are {', '.join(roles)}"
                raise PlanError(f"optim.{name}.{role}: no parameter has this role; {hint}")
            if not factor >= 0.0:
                raise PlanError(f"optim.{name}.{role} is {factor}; a factor is not negative")
    if t.eval_every and not t.eval_batches:
        raise PlanError("train.eval_every asks for evaluation, but train.eval_batches is 0; set one of them otherwise")


def _check_recompute(config: RunConfig) -> None:
    t, layers = config.train, max(config.model.layers, config.model.source_layers)
    others = [mode for mode in t.recompute if mode != "block"]
    if "block" in t.recompute and others:
        raise PlanError(
            f"train.recompute: 'block' computes the whole block again, {others[0]} included; use ['block'] alone, or drop it"
        )
    if t.recompute_blocks is not None and not t.recompute:
        raise PlanError(
            f"train.recompute_blocks={t.recompute_blocks}, but train.recompute is empty; say there what is recomputed"
        )
    if t.recompute_blocks is not None and t.recompute_blocks > layers:
        raise PlanError(
            f"train.recompute_blocks={t.recompute_blocks} is more than model.layers={layers}; leave it out for all blocks"
        )


def recompute_warnings(config: RunConfig, sequence_parallel: bool) -> Iterator[str]:
    if sequence_parallel and config.parallel.keep_gathered and "norms" in config.train.recompute:
        yield (
            "parallel.keep_gathered keeps what linear layers gather, so train.recompute 'norms' frees no memory before "
            "them; set parallel.keep_gathered=false"
        )


def _check_guard(config: RunConfig) -> None:
    """Going back needs something to go back to, and samples to go on with."""
    guard = config.train.guard
    if guard.rewinds and not config.checkpoint.every:
        raise PlanError("train.guard: a rewind needs checkpoints; set checkpoint.every, or use stop or skip")
    if guard.rewinds and guard.rewind_data == "skip" and config.data.order == "megatron":
        raise PlanError(
            "train.guard.rewind_data=skip leaves samples out, but data.order=megatron counts out as many as train.steps "
            "needs; use rewind_data=repeat, or data.order=default"
        )
