"""Layers to pipeline stages, balanced by cost: the head weighs as much as several layers, the embedding nearly nothing."""

import operator
from collections.abc import Callable, Sequence
from itertools import accumulate

Ranges = tuple[tuple[int, int], ...]  # [first, last) layers of each stage


def unit_costs(layers: int, block: int, attention: int, sequence: int, head: int) -> tuple[int, ...]:
    """Training FLOPs a token of embedding, each layer, and head, with the whole square of attention scores.

    block: weights in the matrices of a layer. attention: width of all heads. head: width x vocabulary. The embedding is a
    lookup, and norms are small beside a layer.
    """
    return (0, *(6 * block + 12 * sequence * attention,) * layers, 6 * head)


def stage_costs(costs: Sequence[float], ranges: Ranges) -> tuple[float, ...]:
    """The cost of each stage. costs: of embedding, layers and head; the first stage embeds, the last holds the head."""
    sums = [sum(costs[1 + first : 1 + last]) for first, last in ranges]
    sums[0] += costs[0]
    sums[-1] += costs[-1]
    return tuple(sums)


def split(costs: Sequence[float], stages: int) -> Ranges:
    """The layers of each stage, at least one, such that the dearest stage costs least.

    costs: of embedding, layers and head, not negative. Of several such splits the most even one is taken (least sum of
    squares), and of those the one whose earlier stages are smaller: they hold the activations of more micro-batches.
    Raises ValueError for fewer layers than stages.
    """
    layers = len(costs) - 2
    if not 1 <= stages <= layers:
        raise ValueError(f"{layers} layers do not fill {stages} stages; use 1 to {layers} stages")
    total = list(accumulate(costs[1:-1], initial=0))

    def cost(first: int, last: int) -> float:
        return total[last] - total[first] + (first == 0) * costs[0] + (last == layers) * costs[-1]

    limit = _least(layers, stages, cost, max)[stages][0] * (1 + 1e-9)

    def squared(first: int, last: int) -> float:
        one = cost(first, last)
        return one * one if one <= limit else float("inf")

    least = _least(layers, stages, squared, operator.add)
    ranges, first = [], 0
    for left in range(stages, 1, -1):
        goal = least[left][first] * (1 + 1e-9)
        ends = range(first + 1, layers - left + 2)
        last = next(end for end in ends if squared(first, end) + least[left - 1][end] <= goal)
        ranges.append((first, last))
        first = last
    return (*ranges, (first, layers))


def _least(
    layers: int, stages: int, cost: Callable[[int, int], float], join: Callable[[float, float], float]
) -> list[list[float]]:
    """[k][i]: the least joined cost of layers i.. in k stages; infinite where they are too few."""
    least = [[float("inf")] * (layers + 1), [cost(i, layers) for i in range(layers)] + [float("inf")]]
    for k in range(2, stages + 1):
        row = [float("inf")] * (layers + 1)
        for i in range(layers - k + 1):
            for j in range(i + 1, layers - k + 2):
                one = cost(i, j)
                if one >= row[i]:  # more layers only cost more
                    break
                row[i] = min(row[i], join(one, least[k - 1][j]))
        least.append(row)
    return least
