"""Look before launch: what a config means on a number of ranks, checked, without torch and without starting anything."""

from dataclasses import dataclass
from itertools import accumulate

from megnorm.config import RunConfig
from megnorm.data.config import MULTIPLE
from megnorm.models import check, family
from megnorm.models.count import count_parameters, padded_vocabulary
from megnorm.norms.resolve import Resolved, scheme_of
from megnorm.norms.scheme import warnings_for
from megnorm.parallel import balance
from megnorm.parallel.divisors import divisors, near
from megnorm.parallel.schedule import Schedule, check_sizes, make_schedule
from megnorm.refuse import PlanError, check_config, check_moving, check_scheme, recompute_warnings, refuse


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
    check_config(config)
    dp = _check_layout(config, world)
    parallel = config.parallel
    sequence_parallel = parallel.tp > 1 and parallel.sequence_parallel is not False
    _check_lengths(config, sequence_parallel)
    micro_batches = _check_batch(config, dp)
    _check_ramp(config, dp)
    stages = _stages(config, world // parallel.tp)
    resolved = resolved or family.resolve_model(config.model)
    check_scheme(config.model, resolved)
    check_moving(config, resolved)
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
            *recompute_warnings(config, sequence_parallel),
        ),
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
    refuse(check.expert_problem(m, tp=tp, ep=parallel.ep, dp=dp, pp=pp))
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
    return family.unit_costs(config.model, config.train.sequence_length, predicted(config))


def predicted(config: RunConfig) -> float:
    """The share of tokens that the head reads: of a masked model the masked ones."""
    return config.data.mask.probability if config.model.family == "masked" else 1.0


def _check_ramp(config: RunConfig, dp: int) -> None:
    """Every batch of a ramp must be one that the layout can take."""
    t, parallel = config.train, config.parallel
    unit, what = dp * t.micro_batch, f"dp={dp} x train.micro_batch={t.micro_batch}"
    if parallel.schedule == "interleaved":
        unit, what = unit * parallel.pp, f"{what} x parallel.pp={parallel.pp} (parallel.schedule=interleaved)"
    problem = t.batch_ramp.problem(t.global_batch, unit, what)
    if problem is not None:
        raise PlanError(problem)
