"""A timeline as a text picture: a row a rank, time to the right."""

from math import floor

from megnorm.parallel.schedule import Action, Timeline

MARKS = {"F": "0123456789", "B": "abcdefghij", "W": "ABCDEFGHIJ"}
WORDS = {"F": "0-9 forward", "B": "a-j backward", "W": "A-J gradients of weights"}


def draw(timeline: Timeline, columns: int = 100) -> str:
    """Rows of ranks and a legend; a mark is the last digit of the micro-batch, a dot is idle time.

    A column is the shortest action; what lies right of ``columns`` is cut, and said to be.
    """
    spans = [timeline.finish[action] - timeline.start[action] for action in timeline.finish]
    unit = min((span for span in spans if span > 0), default=1.0)
    width = _column(timeline.end, unit)
    rows = []
    for rank, actions in enumerate(timeline.schedule.actions):
        cells = ["."] * width
        for action in actions:
            first, last = _column(timeline.start[action], unit), _column(timeline.finish[action], unit)
            cells[first:last] = _mark(action) * (last - first)
        shown = "".join(cells[:columns]) + (" ..." if width > columns else "")
        rows.append(f"rank {rank:<3}{shown}")
    kinds = [words for kind, words in WORDS.items() if any(action.kind == kind for action in timeline.finish)]
    cut = f"; {columns} of {width} columns" if width > columns else ""
    return "\n".join([*rows, f"        {', '.join(kinds)} of the micro-batch with that last digit, . idle{cut}"])


def _mark(action: Action) -> str:
    return MARKS[action.kind][action.micro_batch % 10]


def _column(time: float, unit: float) -> int:
    """The nearest column, halves up: neighbours neither overlap nor part, and no action of a unit or more vanishes."""
    return floor(time / unit + 0.5 + 1e-9)
