"""Measured standard deviations of initial weights, by role, against the papers' rules, for every scheme."""

from collections.abc import Callable, Mapping
from math import log, sqrt

import pytest

from megnorm.models.causal import build_model
from megnorm.models.config import InitConfig, ModelConfig
from megnorm.norms import registry
from megnorm.norms.config import NormConfig
from megnorm.parallel.layout import named_matrices

L, D, F, KV = 3, 128, 320, 64
FANS = {"q": (D, D), "k": (D, KV), "v": (D, KV), "o": (D, D), "up": (D, F), "gate": (D, F), "down": (F, D)}
Rule = Callable[[str], float]


def xavier(role: str) -> float:
    return sqrt(2 / sum(FANS[role]))


def gained(base: Rule, gain: float, roles: str) -> Rule:
    return lambda role: base(role) * (gain if role in roles.split() else 1.0)


def plain(role: str) -> float:
    return 0.02


RULES: Mapping[str, Rule] = {
    "deepnorm": gained(xavier, (8 * L) ** -0.25, "v o up gate down"),
    "deepnorm_llama": gained(xavier, (8 * L) ** -0.25, "v o up gate down"),
    "subln": gained(xavier, sqrt(log(2 * L)), "v o up gate down"),
    "b2t": gained(plain, L**-0.5, " ".join(FANS)),
    "nonorm": gained(plain, (2 * L) ** -0.5, "o down"),
}


def measured(cfg: ModelConfig) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for named in named_matrices(build_model(cfg)):
        found.setdefault(named.matrix.role, []).append(float(named.view().double().square().mean().sqrt()))
    return found


def config(norm: NormConfig, **init: bool) -> ModelConfig:
    sizes = {"layers": L, "width": D, "heads": 4, "kv_heads": 2, "ffn": F, "vocab_size": 200}
    return ModelConfig(**sizes, norm=norm, init=InitConfig(**init))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", registry.names())
def test_initial_standard_deviations(name: str) -> None:
    found = measured(config(NormConfig(name)))
    rule = RULES.get(name, plain)
    for role in FANS:
        for std in found[role]:  # 8192 numbers at least: 2.5% is three standard errors of a standard deviation
            assert std == pytest.approx(rule(role), rel=0.025), role
    for role in ("embed", "head"):
        assert found[role] == [pytest.approx(0.02, rel=0.03)], "embeddings and the head are the user's"


def test_gate_without_gain_and_depth_scaled() -> None:
    gate = measured(config(NormConfig("deepnorm", {"scale_gate": False})))
    assert gate["gate"][0] == pytest.approx(xavier("gate"), rel=0.025)
    scaled = measured(config(NormConfig("preln"), depth_scaled=True))
    assert scaled["down"][-1] == pytest.approx(0.02 / sqrt(2 * L), rel=0.025)
    assert scaled["up"][-1] == pytest.approx(0.02, rel=0.025)
