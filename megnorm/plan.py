"""Look before launch: what a config means on a number of ranks, checked, without torch and without starting anything."""

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from megnorm.config import RunConfig
from megnorm.data.config import MULTIPLE
from megnorm.models import check, family
from megnorm.models.config import ModelConfig
from megnorm.models.count import count_parameters, padded_vocabulary
from megnorm.norms.resolve import Resolved, moves, scheme_of
from megnorm.norms.scheme import ROLES, warnings_for
from megnorm.optim import schedule
from megnorm.parallel import balance
from megnorm.parallel.divisors import divisors, near
from megnorm.parallel.schedule import Schedule, check_sizes, make_schedule

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


@dataclass(frozen=True)
class Plan:
    """A checked config on ``world`` ranks, with every derived number.

    padded_vocab: rows stored for the vocabulary. stages: [first, last) layers of each pipeline stage, over all ranks; the
    first stage embeds too, the last one holds the final norm and the head.
    """

    config: RunConfig
    world: int
    resolved: Resolved
    dp: int
    sequence_parallel: bool
    padded_vocab: int
    micro_batches: int
    stages: tuple[tuple[int, int], ...]
    parameters: int
    parameters_by_role: dict[str, int]
    warnings: tuple[str, ...]

    @property
    def tokens_per_sample(self) -> int:
        """Of a bucket of pairs: the most that its longer side may hold, padding included."""
        data = self.config.data
        return data.pairs.tokens_per_batch if data.task == "pairs" else self.config.train.sequence_length

    @property
    def tokens_per_step(self) -> int:
        return self.config.train.global_batch * self.tokens_per_sample

    @property
    def ties(self) -> dict[str, tuple[int, ...]]:
        """The pp ranks that share a parameter, by name."""
        return family.ties(self.config.model, self.stages, self.config.parallel.pp)

    @property
    def schedule(self) -> Schedule:
        """What the pipeline ranks run in one step."""
        parallel = self.config.parallel
        return make_schedule(parallel.schedule, parallel.pp, parallel.virtual_stages, self.micro_batches)

    @property
    def stage_costs(self) -> tuple[float, ...]:
        """Training FLOPs a token of each stage."""
        return balance.stage_costs(unit_costs(self.config), self.stages)


def make_plan(config: RunConfig, world: int, resolved: Resolved | None = None) -> Plan:
    """Check ``config`` on ``world`` ranks. resolved: of the checkpoint that a run continues; None: resolve now.

    Raises PlanError (or SchemeError) with one sentence; every rank comes to the same one.
    """
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
    dp = _check_layout(config, world)
    parallel = config.parallel
    sequence_parallel = parallel.tp > 1 and parallel.sequence_parallel is not False
    _check_lengths(config, sequence_parallel)
    micro_batches = _check_batch(config, dp)
    _check_ramp(config, dp)
    stages = _stages(config, world // parallel.tp)
    resolved = resolved or family.resolve_model(config.model)
    check_scheme(config.model, resolved)
    _check_moving(config, resolved)
    by_role = count_parameters(config.model, resolved)
    return Plan(
        config,
        world,
        resolved,
        dp,
        sequence_parallel,
        padded_vocabulary(config.model.vocab_size, parallel.vocab_multiple, parallel.tp),
        micro_batches,
        stages,
        sum(by_role.values()),
        by_role,
        (
            *warnings_for(scheme_of(config.model.norm), depth_scaled=config.model.init.depth_scaled),
            *_recompute_warnings(config, sequence_parallel),
        ),
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


def _check_moving(config: RunConfig, resolved: Resolved) -> None:
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
    _refuse(check.model_problem(m))


def check_scheme(m: ModelConfig, resolved: Resolved) -> None:
    """Combinations of scheme and model that mean nothing."""
    _refuse(check.scheme_problem(m, resolved))


def _refuse(problem: str | None) -> None:
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


def _recompute_warnings(config: RunConfig, sequence_parallel: bool) -> Iterator[str]:
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


def _check_layout(config: RunConfig, world: int) -> int:
    parallel, m = config.parallel, config.model
    tp, pp = parallel.tp, parallel.pp
    if world % tp:
        raise PlanError(f"parallel.tp={tp} does not divide the {world} ranks; use {near(world, tp)}")
    if world // tp % pp:
        raise PlanError(
            f"parallel.pp={pp} does not divide the {world // tp} ranks that parallel.tp={tp} leaves of {world}; use "
            f"{near(world // tp, pp)}"
        )
    dp = world // (tp * pp) if parallel.dp is None else parallel.dp
    if dp * tp * pp != world:
        raise PlanError(
            f"parallel.tp={tp} x pp={pp} x dp={dp} needs {tp * pp * dp} ranks, but {world} were started; use parallel.dp="
            f"{world // (tp * pp)}"
        )
    if m.heads % tp:
        raise PlanError(f"model.heads={m.heads} is not divisible by parallel.tp={tp}; use tp of {divisors(m.heads)}")
    if m.kv % tp and tp % m.kv:
        raise PlanError(
            f"model.kv_heads={m.kv} neither divides parallel.tp={tp} nor is divided by it; use tp of "
            f"{[n for n in divisors(m.heads) if m.kv % n == 0 or n % m.kv == 0]}"
        )
    if m.ffn % tp:
        raise PlanError(
            f"model.ffn={m.ffn} is not divisible by parallel.tp={tp}; use {near(m.ffn, tp)} or ffn={-(-m.ffn // tp) * tp}"
        )
    _refuse(check.expert_problem(m, tp=tp, ep=parallel.ep, dp=dp))
    return dp


def _check_lengths(config: RunConfig, sequence_parallel: bool) -> None:
    """What a batch of the task holds must fit the tables of positions, and split over tp."""
    t, m, tp = config.train, config.model, config.parallel.tp
    longest = [(t.sequence_length, "max_positions", m.max_positions)]
    if m.family == "encdec":
        source, target = config.data.longest_pair(t.sequence_length)
        longest = [(source, "max_source_positions", m.source_positions), (target, "max_positions", m.max_positions)]
    name = "data.pairs.longest" if config.data.task == "pairs" else "train.sequence_length"
    for length, key, rows in longest:
        if length > rows:
            padded = ", padded," if m.family == "encdec" else ""
            raise PlanError(
                f"{name}={length}{padded} is longer than model.{key}={rows}, the rows of the position table; shorten the one "
                "or enlarge the other"
            )
    if sequence_parallel and m.family == "encdec" and MULTIPLE % tp:
        raise PlanError(
            f"data.task={config.data.task} pads lengths to multiples of {MULTIPLE}, which parallel.tp={tp} does not divide; "
            f"use tp of {divisors(MULTIPLE)}, or set parallel.sequence_parallel=false"
        )
    if sequence_parallel and m.family != "encdec" and t.sequence_length % tp:
        fitting = t.sequence_length // tp * tp or tp
        raise PlanError(
            f"train.sequence_length={t.sequence_length} is not divisible by parallel.tp={tp}, which sequence parallelism "
            f"needs; use {fitting}, or set parallel.sequence_parallel=false"
        )


def _check_batch(config: RunConfig, dp: int) -> int:
    """The micro-batches of a step, on each rank."""
    t = config.train
    if config.data.task == "pairs" and t.micro_batch != 1:
        raise PlanError(
            f"train.micro_batch={t.micro_batch}, but a sample of data.task=pairs is a bucket of data.pairs.tokens_per_batch "
            "tokens, which is computed at a time; set it to 1"
        )
    per_step = dp * t.micro_batch
    if t.global_batch % per_step:
        totals = sorted({t.global_batch // per_step * per_step, -(-t.global_batch // per_step) * per_step} - {0})
        smaller = "" if t.global_batch % dp else f", or a micro_batch of {near(t.global_batch // dp, t.micro_batch)}"
        raise PlanError(
            f"train.global_batch={t.global_batch} is not a multiple of dp={dp} x train.micro_batch={t.micro_batch}; "
            f"use {' or '.join(map(str, totals))}{smaller}"
        )
    count, parallel = t.global_batch // per_step, config.parallel
    try:
        check_sizes(parallel.schedule, parallel.pp, parallel.virtual_stages, count, per_step)
    except ValueError as error:
        raise PlanError(str(error)) from None
    return count


def _stages(config: RunConfig, ranks: int) -> tuple[tuple[int, int], ...]:
    """The layers of each pipeline stage. ranks: those of one tensor-parallel rank, to be shared by pp and dp."""
    parallel, layers = config.parallel, config.model.layers + config.model.source_layers
    name = "model.encoder_layers + layers" if config.model.source_layers else "model.layers"
    count = parallel.pp * parallel.virtual_stages
    if count > layers:
        chunks, most = parallel.virtual_stages, layers // parallel.pp
        fitting = [n for n in divisors(ranks) if n * chunks <= layers and (n > 1 or chunks == 1)]
        ways = [f"parallel.pp of {fitting}"] if fitting else []
        ways += [f"parallel.virtual_stages of 2 to {most}"] if 1 < most < chunks else []
        raise PlanError(
            f"parallel.pp={parallel.pp} x virtual_stages={chunks} makes {count} stages of a layer or more, but "
            f"{name}={layers}; use {', or '.join([*ways, f'{name} of {count} or more'])}"
        )
    given = parallel.stage_layers
    if given is None:
        return balance.split(unit_costs(config), count)
    if len(given) != count or sum(given) != layers or min(given) < 1:
        even = [last - first for first, last in balance.split(unit_costs(config), count)]
        raise PlanError(
            f"parallel.stage_layers={list(given)} must be {count} numbers (parallel.pp x parallel.virtual_stages) of at least "
            f"1 that sum to {name}={layers}, as {even} do"
        )
    ends = list(accumulate(given))
    return tuple(zip([0, *ends], ends, strict=False))


def unit_costs(config: RunConfig) -> tuple[int, ...]:
    """Training FLOPs a token of embedding, each layer, and head."""
    return family.unit_costs(config.model, config.train.sequence_length)


def _check_ramp(config: RunConfig, dp: int) -> None:
    """Every batch of a ramp must be one that the layout can take."""
    t, parallel = config.train, config.parallel
    unit, what = dp * t.micro_batch, f"dp={dp} x train.micro_batch={t.micro_batch}"
    if parallel.schedule == "interleaved":
        unit, what = unit * parallel.pp, f"{what} x parallel.pp={parallel.pp} (parallel.schedule=interleaved)"
    problem = t.batch_ramp.problem(t.global_batch, unit, what)
    if problem is not None:
        raise PlanError(problem)
