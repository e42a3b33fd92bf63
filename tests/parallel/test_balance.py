"""The split against all possible splits."""

from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megnorm.parallel.balance import Ranges, split, stage_costs, unit_costs

COSTS = st.lists(st.integers(1, 20), min_size=1, max_size=9)


def all_splits(layers: int, stages: int) -> list[Ranges]:
    return [tuple(pairwise((0, *cuts, layers))) for cuts in combinations(range(1, layers), stages - 1)]


@settings(max_examples=500)
@given(COSTS, st.integers(0, 30), st.integers(0, 60), st.data())
def test_the_dearest_stage_costs_least_and_ties_are_even_then_small_at_first(
    blocks: list[int], embedding: int, head: int, data: st.DataObject
) -> None:
    costs = [embedding, *blocks, head]
    stages = data.draw(st.integers(1, len(blocks)))

    def merit(ranges: Ranges) -> tuple[int | float, ...]:
        by_stage = stage_costs(costs, ranges)
        return max(by_stage), sum(cost**2 for cost in by_stage), *(last for _, last in ranges)

    assert split(costs, stages) == min(all_splits(len(blocks), stages), key=merit)


def test_the_head_counts_as_layers_and_the_embedding_as_none() -> None:
    assert split([0, *[2] * 8, 4], 2) == ((0, 5), (5, 8))
    assert split([0, *[2] * 10, 4], 4) == ((0, 3), (3, 6), (6, 9), (9, 10))
    assert split([0, *[1.5] * 3, 900.0], 3) == ((0, 1), (1, 2), (2, 3))
    assert stage_costs([7, 1, 2, 3, 9], ((0, 2), (2, 3))) == (10, 12)


def test_a_remainder_goes_to_the_later_stages() -> None:
    """They hold the activations of fewer micro-batches."""
    assert [last - first for first, last in split([0, *[1] * 10, 0], 4)] == [2, 2, 3, 3]


def test_a_deep_model_is_split_evenly() -> None:
    assert split([0, *[3] * 200, 0], 8) == tuple((25 * i, 25 * i + 25) for i in range(8))


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="3 layers do not fill 4 stages; use 1 to 3 stages"):
        split([0, 1, 1, 1, 0], 4)


def test_costs_of_units() -> None:
    assert unit_costs(layers=2, block=100, attention=8, sequence=16, head=50) == (0, 2136, 2136, 300)
