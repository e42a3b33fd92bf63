"""Several runs side by side: a table and one figure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from megnorm.metrics.plots import COLORS, figure, fit_loss, label_x, smooth
from megnorm.metrics.record import Record

WINDOW = 20  # logged steps that a spike is judged against
SPIKE = 0.5  # nats above the window's median
LOST = 1.0  # nats above the best loss: a run that stays there to its end has diverged


@dataclass(frozen=True)
class Summary:
    """What became of a run. Losses in nats per token; final: mean of the last tenth of the record.

    spikes: excursions of the training loss by more than 0.5 nats above the median of the 20 logged steps before.
    diverged_at: the first logged step from which the training loss is not finite, or more than 1 nat above the best
    seen before it, to the end of the record.
    """

    name: str
    steps: int
    tokens: float | None
    final_loss: float
    valid_loss: float | None
    best_valid_loss: float | None
    spikes: int
    diverged_at: int | None


def summarize(record: Record) -> Summary:
    """Raises ValueError for a record without a training loss."""
    steps, loss = record.series("loss")
    if not loss:
        raise ValueError(f"{record.name}: no 'loss' was logged, there is nothing to compare")
    _, tokens = record.series("tokens")
    _, valid = record.series("valid_loss")
    finite = [value for value in valid if math.isfinite(value)]
    tail = loss[-max(len(loss) // 10, 1) :]
    return Summary(
        record.name,
        int(record.rows[-1]["step"]),
        tokens[-1] if tokens else None,
        sum(tail) / len(tail),
        valid[-1] if valid else None,
        min(finite) if finite else None,
        count_spikes(loss),
        diverged_at(steps, loss),
    )


def count_spikes(loss: Sequence[float]) -> int:
    """Excursions above the running median; steps of one excursion count once."""
    calm: list[float] = []  # the last WINDOW values outside of excursions
    spikes, inside = 0, False
    for value in loss:
        high = not math.isfinite(value) or (len(calm) >= WINDOW // 2 and value > median(calm) + SPIKE)
        spikes += high and not inside
        inside = high
        if not high:
            calm = [*calm, value][-WINDOW:]
    return spikes


def diverged_at(steps: Sequence[float], loss: Sequence[float]) -> int | None:
    best, since = math.inf, None
    for step, value in zip(steps, loss, strict=True):
        lost = not math.isfinite(value) or value > best + LOST
        since = None if not lost else since if since is not None else int(step)
        if not lost:
            best = min(best, value)
    return since


def table(summaries: Sequence[Summary]) -> str:
    """An aligned Markdown table, best held-out (or else training) loss first; diverged runs last."""
    head = ("run", "steps", "tokens", "final loss", "held out", "best held out", "spikes", "diverged at")
    rows = [
        (
            s.name,
            str(s.steps),
            "-" if s.tokens is None else f"{s.tokens:,.0f}",
            _loss(s.final_loss),
            _loss(s.valid_loss),
            _loss(s.best_valid_loss),
            str(s.spikes),
            "-" if s.diverged_at is None else f"step {s.diverged_at}",
        )
        for s in sorted(summaries, key=_rank)
    ]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        return "| " + " | ".join([first, *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))]) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:])]) + "|"
    return "\n".join([line(head), rule, *map(line, rows)])


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _rank(summary: Summary) -> tuple[bool, float]:
    loss = summary.valid_loss if summary.valid_loss is not None else summary.final_loss
    return summary.diverged_at is not None or not math.isfinite(loss), loss if math.isfinite(loss) else math.inf


def draw_comparison(records: Sequence[Record], path: Path) -> Path:
    """Loss of all runs against tokens (steps, unless all logged tokens): held out if all have it, else training."""
    against = "tokens" if all(record.series("loss", "tokens")[0] for record in records) else "step"
    held = all(len(record.series("valid_loss", against)[0]) > 1 for record in records)
    curves = [record.series("valid_loss" if held else "loss", against) for record in records]
    with figure(path, 6.4, 3.8) as made:
        axes = made.add_subplot()
        for i, (record, (x, y)) in enumerate(zip(records, curves, strict=True)):
            style = ("-", "--", ":", "-.")[i // len(COLORS) % 4]
            axes.plot(x, y if held else smooth(y), color=COLORS[i % len(COLORS)], linestyle=style, label=record.name)
        axes.set_ylabel(f"{'held-out' if held else 'training'} loss (nats per token)")
        fit_loss(axes, [y for _, y in curves])
        label_x(axes, against)
        axes.legend()
    return path
