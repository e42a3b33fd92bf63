"""Sizes that would divide, for messages about those that do not."""


def divisors(n: int) -> list[int]:
    return [i for i in range(1, n + 1) if n % i == 0]


def near(n: int, wish: int) -> str:
    """The divisors of n next to ``wish``."""
    below = [i for i in divisors(n) if i <= wish]
    above = [i for i in divisors(n) if i > wish]
    return " or ".join(str(i) for i in (*below[-1:], *above[:1]))
