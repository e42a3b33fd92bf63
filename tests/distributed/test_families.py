"""The parallel run is the serial run for encoders and encoder-decoders too: stages of two kinds, and whatever they share."""

from typing import Any

import pytest

from tests.distributed import cases
from tests.distributed.test_parity import SMALL, check, named

SCHEMES = ("preln", "postln", "deepnorm", "normformer", "hybridnorm_star")
INTERLEAVED = {"schedule": "interleaved", "virtual_stages": 2}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tp": 2},
    "pp2": {"pp": 2},
    "tp2 pp2": {"tp": 2, "pp": 2},
    "dp2": {"dp": 2, **SMALL},
    "pp4": {"pp": 4},
    "pp2 dp2 interleaved": {"pp": 2, "dp": 2, **INTERLEAVED, **SMALL},
    "tp2 pp2 interleaved": {"tp": 2, "pp": 2, **INTERLEAVED},
}
PLAIN = ("tp2", "pp2", "tp2 pp2", "dp2")  # every scheme of both families in these is in the full set
RECOMPUTE = ("", "block", "attention+norms+activations+projections")


def case(scheme: str, model: str, layout: str, turn: int) -> dict[str, Any]:
    """The rest in turn: recompute, sequence parallelism, kv heads, norm kinds."""
    rest = {
        "recompute": RECOMPUTE[turn % 3],
        "sp": turn % 2 == 0,
        "kv": (2, 1, 4)[turn // 2 % 3],
        "kind": ("layernorm", "rmsnorm")[turn // 3 % 2],
    }
    return {"scheme": scheme, "model": model, "layout": layout, **rest, **LAYOUTS[layout]}


# Every scheme in every layout for both families, whose models take turns.
MASKED, ENCDEC = ("bert", "roberta"), ("nmt", "t5", "bart")
EVERY = [
    case(scheme, models[(i + k) % len(models)], layout, i + j + k)
    for i, scheme in enumerate(SCHEMES)
    for j, models in enumerate((MASKED, ENCDEC))
    for k, layout in enumerate(LAYOUTS)
]
# Every scheme and every model in stages of two ranks in the fast set, and in more stages in the full one.
FAST = [
    case(SCHEMES[i % 5], model, layout, i + j)
    for i, model in enumerate(cases.FAMILIES)
    for j, layout in enumerate(("tp2 pp2 interleaved", "pp4" if i % 2 else "pp2 dp2 interleaved"))
]


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.full] if n % 5 else [], id=named(case)) for n, case in enumerate(FAST)],
)
def test_stages_and_what_they_share(ranks: Any, case: dict[str, Any]) -> None:
    check(ranks, case, "fp64", 2)


# What their layers and stages have beside the five: a second stream, cross-attention's share of a gate, factors that grow.
BESIDE = [
    case("resi_dual", "nmt", "tp2 pp2 interleaved", 0),
    case("resi_dual", "t5", "pp4", 3),
    case("siamese", "bert", "tp2 pp2", 1),
    case("siamese_hybrid", "bart", "tp2 pp2", 2),
    case("mhc", "nmt", "tp2 pp2 interleaved", 1),
    case("mhc", "bert", "tp2 pp2", 2),
    case("hyper_connections", "t5", "pp4", 2),
    case("hyper_connections", "bart", "tp2 pp2", 1),
    case("gpas", "nmt", "tp2", 4),
    case("prores", "t5", "tp2 pp2", 5),
]


@pytest.mark.parametrize("case", [pytest.param(case, marks=pytest.mark.full, id=named(case)) for case in BESIDE])
def test_what_schemes_have_beside(ranks: Any, case: dict[str, Any]) -> None:
    check(ranks, case, "fp64", 3)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            case, marks=pytest.mark.full if case["layout"] in PLAIN else pytest.mark.exhaustive, id=named(case)
        )
        for case in EVERY
    ],
)
def test_every_layout(ranks: Any, case: dict[str, Any]) -> None:
    check(ranks, case, "fp64", 3)
