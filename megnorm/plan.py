"""Look before launch: what a config means on a number of ranks, checked, without torch and without starting anything."""

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from megnorm.config import RunConfig
from megnorm.models.config import ModelConfig
from megnorm.models.count import count_parameters, padded_vocabulary
from megnorm.norms.resolve import Resolved, resolve, scheme_of
from megnorm.norms.scheme import ROLES, SubLayer, warnings_for
from megnorm.optim import schedule
from megnorm.parallel import balance
from megnorm.parallel.schedule import Schedule, check_sizes, make_schedule

# The least value of a key by section; None (a default that is derived) passes.
LEAST: dict[str, dict[str, int]] = {
    "model": dict.fromkeys(
        ("layers", "width", "heads", "kv_heads", "head_dim", "ffn", "vocab_size", "max_positions"), 1
    ),
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
TASKS = {"causal": ("causal",)}  # what each family of models can be trained for
POSITIVE = ("model.rope_theta", "parallel.timeout", "parallel.bucket_mb", "optim.power")


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
    def tokens_per_step(self) -> int:
        return self.config.train.global_batch * self.config.train.sequence_length

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
    schedule.check(config.optim, config.train.steps)
    if config.data.task not in TASKS[config.model.family]:
        raise PlanError(
            f"data.task={config.data.task} is nothing that model.family={config.model.family} can be trained for; use "
            f"{' or '.join(TASKS[config.model.family])}"
        )
    if config.model.padding_id is not None and (config.data.separate_documents or config.data.reset_positions):
        raise PlanError(
            "model.padding_id counts positions of real tokens itself and cannot be joined with data.separate_documents or "
            "data.reset_positions, which count them by document; set model.padding_id=null for packed data"
        )
    dp = _check_layout(config, world)
    parallel = config.parallel
    sequence_parallel = parallel.tp > 1 and parallel.sequence_parallel is not False
    micro_batches = _check_batch(config, dp, sequence_parallel)
    _check_ramp(config, dp)
    stages = _stages(config, world // parallel.tp)
    resolved = resolved or resolve(config.model.norm, config.model.layers)
    check_scheme(config.model, resolved)
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


def check_model(m: ModelConfig) -> None:
    """Sizes that contradict each other."""
    _check_ranges(RunConfig(model=m), "model")
    if m.head_dim is None and m.width % m.heads:
        raise PlanError(
            f"model.heads={m.heads} does not divide model.width={m.width}; set model.head_dim or use {_near(m.width, m.heads)}"
        )
    if m.heads % m.kv:
        raise PlanError(f"model.kv_heads={m.kv} does not divide model.heads={m.heads}; use {_near(m.heads, m.kv)}")
    if m.positions == "rotary" and m.hd % 2:
        raise PlanError(f"model.head_dim is {m.hd}; rotary positions need an even one")
    if m.padding_id is not None and not 0 <= m.padding_id < m.vocab_size:
        raise PlanError(f"model.padding_id={m.padding_id} is outside the vocabulary of {m.vocab_size}")
    for name in ("dropout", "attention_dropout"):
        if not 0.0 <= getattr(m, name) < 1.0:
            raise PlanError(f"model.{name}={getattr(m, name)} must be in [0, 1)")
    if m.moe.experts and not m.sparse_layers:
        raise PlanError(
            f"model.moe: none of the {m.layers} layers is sparse with first={m.moe.first} and every={m.moe.every}; lower one "
            "of them, or set model.moe.experts=0"
        )


def check_scheme(m: ModelConfig, resolved: Resolved) -> None:
    """Combinations of scheme and model that mean nothing."""
    if len(resolved.layers) != m.layers:
        raise PlanError(f"model.layers={m.layers}, but the checkpoint's scheme has {len(resolved.layers)} layers")
    for i, layer in enumerate(resolved.layers):
        if layer.attention.head_scale == "post_projection" and m.heads * m.hd != m.width:
            raise PlanError(
                f"head_scale=post_projection cuts the width in heads, but model.heads*head_dim={m.heads * m.hd} is not "
                f"model.width={m.width}; use pre_projection"
            )
        if m.parallel_block and not (_runs_beside(layer.attention) and _runs_beside(layer.ffn)):
            raise PlanError(
                f"model.parallel_block: layer {i} of scheme '{resolved.scheme}' has a post norm, scales the skip, or adds "
                "to something else than the stream, which has no meaning for branches that run side by side; use a "
                "pre-norm scheme"
            )


def _runs_beside(part: SubLayer) -> bool:
    """Whether a sub-layer only adds to the stream, as x + A(..) + F(..) needs."""
    residual = part.residual
    plain = residual.skip.learned is None and residual.skip.value == 1.0 and not residual.layer_input
    return plain and part.post is None and residual.source == "stream"


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
    t, layers = config.train, config.model.layers
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
        raise PlanError(f"parallel.tp={tp} does not divide the {world} ranks; use {_near(world, tp)}")
    if world // tp % pp:
        raise PlanError(
            f"parallel.pp={pp} does not divide the {world // tp} ranks that parallel.tp={tp} leaves of {world}; use "
            f"{_near(world // tp, pp)}"
        )
    dp = world // (tp * pp) if parallel.dp is None else parallel.dp
    if dp * tp * pp != world:
        raise PlanError(
            f"parallel.tp={tp} x pp={pp} x dp={dp} needs {tp * pp * dp} ranks, but {world} were started; use parallel.dp="
            f"{world // (tp * pp)}"
        )
    if m.heads % tp:
        raise PlanError(f"model.heads={m.heads} is not divisible by parallel.tp={tp}; use tp of {_divisors(m.heads)}")
    if m.kv % tp and tp % m.kv:
        raise PlanError(
            f"model.kv_heads={m.kv} neither divides parallel.tp={tp} nor is divided by it; use tp of "
            f"{[n for n in _divisors(m.heads) if m.kv % n == 0 or n % m.kv == 0]}"
        )
    if m.ffn % tp:
        raise PlanError(
            f"model.ffn={m.ffn} is not divisible by parallel.tp={tp}; use {_near(m.ffn, tp)} or ffn={-(-m.ffn // tp) * tp}"
        )
    _check_expert_layout(config, dp)
    return dp


def _check_expert_layout(config: RunConfig, dp: int) -> None:
    m, tp, ep = config.model, config.parallel.tp, config.parallel.ep
    if ep > 1 and not m.moe.experts:
        raise PlanError(f"parallel.ep={ep} shares experts, but model.moe.experts is 0; set one of them otherwise")
    if not m.moe.experts:
        return
    if dp % ep:
        raise PlanError(f"parallel.ep={ep} does not divide the {dp} data-parallel ranks; use {_near(dp, ep)}")
    if m.moe.experts % ep:
        raise PlanError(
            f"parallel.ep={ep} does not divide model.moe.experts={m.moe.experts}; use {_near(m.moe.experts, ep)}"
        )
    for key, width in (("ffn", m.expert_ffn), ("shared_ffn", m.moe.shared_ffn)):
        if width % tp:
            raise PlanError(
                f"model.moe.{key}: {width} is not divisible by parallel.tp={tp}; use {_near(width, tp)}, or "
                f"model.moe.{key}={-(-width // tp) * tp}"
            )


def _check_batch(config: RunConfig, dp: int, sequence_parallel: bool) -> int:
    """The micro-batches of a step, on each rank."""
    t, m = config.train, config.model
    if t.sequence_length > m.max_positions:
        raise PlanError(
            f"train.sequence_length={t.sequence_length} is longer than model.max_positions={m.max_positions}, the rows of "
            "the position table; shorten the one or enlarge the other"
        )
    tp = config.parallel.tp
    if sequence_parallel and t.sequence_length % tp:
        fitting = t.sequence_length // tp * tp or tp
        raise PlanError(
            f"train.sequence_length={t.sequence_length} is not divisible by parallel.tp={tp}, which sequence parallelism "
            f"needs; use {fitting}, or set parallel.sequence_parallel=false"
        )
    per_step = dp * t.micro_batch
    if t.global_batch % per_step:
        totals = sorted({t.global_batch // per_step * per_step, -(-t.global_batch // per_step) * per_step} - {0})
        smaller = "" if t.global_batch % dp else f", or a micro_batch of {_near(t.global_batch // dp, t.micro_batch)}"
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
    parallel, layers = config.parallel, config.model.layers
    count = parallel.pp * parallel.virtual_stages
    if count > layers:
        chunks, most = parallel.virtual_stages, layers // parallel.pp
        fitting = [n for n in _divisors(ranks) if n * chunks <= layers and (n > 1 or chunks == 1)]
        ways = [f"parallel.pp of {fitting}"] if fitting else []
        ways += [f"parallel.virtual_stages of 2 to {most}"] if 1 < most < chunks else []
        raise PlanError(
            f"parallel.pp={parallel.pp} x virtual_stages={chunks} makes {count} stages of a layer or more, but "
            f"model.layers={layers}; use {', or '.join([*ways, f'model.layers of {count} or more'])}"
        )
    given = parallel.stage_layers
    if given is None:
        return balance.split(unit_costs(config), count)
    if len(given) != count or sum(given) != layers or min(given) < 1:
        even = [last - first for first, last in balance.split(unit_costs(config), count)]
        raise PlanError(
            f"parallel.stage_layers={list(given)} must be {count} numbers (parallel.pp x parallel.virtual_stages) of at least "
            f"1 that sum to model.layers={layers}, as {even} do"
        )
    ends = list(accumulate(given))
    return tuple(zip([0, *ends], ends, strict=False))


def unit_costs(config: RunConfig) -> tuple[int, ...]:
    """Training FLOPs a token of embedding, each layer, and head; the projections of a layer and its FFN."""
    m, s = config.model, config.train.sequence_length
    attention, head = m.heads * m.hd, m.width * m.vocab_size
    projections = m.width * (2 * attention + 2 * m.kv * m.hd)
    layers = [balance.unit_costs(1, projections + m.ffn_weights(i), attention, s, head) for i in range(m.layers)]
    return (0, *(unit[1] for unit in layers), layers[0][2])


def _check_ramp(config: RunConfig, dp: int) -> None:
    """Every batch of a ramp must be one that the layout can take."""
    t, parallel = config.train, config.parallel
    unit, what = dp * t.micro_batch, f"dp={dp} x train.micro_batch={t.micro_batch}"
    if parallel.schedule == "interleaved":
        unit, what = unit * parallel.pp, f"{what} x parallel.pp={parallel.pp} (parallel.schedule=interleaved)"
    problem = t.batch_ramp.problem(t.global_batch, unit, what)
    if problem is not None:
        raise PlanError(problem)


def _divisors(n: int) -> list[int]:
    return [i for i in range(1, n + 1) if n % i == 0]


def _near(n: int, wish: int) -> str:
    """The divisors of n next to ``wish``."""
    below = [i for i in _divisors(n) if i <= wish]
    above = [i for i in _divisors(n) if i > wish]
    return " or ".join(str(i) for i in (*below[-1:], *above[:1]))
