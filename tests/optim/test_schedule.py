"""Schedules against their closed forms, written out as the projects they come from define them."""

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megnorm.optim.config import OptimConfig
from megnorm.optim.schedule import learning_rate


def config_of(**fields: Any) -> OptimConfig:
    return OptimConfig(**{"lr": 1e-3, "warmup_steps": 10, **fields})


ALL = ("constant", "cosine", "wsd", "inverse_sqrt", "polynomial")


@pytest.mark.parametrize("name", ALL)
def test_warm_up_is_linear_and_reaches_the_rate_at_its_last_step(name: str) -> None:
    config = config_of(schedule=name, warmup_start_lr=1e-4)
    rates = [learning_rate(config, step, 100) for step in range(1, 11)]
    assert rates == pytest.approx([1e-4 + 9e-4 * step / 10 for step in range(1, 11)], rel=1e-12)
    assert rates[-1] == 1e-3


@pytest.mark.parametrize("name", ALL)
def test_without_warm_up_the_first_update_is_near_full_rate(name: str) -> None:
    assert learning_rate(config_of(schedule=name, warmup_steps=0), 1, 10_000) == pytest.approx(1e-3, rel=2e-4)


def test_inverse_sqrt_is_fairseqs() -> None:
    config = config_of(schedule="inverse_sqrt", lr=5e-4, warmup_steps=4000, warmup_start_lr=1e-7)
    factor = 5e-4 * 4000**0.5
    for updates in (1, 2000, 3999, 4000, 4001, 16000, 300_000):
        slope = (5e-4 - 1e-7) / 4000
        expected = 1e-7 + updates * slope if updates < 4000 else factor * updates**-0.5
        assert learning_rate(config, updates, 10) == pytest.approx(expected, rel=1e-12)
    assert learning_rate(config, 16_000, 10) == pytest.approx(2.5e-4)
    assert learning_rate(replace(config, min_lr=1e-4), 10**6, 10) == 1e-4


@pytest.mark.parametrize("power", [1.0, 2.0, 0.5])
def test_polynomial_is_fairseqs(power: float) -> None:
    config = config_of(schedule="polynomial", min_lr=1e-5, power=power)
    for updates in (1, 9, 10, 11, 55, 99, 100, 120):
        if updates <= 10:
            expected = updates / 10 * 1e-3
        elif updates >= 100:
            expected = 1e-5
        else:
            expected = (1e-3 - 1e-5) * (1 - (updates - 10) / (100 - 10)) ** power + 1e-5
        assert learning_rate(config, updates, 100) == pytest.approx(expected, rel=1e-12)


def test_cosine_half_way_at_the_end_and_beyond() -> None:
    config = config_of(min_lr=1e-4)
    assert learning_rate(config, 10, 110) == 1e-3
    assert learning_rate(config, 60, 110) == pytest.approx(5.5e-4)
    assert learning_rate(config, 35, 110) == pytest.approx(1e-4 + 9e-4 * (1 + math.sqrt(0.5)) / 2)
    assert learning_rate(config, 110, 110) == pytest.approx(1e-4)
    assert learning_rate(config, 500, 110) == pytest.approx(1e-4)
    short = replace(config, decay_steps=50)
    assert learning_rate(short, 30, 110) == pytest.approx(5.5e-4)
    assert learning_rate(short, 50, 110) == learning_rate(short, 110, 110) == pytest.approx(1e-4)
    # A run may stop before its schedule does.
    assert learning_rate(replace(config, decay_steps=110), 60, 60) == pytest.approx(5.5e-4)


@pytest.mark.parametrize(("shape", "middle"), [("linear", 0.75), ("1-sqrt", 0.5), ("cosine", 0.5 + math.sqrt(0.125))])
def test_wsd_is_stable_and_then_falls_in_its_shape(shape: str, middle: float) -> None:
    config = config_of(schedule="wsd", decay_steps=20, decay_shape=shape, min_lr=1e-4)
    assert {learning_rate(config, step, 100) for step in range(10, 81)} == {1e-3}
    assert learning_rate(config, 81, 100) < 1e-3
    assert learning_rate(config, 85, 100) == pytest.approx(1e-4 + 9e-4 * middle)
    assert learning_rate(config, 100, 100) == pytest.approx(1e-4)


def test_wsd_decays_for_a_tenth_unless_told() -> None:
    config = config_of(schedule="wsd")
    assert learning_rate(config, 90, 100) == 1e-3
    assert learning_rate(config, 95, 100) == pytest.approx(5e-4)


@given(
    name=st.sampled_from(ALL),
    shape=st.sampled_from(["linear", "1-sqrt", "cosine"]),
    warmup=st.integers(0, 30),
    total=st.integers(60, 300),
    floor=st.floats(0, 1e-3),
)
def test_rises_to_the_rate_then_never_rises_again(name: str, shape: str, warmup: int, total: int, floor: float) -> None:
    config = config_of(schedule=name, decay_shape=shape, warmup_steps=warmup, min_lr=floor)
    rates = [learning_rate(config, step, total) for step in range(1, total + 20)]
    rise, fall = rates[:warmup], rates[max(warmup - 1, 0) :]
    assert rise == sorted(rise)
    assert all(b <= a * (1 + 1e-12) for a, b in zip(fall, fall[1:], strict=False))
    assert min(fall) >= floor * (1 - 1e-12) and max(rates) <= 1e-3


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"schedule": "cosin"}, "optim.schedule"),
        ({"decay_shape": "sqrt"}, "optim.decay_shape"),
        ({"min_lr": 2e-3}, "optim.min_lr"),
        ({"warmup_steps": -1}, "optim.warmup_steps"),
        ({"warmup_steps": 101}, "optim.warmup_steps"),
        ({"decay_steps": 9}, "optim.decay_steps"),
        ({"schedule": "wsd", "decay_steps": 91}, "optim.decay_steps"),
    ],
)
def test_a_schedule_that_does_not_fit_is_refused(change: dict[str, object], field: str) -> None:
    with pytest.raises(ValueError, match=field):
        learning_rate(config_of(**change), 1, 100)
