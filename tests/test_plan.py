"""The plan's numbers are the built model's; stages of a pipeline and what is refused."""

from dataclasses import replace

import pytest

from megnorm import config as configs
from megnorm.metrics.throughput import flops_per_token
from megnorm.models.causal import build_model
from megnorm.models.config import ModelConfig
from megnorm.models.count import count_parameters
from megnorm.norms import registry
from megnorm.norms.config import NormConfig
from megnorm.norms.resolve import resolve
from megnorm.parallel.layout import named_matrices
from megnorm.parallel.schedule import check, make_schedule
from megnorm.plan import Plan, make_plan, predicted, unit_costs
from megnorm.refuse import PlanError
from megnorm.train.commands import describe

SIZES = ModelConfig(layers=2, width=16, heads=4, kv_heads=2, ffn=24, vocab_size=31, max_positions=8)
MODELS = {
    "rmsnorm": SIZES,
    "layernorm": replace(SIZES, positions="learned", bias=True, head_bias=True, tied_head=True, activation="gelu"),
    "derf": SIZES,
    "seednorm": SIZES,
}


@pytest.mark.parametrize("scheme", registry.names())
def test_parameters_by_role(scheme: str) -> None:
    for kind, sizes in MODELS.items():
        cfg = replace(sizes, norm=NormConfig(scheme, kind=kind))  # type: ignore[arg-type]
        counted: dict[str, int] = {}
        for named in named_matrices(build_model(cfg)):
            size = named.view().numel()
            counted[named.matrix.role] = counted.get(named.matrix.role, 0) + size
        assert count_parameters(cfg, resolve(cfg.norm, cfg.layers)) == counted


def plan_of(world: int, *overrides: str) -> Plan:
    return make_plan(configs.load(None, overrides), world)


def test_costs_of_units_sum_to_the_flops_that_throughput_counts() -> None:
    for sizes in MODELS.values():
        config = configs.RunConfig(model=sizes)
        assert sum(unit_costs(config)) == flops_per_token(sizes, config.train.sequence_length, predicted(config))


def test_the_head_of_a_masked_model_reads_masked_tokens_alone() -> None:
    head = {}
    for share in (0.15, 1.0):
        overrides = ["model.family=masked", "data.task=masked", f"data.mask.probability={share}"]
        head[share] = unit_costs(configs.load(None, overrides))[-1]
    assert head[0.15] == pytest.approx(0.15 * head[1.0], rel=1e-6)


def test_what_is_left_of_the_ranks_is_data_parallel() -> None:
    plan = plan_of(16, "parallel.tp=2", "parallel.pp=4")
    assert plan.dp == 2 and plan.micro_batches == 4
    assert plan.schedule == make_schedule("1f1b", 4, 1, 4)
    assert plan_of(2).stages == ((0, 12),)


def test_layers_are_balanced_with_the_head_or_as_the_user_says() -> None:
    plain = ("model.width=64", "model.heads=4", "model.ffn=128", "train.sequence_length=16", "model.layers=10")
    plan = plan_of(4, *plain, "parallel.pp=4", "model.vocab_size=50000")
    assert plan.stages == ((0, 3), (3, 6), (6, 9), (9, 10)) and len(plan.stage_costs) == 4
    assert plan.stage_costs[3] > plan.stage_costs[2] == plan.stage_costs[0]
    assert plan_of(4, *plain, "parallel.pp=4", "model.vocab_size=8").stages == ((0, 2), (2, 5), (5, 8), (8, 10))
    given = plan_of(4, *plain, "parallel.pp=4", "parallel.stage_layers=[1, 4, 4, 1]")
    assert given.stages == ((0, 1), (1, 5), (5, 9), (9, 10))
    chunks = plan_of(4, *plain, "parallel.pp=4", "parallel.schedule=interleaved", "parallel.virtual_stages=2")
    assert len(chunks.stages) == 8 and chunks.stages[0][0] == 0 and chunks.stages[-1][1] == 10
    check(chunks.schedule)


# ranks, overrides -> words of the refusal
REFUSED = {
    (8, "parallel.pp=3"): "parallel.pp=3 does not divide the 8 ranks that parallel.tp=1 leaves of 8; use 2 or 4",
    (12, "parallel.tp=2 parallel.pp=4"): "leaves of 12; use 3 or 6",
    (
        8,
        "parallel.pp=2 parallel.dp=2",
    ): "parallel.tp=1 x pp=2 x dp=2 needs 4 ranks, but 8 were started; use parallel.dp=4",
    (
        16,
        "parallel.pp=16",
    ): "16 stages of a layer or more, but model.layers=12; use parallel.pp of [1, 2, 4, 8], or model.l",
    (4, "parallel.pp=4 parallel.virtual_stages=4 parallel.schedule=interleaved"): (
        "use parallel.pp of [2], or parallel.virtual_stages of 2 to 3, or model.layers of 16 or more"
    ),
    (
        2,
        "parallel.pp=2 parallel.virtual_stages=7 parallel.schedule=interleaved",
    ): "use parallel.virtual_stages of 2 to 6, or",
    (
        2,
        "parallel.pp=2 parallel.virtual_stages=2",
    ): "parallel.schedule=1f1b; use parallel.virtual_stages=1, or parallel.sch",
    (
        2,
        "parallel.virtual_stages=2 parallel.schedule=interleaved",
    ): "parallel.virtual_stages=2 has no meaning with parallel.pp=1",
    (2, "parallel.pp=2 parallel.schedule=interleaved"): "needs several stages a rank, but parallel.virtual_stages is 1",
    (4, "parallel.pp=4 parallel.schedule=interleaved parallel.virtual_stages=2 train.micro_batch=32"): (
        "train.global_batch makes 2 micro-batches, but parallel.schedule=interleaved takes them in groups of parallel.pp=4; "
        "use 4 micro-batches (train.global_batch=128)"
    ),
    (2, "parallel.pp=2 parallel.stage_layers=[6,7]"): "parallel.stage_layers=[6, 7] must be 2 numbers",
    (2, "parallel.pp=2 parallel.stage_layers=[12]"): "that sum to model.layers=12, as [",
    (2, "parallel.pp=2 parallel.stage_layers=[12,0]"): "of at least 1",
    (2, "parallel.stage_layers=[]"): "must be 1 numbers",
    (1, "parallel.virtual_stages=0"): "parallel.virtual_stages is 0; it must be at least 1",
    (1, "parallel.bucket_mb=0"): "parallel.bucket_mb is 0",
}


@pytest.mark.parametrize(("world", "overrides"), REFUSED)
def test_a_pipeline_that_cannot_be_is_refused_with_numbers_that_would_do(world: int, overrides: str) -> None:
    with pytest.raises(PlanError) as error:
        plan_of(world, *overrides.split())
    assert REFUSED[world, overrides] in str(error.value)


def test_unknown_schedules_are_refused_by_the_config() -> None:
    with pytest.raises(configs.ConfigError, match="parallel.schedule"):
        plan_of(2, "parallel.schedule=zigzag")


def test_the_plan_prints_stages_and_a_picture() -> None:
    text = describe(plan_of(4, "parallel.pp=2", "model.layers=5", "parallel.stage_layers=[4,1]", "model.vocab_size=8"))
    assert "\nranks           4: tp 1 x pp 2 x dp 2\n" in text
    assert "\nschedule        1f1b, bubble " in text
    assert "by rank: 2 1" in text and "(20.0% were all stages alike)" in text
    assert "rank 0: layers 0 to 3, embedding; 80.0% of FLOPs" in text
    assert "rank 1: layer 4, final norm, head; 20.0% of FLOPs" in text
    picture = [line for line in text.splitlines() if line.startswith("rank ")]
    assert len(picture) == 2 and picture[0].startswith("rank 0  0000")
    assert "rank 0" not in describe(plan_of(1))
