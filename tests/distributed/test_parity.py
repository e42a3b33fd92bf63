"""The parallel run is the serial run: loss, every gradient, clip norm and weights, for every registered scheme."""

import itertools
from typing import Any
from unittest import mock

import pytest

from megnorm.config import RunConfig
from megnorm.parallel import messages
from megnorm.plan import make_plan
from megnorm.refuse import PlanError
from tests.distributed import cases
from tests.marks import thinned
from tools import parity

# Tensor parallelism alone, in the fast set: every scheme once, every pair of these.
FACTORS = {
    "tp": (2, 4),
    "sp": (True, False),
    "kv": (1, 2, 4),
    "kind": ("layernorm", "rmsnorm"),
    "model": tuple(cases.MODELS),
    "recompute": ("", "block", "attention+norms+activations"),
}
TENSOR = cases.pairwise(FACTORS)
FAST = [{"scheme": scheme, **TENSOR[i % len(TENSOR)]} for i, scheme in enumerate(cases.schemes())]

# The full set: every scheme in every one of these. Buckets are of a few kilobytes, so that there are several.
SMALL = {"bucket_mb": 0.01}
INTERLEAVED = {"schedule": "interleaved", "virtual_stages": 2}
LAYOUTS: dict[str, dict[str, Any]] = {
    # of tp, sequence parallelism and kv heads every pair
    "tp2 sp kv1": {"tp": 2, "sp": True, "kv": 1},
    "tp2 kv2": {"tp": 2, "sp": False, "kv": 2},
    "tp2 sp kv4": {"tp": 2, "sp": True, "kv": 4},
    "tp4 kv1": {"tp": 4, "sp": False, "kv": 1},
    "tp4 sp kv2": {"tp": 4, "sp": True, "kv": 2},
    "tp4 kv4": {"tp": 4, "sp": False, "kv": 4},
    "dp4": {"dp": 4, **SMALL},
    "dp2 plain": {"dp": 2, "zero": 0, **SMALL},
    "pp2": {"pp": 2},
    "pp2 gpipe": {"pp": 2, "schedule": "gpipe"},
    "pp2 interleaved": {"pp": 2, **INTERLEAVED},
    "pp4": {"pp": 4},
    "pp2 dp2 interleaved": {"pp": 2, "dp": 2, **INTERLEAVED, **SMALL},
    "pp2 dp2 plain": {"pp": 2, "dp": 2, "zero": 0, **SMALL},
    "tp2 dp2": {"tp": 2, "dp": 2, **SMALL},
    "tp2 pp2 gpipe": {"tp": 2, "pp": 2, "schedule": "gpipe"},
    "tp2 pp2 interleaved": {"tp": 2, "pp": 2, **INTERLEAVED},
    "tp2 pp2 dp2": {"tp": 2, "pp": 2, "dp": 2, **SMALL},
}
OTHERS: dict[str, tuple[Any, ...]] = {
    "recompute": ("", "block", "attention+norms+activations"),
    "model": tuple(cases.MODELS),
    "kv": (1, 2, 4),
    "sp": (True, False),
    "kind": ("layernorm", "rmsnorm"),
}


def row(layout: str, turn: int) -> dict[str, Any]:
    """The others' values for a layout, in three turns: it meets each value, and over the layouts they meet each other."""
    j = list(LAYOUTS).index(layout)
    shifts = {"recompute": 0, "model": j, "kv": j // 3, "sp": j, "kind": j // 2}
    chosen = {name: values[(turn + shifts[name]) % len(values)] for name, values in OTHERS.items()}
    return {"layout": layout, **chosen, **LAYOUTS[layout]}


EVERY = [
    {"scheme": scheme, **row(layout, (i + j) % 3)}
    for i, scheme in enumerate(cases.schemes())
    for j, layout in enumerate(LAYOUTS)
]
# The fast set: those of up to four ranks that are not tensor parallelism alone, with schemes in turn.
QUICK = [name for name, sizes in LAYOUTS.items() if set(sizes) & {"pp", "dp"} and name != "tp2 pp2 dp2"]
TURNS = [
    {"scheme": cases.schemes()[7 * i % len(cases.schemes())], **row(layout, turn)}
    for i, (layout, turn) in enumerate(itertools.product(QUICK, range(3)))
]


def check(ranks: Any, case: dict[str, Any], precision: str, steps: int) -> None:
    case = {key: value for key, value in case.items() if key != "layout"}
    config = cases.config(sequence_parallel=case.pop("sp"), precision=precision, **case)
    world = case.get("tp", 1) * case.get("pp", 1) * case.get("dp", 1)
    difference = ranks(world).run(parity.on_rank, config, steps, timeout=600.0)[0]
    assert difference.initial_equal
    assert difference.worst <= parity.TOLERANCE[precision], difference


def named(case: dict[str, Any]) -> str:
    quiet = LAYOUTS.get(case.get("layout", ""), {})
    return "-".join(str(value) for key, value in case.items() if value != "" and key not in quiet).replace(" ", "_")


@pytest.mark.parametrize("case", FAST, ids=named)
def test_tensor_parallel_is_serial(ranks: Any, case: dict[str, Any]) -> None:
    check(ranks, case, "fp64", 1)


@pytest.mark.parametrize("case", TURNS, ids=named)
def test_stages_and_replicas_are_serial(ranks: Any, case: dict[str, Any]) -> None:
    check(ranks, case, "fp64", 2)


@pytest.mark.full
@pytest.mark.parametrize("case", EVERY, ids=named)
def test_every_scheme_in_every_layout(ranks: Any, case: dict[str, Any]) -> None:
    # Weights after ten steps in three of a scheme's layouts, after two in the others: there are many of them.
    turn = cases.schemes().index(case["scheme"]) + list(LAYOUTS).index(case["layout"])
    check(ranks, case, "fp64", 2 if turn % 6 else parity.SGD_STEPS)


def test_the_choice_covers_what_it_says() -> None:
    """Every scheme meets every value of every factor; every two values of two factors meet, and in the fast set too."""
    both = [("schedule", name) for name in ("gpipe", "interleaved", None)] + [("zero", 0), ("zero", None), ("dp", 4)]
    for scheme in cases.schemes():
        mine = [case for case in EVERY if case["scheme"] == scheme]
        assert [case["layout"] for case in mine] == list(LAYOUTS)
        for name, values in OTHERS.items():
            assert {case[name] for case in mine} == set(values)
        assert all(any(case.get(key) == value for case in mine) for key, value in both)
    for chosen, layouts in ((EVERY, LAYOUTS), (TURNS, QUICK)):
        for (a, x), (b, y) in itertools.combinations(OTHERS.items(), 2):
            met = {(case[a], case[b]) for case in chosen}
            assert met == set(itertools.product(x, y)), (a, b)
        for name, values in OTHERS.items():
            free = {layout for layout in layouts if name not in LAYOUTS[layout]}
            assert {(c["layout"], c[name]) for c in chosen} >= set(itertools.product(free, values)), name


def on_torchs_collectives(rank: int, world: int, config: RunConfig) -> parity.Difference | None:
    with mock.patch.object(messages, "serve", lambda x: False):
        return parity.on_rank(rank, world, config, 3)


@pytest.mark.parametrize("sizes", ({"tp": 2, "dp": 2, **SMALL}, {"pp": 2, "dp": 2, "zero": 0, **SMALL}), ids=str)
def test_torchs_collectives_serve_as_well(ranks: Any, sizes: dict[str, Any]) -> None:
    """What a GPU runs: torch's collectives where the CPU has messages."""
    config = cases.config("normformer", model="gpt2", precision="fp64", **sizes)
    difference = ranks(4).run(on_torchs_collectives, config)[0]
    assert difference.initial_equal
    assert difference.worst <= parity.TOLERANCE["fp64"], difference


@pytest.mark.full
@pytest.mark.parametrize("scheme", cases.schemes())
def test_single_precision(ranks: Any, scheme: str) -> None:
    check(ranks, {"scheme": scheme, "tp": 2, "sp": True, "kv": 2, "kind": "rmsnorm", "model": "llama"}, "fp32", 10)


@pytest.mark.parametrize("kind", thinned(("l2", "scalenorm", "dyt", "derf", "seednorm"), "seednorm".__eq__))
@pytest.mark.parametrize("tp", (2, pytest.param(4, marks=pytest.mark.full)))
def test_other_norm_kinds(ranks: Any, kind: str, tp: int) -> None:
    """Every site of a norm at once: normformer has the inner one, olmo2 full-width q and k, hybridnorm those per head."""
    for scheme in ("normformer", "olmo2", "hybridnorm"):
        check(ranks, {"scheme": scheme, "tp": tp, "sp": True, "kv": 1, "kind": kind, "model": "llama"}, "fp64", 2)


QUICK_FEATURES = (("windows", "tp2 sp kv1"), ("windows", "pp2"), ("alibi", "tp2 sp kv1"))
FEATURES = [
    pytest.param(model, layout, marks=() if (model, layout) in QUICK_FEATURES else pytest.mark.full)
    for model in cases.FEATURED
    for layout in ("tp2 sp kv1", "tp4 sp kv2", "pp2", "tp2 pp2 gpipe")
]


@pytest.mark.parametrize(("model", "layout"), FEATURES)
def test_features_of_attention_are_serial(ranks: Any, model: str, layout: str) -> None:
    """kv 1 on two ranks is multi-query attention; head h has the same slope, and layer l the same window, everywhere."""
    case = {"sp": True, "kv": 4, "kind": "rmsnorm", "recompute": "attention", **LAYOUTS[layout]}
    check(ranks, {"scheme": "hybridnorm", "model": model, **case}, "fp64", 2)


def test_gathered_inputs_may_be_kept(ranks: Any) -> None:
    case = {"scheme": "normformer", "tp": 2, "sp": True, "kv": 2, "kind": "layernorm", "model": "gpt2",
            "keep_gathered": True}  # fmt: skip
    check(ranks, case, "fp64", 2)


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(PlanError, match=r"kv_heads=3 neither divides parallel.tp=2.*use tp of \[1, 3, 6\]"):
        config = cases.config("preln", kv=3, tp=2)
        import dataclasses

        model = dataclasses.replace(config.model, heads=6, head_dim=8)
        make_plan(dataclasses.replace(config, model=model), 2)
    with pytest.raises(PlanError, match=r"tp=8.*use tp of \[1, 2, 4\]"):
        make_plan(cases.config("preln", tp=8), 8)
    with pytest.raises(PlanError, match="does not divide the 3 ranks"):
        make_plan(cases.config("preln", tp=2), 3)
