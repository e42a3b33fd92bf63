"""The parity test bites: every deliberately broken build (mutations.py) turns it red, and the unbroken one is green."""

from dataclasses import replace
from typing import Any

import pytest

from tests.distributed import cases
from tests.distributed.mutations import MUTATIONS, compare_broken
from tests.marks import thinned
from tools import parity

RED = 1e-6  # four orders above the tolerance of float64

# mutation: the case that shows it. Keys as in cases.config, and options of the scheme.
REPLICAS = {"scheme": "preln", "tp": 1, "dp": 2, "sequence_parallel": None}
STAGES = {"scheme": "preln", "tp": 1, "pp": 2, "sequence_parallel": None}
HYBRID = {"scheme": "hybridnorm", "tp": 2, "sequence_parallel": True, "kv": 2}
EXPERTS = {**REPLICAS, "dp": 2, "ep": 2, "moe": "sigmoid"}
SHOWN_BY: dict[str, dict[str, Any]] = {
    "head gains of q not summed": HYBRID,
    "head gains of k not summed": {**HYBRID, "sequence_parallel": False},
    "head gains of v not summed": {**HYBRID, "kv": 1},
    "head gains of context not summed": {**HYBRID, "scheme": "hybridnorm_qkvc_post"},
    "table: head norms like stream norms": {**HYBRID, "sequence_parallel": False},
    "table: stream norms never summed": {"scheme": "preln"},
    "local statistics of inner": {"scheme": "normformer", "model": "gpt2", "kind": "layernorm"},
    "local statistics of q": {"scheme": "olmo2"},
    "local statistics of k": {"scheme": "olmo2"},
    "local statistics of context": {"scheme": "subln", "kind": "layernorm"},
    "statistics not summed in backward": {"scheme": "subln"},
    "replicated kv heads counted by each rank": {"scheme": "olmo2", "kv": 1},
    "bias on every rank": {"scheme": "preln", "model": "gpt2"},
    "head scale summed twice": {"scheme": "normformer+post_projection+resscale"},
    "head scale not summed": {"scheme": "normformer+post_projection+resscale"},
    "head scale summed once too often": {"scheme": "normformer"},
    "kv weights not summed over replicas": {"scheme": "preln", "kv": 1},
    "kv biases not summed over replicas": {"scheme": "preln", "kv": 1, "model": "gpt2"},
    "kv gains not summed over replicas": {"scheme": "olmo2", "kv": 1},
    "stream gains not summed": {"scheme": "sandwich"},
    "final gain not summed": {"scheme": "preln"},
    "embedding gain not summed": {"scheme": "postln", "kind": "layernorm", "options": {"embedding_norm": True}},
    "stream gains summed without sequence parallelism": {"scheme": "preln", "sequence_parallel": False},
    "residual scales not summed": {"scheme": "resscale"},
    "mixing weights not summed": {"scheme": "mhc"},
    "positions not summed": {"scheme": "preln", "model": "gpt2"},
    "row biases not summed": {"scheme": "preln", "model": "gpt2"},
    "vocabulary padding in the loss": {"scheme": "preln"},
    "rows of other ranks not zeroed": {"scheme": "preln", "sequence_parallel": False},
    "head gradient sliced, not summed": {"scheme": "preln"},
    "clip norm counts replicas": {"scheme": "preln"},
    "mean of micro-batch means": {**REPLICAS},
    "clip norm of one range": {**REPLICAS},
    "buckets summed before the last backward": {**REPLICAS, "zero": 0},
    "updated weights not gathered": {**REPLICAS},
    "tied embedding not summed over the ends": {**STAGES, "model": "gpt2"},
    "a stage takes an old message": {**STAGES},
    "gradients of experts summed like all else": {**EXPERTS, "zero": 0},
    "gradients of experts not summed": {**EXPERTS, "ep": 1},
    "expert bias on every rank": {"scheme": "preln", "model": "gpt2", "moe": "sigmoid"},
    "router weights not summed": {"scheme": "preln", "moe": "sigmoid"},
    "gradients into experts not summed": {"scheme": "preln", "moe": "sigmoid", "sequence_parallel": False},
    "balance of own tokens": {"scheme": "preln", "moe": "dropless"},
    "loads of own tokens": EXPERTS,
    "rows not regrouped by expert": EXPERTS,
    "clip norm of own experts": {**EXPERTS, "zero": 0},
}
# the same mistake where it looks different
MORE: list[tuple[str, dict[str, Any]]] = [
    ("head scale summed once too often", {**SHOWN_BY["head scale not summed"], "sequence_parallel": False}),
    ("residual scales not summed", {"scheme": "layerscale"}),
    ("mixing weights not summed", {"scheme": "hyper_connections"}),
    ("residual scales not summed", {"scheme": "rezero"}),
    ("bias on every rank", {"scheme": "preln", "model": "gpt2", "sequence_parallel": False}),
    ("clip norm counts replicas", {"scheme": "preln", "kv": 1, "sequence_parallel": False}),
    ("local statistics of inner", {"scheme": "normformer", "moe": "dropless"}),
]
EVERY = [*SHOWN_BY.items(), *MORE]
MEASURED: dict[str, parity.Difference] = {}  # one unbroken run serves all mutations of its case


def measure(ranks: Any, case: dict[str, Any], mutation: str | None) -> parity.Difference:
    case = {"tp": 2, "sequence_parallel": True, **case}
    options = case.pop("options", None)
    config = cases.config(**case)
    if options is not None:
        config = replace(config, model=replace(config.model, norm=replace(config.model.norm, options=options)))
    key = repr((config, mutation))
    if key not in MEASURED:
        MEASURED[key] = ranks(case["tp"] * case.get("dp", 1) * case.get("pp", 1)).run(
            compare_broken, config, mutation, 2
        )[0]
    return MEASURED[key]


def test_every_mutation_is_shown() -> None:
    assert set(SHOWN_BY) == set(MUTATIONS)


@pytest.mark.parametrize(("mutation", "case"), thinned(EVERY, 6), ids=[f"{m} ({c['scheme']})" for m, c in EVERY])
def test_parity_sees_a_broken_build(ranks: Any, mutation: str, case: dict[str, Any]) -> None:
    broken = measure(ranks, case, mutation)
    assert broken.worst > RED, broken
    whole = measure(ranks, case, None)
    assert whole.initial_equal and whole.worst <= parity.TOLERANCE["fp64"], whole


@pytest.mark.full
@pytest.mark.parametrize(("mutation", "case"), EVERY, ids=[f"{m} ({c['scheme']})" for m, c in EVERY])
def test_parity_sees_it_on_four_ranks(ranks: Any, mutation: str, case: dict[str, Any]) -> None:
    layout = {"tp": 2} if {"dp", "pp"} & set(case) else {"tp": 4}
    assert measure(ranks, {**case, **layout}, mutation).worst > RED


def test_the_clip_norm_alone_is_seen(ranks: Any) -> None:
    """A wrong clip norm leaves loss, gradients and plain SGD's weights right: only its own figure shows it."""
    found = measure(ranks, SHOWN_BY["clip norm counts replicas"], "clip norm counts replicas")
    assert found.norm > RED and max(found.loss, found.grad, found.weight) <= parity.TOLERANCE["fp64"]
