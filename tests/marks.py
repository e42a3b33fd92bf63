"""Which of a test's many cases the fast set takes; the full set takes all."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def thinned(cases: Iterable[Any], keep: int | Callable[[Any], bool]) -> list[Any]:
    """The cases of ``parametrize``, all but each ``keep``-th (or those that ``keep`` names) marked full. Tuples are spread."""
    found = []
    for i, case in enumerate(cases):
        stays = keep(case) if callable(keep) else i % keep == 0
        values = case if isinstance(case, tuple) else (case,)
        found.append(pytest.param(*values, marks=() if stays else pytest.mark.full))
    return found
