"""The parallel run is the serial run: loss, every gradient, clip norm and weights, for every registered scheme."""

import itertools
from typing import Any

import pytest

from megnorm.plan import PlanError, make_plan
from tests.distributed import cases
from tools import parity

FACTORS = {
    "tp": (2, 4),
    "sp": (True, False),
    "kv": (1, 2, 4),
    "kind": ("layernorm", "rmsnorm"),
    "model": tuple(cases.MODELS),
    "recompute": ("", "block", "attention+norms+activations"),
}
LAYOUTS = cases.pairwise(FACTORS)
# Fast: every scheme once, every pair of the other factors. Full: every scheme in every layout.
FAST = [{"scheme": scheme, **LAYOUTS[i % len(LAYOUTS)]} for i, scheme in enumerate(cases.schemes())]
EVERY = [
    {"scheme": scheme, "tp": tp, "sp": sp, "kv": kv, "kind": kind, "model": model}
    for scheme, tp, sp, kv in itertools.product(cases.schemes(), FACTORS["tp"], FACTORS["sp"], FACTORS["kv"])
    for kind, model in ((("layernorm", "gpt2"), ("rmsnorm", "llama"))[kv % 2],)
]


def check(ranks: Any, case: dict[str, Any], precision: str, steps: int) -> None:
    config = cases.config(
        case["scheme"], kv=case["kv"], kind=case["kind"], model=case["model"], precision=precision,
        tp=case["tp"], sequence_parallel=case["sp"], keep_gathered=case.get("keep", False), recompute=case.get("recompute", ""),
    )  # fmt: skip
    difference = ranks(case["tp"]).run(parity.on_rank, config, steps)[0]
    assert difference.initial_equal
    assert difference.worst <= parity.TOLERANCE[precision], difference


@pytest.mark.parametrize("case", FAST, ids=lambda case: "-".join(str(value) for value in case.values() if value != ""))
def test_tensor_parallel_is_serial(ranks: Any, case: dict[str, Any]) -> None:
    check(ranks, case, "fp64", 2)


@pytest.mark.full
@pytest.mark.parametrize("case", EVERY, ids=lambda case: "-".join(str(value) for value in case.values()))
def test_every_scheme_in_every_layout(ranks: Any, case: dict[str, Any]) -> None:
    check(ranks, case, "fp64", parity.SGD_STEPS)


@pytest.mark.full
@pytest.mark.parametrize("scheme", cases.schemes())
def test_single_precision(ranks: Any, scheme: str) -> None:
    check(ranks, {"scheme": scheme, "tp": 2, "sp": True, "kv": 2, "kind": "rmsnorm", "model": "llama"}, "fp32", 10)


@pytest.mark.parametrize("kind", ("l2", "scalenorm", "dyt", "derf", "seednorm"))
@pytest.mark.parametrize("tp", (2, 4))
def test_other_norm_kinds(ranks: Any, kind: str, tp: int) -> None:
    """Every site of a norm at once: normformer has the inner one, olmo2 full-width q and k, hybridnorm those per head."""
    for scheme in ("normformer", "olmo2", "hybridnorm"):
        check(ranks, {"scheme": scheme, "tp": tp, "sp": True, "kv": 1, "kind": kind, "model": "llama"}, "fp64", 2)


def test_gathered_inputs_may_be_kept(ranks: Any) -> None:
    case = {"scheme": "normformer", "tp": 2, "sp": True, "kv": 2, "kind": "layernorm", "model": "gpt2", "keep": True}
    check(ranks, case, "fp64", 2)


@pytest.mark.parametrize("scheme", ("preln", "hybridnorm_star"))
def test_data_parallel_is_serial(ranks: Any, scheme: str) -> None:
    for layout in ({"dp": 2}, {"tp": 2, "dp": 2}):
        world = layout.get("tp", 1) * layout["dp"]
        difference = ranks(world).run(parity.on_rank, cases.config(scheme, **layout), 2)[0]
        assert difference.initial_equal and difference.worst <= 1e-10, difference


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
