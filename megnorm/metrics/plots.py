"""Figures of one run, drawn from its record: loss, per-layer quantities, learning rate and speed."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

from megnorm.metrics.record import Record

STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "legend.frameon": False,
    "savefig.dpi": 160,
}
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c6d31")  # Okabe and Ito
QUANTITIES = {
    "grad_norm": ("gradient norm", "grad_norms.png"),
    "update_ratio": ("update size |dW| / |W|", "updates.png"),
    "stream_rms": ("RMS of the residual stream", "stream.png"),
    "branch_rms": ("RMS of the FFN branch", "branches.png"),
}
TRAINING = {"lr": "learning rate", "grad_norm": "gradient norm", "tokens_per_second": "tokens / s", "mfu": "MFU"}
LINES_UP_TO = 8  # layers; beyond, a heat map


def draw(record: Record, folder: Path, *, unigram_entropy: float | None = None) -> list[Path]:
    """Draw every figure that the record has numbers for into ``folder``; the paths of the files, in order.

    unigram_entropy: nats per token, drawn as a line in the loss figure.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made = [draw_loss(record, folder / "loss.png", unigram_entropy=unigram_entropy)]
    for quantity, (label, file) in QUANTITIES.items():
        if layers_of(record, quantity):
            made.append(draw_layers(record, quantity, label, folder / file))
    if any(record.series(key)[0] for key in TRAINING):
        made.append(draw_training(record, folder / "training.png"))
    return made


def draw_loss(record: Record, path: Path, *, unigram_entropy: float | None = None) -> Path:
    """Training and held-out loss against tokens (steps, where tokens were not logged)."""
    with figure(path, 5.4, 3.4) as made:
        axes = made.add_subplot()
        against = "tokens" if record.series("loss", "tokens")[0] else "step"
        x, loss = record.series("loss", against)
        if len(x) > 50:
            axes.plot(x, loss, color=COLORS[0], alpha=0.3, linewidth=0.8)
            axes.plot(x, smooth(loss), color=COLORS[0], label="training, smoothed")
        else:
            axes.plot(x, loss, color=COLORS[0], label="training", marker="o" if len(x) == 1 else None)
        held_x, held = record.series("valid_loss", against)
        if held:
            axes.plot(held_x, held, color=COLORS[1], marker="o", markersize=3.5, label="held out")
        if unigram_entropy is not None:
            axes.axhline(unigram_entropy, color="#555555", linestyle="--", linewidth=1.0, label="unigram entropy")
        axes.set_ylabel("loss (nats per token)")
        axes.set_title(record.name)
        fit_loss(axes, [loss, held, [] if unigram_entropy is None else [unigram_entropy]])
        label_x(axes, against)
        axes.legend()
    return path


def draw_layers(record: Record, quantity: str, label: str, path: Path) -> Path:
    """A quantity by layer and step, logarithmic: a line a layer for shallow models, else a heat map."""
    layers = layers_of(record, quantity)
    with figure(path, 5.4, 3.4) as made:
        axes = made.add_subplot()
        axes.set_title(record.name)
        if len(layers) <= LINES_UP_TO:
            shades = matplotlib.colormaps["viridis"]
            for rank, (layer, key) in enumerate(layers.items()):
                x, y = record.series(key)
                color = shades(0.9 * rank / max(len(layers) - 1, 1))
                axes.plot(x, y, color=color, marker="o" if len(x) == 1 else None, label=f"layer {layer + 1}")
            if any(value > 0 for key in layers.values() for value in record.series(key)[1]):
                log_y(axes)
            axes.set_ylabel(label)
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        else:
            _heat(made, axes, record, layers, label)
        label_x(axes, "step")
    return path


def _heat(made: Figure, axes: Axes, record: Record, layers: Mapping[int, str], label: str) -> None:
    steps = [row["step"] for row in record.rows if any(key in row for key in layers.values())]
    rows = {row["step"]: row for row in record.rows}
    grid = [[rows[step].get(key, math.nan) for step in steps] for key in layers.values()]
    seen = [value for line in grid for value in line if math.isfinite(value) and value > 0]
    axes.grid(False)
    if not seen:
        axes.text(0.5, 0.5, "no finite values", transform=axes.transAxes, ha="center")
        return
    low, high = min(seen), max(seen)
    norm = LogNorm(low, high if high > low else 2 * low)
    # Layers are numbered from 1 as in the papers; each cell reaches half way to its neighbours.
    mesh = axes.pcolormesh(_edges(steps), _edges([layer + 1 for layer in layers]), grid, norm=norm, cmap="viridis")
    mesh.set_rasterized(True)
    axes.set_ylabel("layer")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    bar = made.colorbar(mesh, ax=axes, pad=0.02, label=label)
    bar.outline.set_visible(False)


def _edges(centers: Sequence[float]) -> list[float]:
    if len(centers) == 1:
        return [centers[0] - 0.5, centers[0] + 0.5]
    middles = [(a + b) / 2 for a, b in zip(centers, centers[1:], strict=False)]
    return [2 * centers[0] - middles[0], *middles, 2 * centers[-1] - middles[-1]]


def draw_training(record: Record, path: Path) -> Path:
    """Learning rate, global gradient norm, speed and MFU against steps, those that were logged."""
    shown = [key for key in TRAINING if record.series(key)[0]]
    columns = min(len(shown), 2)
    rows = math.ceil(len(shown) / columns)
    with figure(path, 3.2 * columns, 2.1 * rows) as made:
        for place, key in enumerate(shown, 1):
            axes = made.add_subplot(rows, columns, place)
            x, y = record.series(key)
            axes.plot(x, y, color=COLORS[0])
            axes.set_title(TRAINING[key])
            if key == "grad_norm" and any(value > 0 for value in y):
                log_y(axes)
            else:
                axes.set_ylim(bottom=0)
            if key == "lr":
                axes.ticklabel_format(axis="y", scilimits=(-3, 4), useMathText=True)
            if key == "tokens_per_second":
                axes.yaxis.set_major_formatter(EngFormatter(sep=""))
            if key == "mfu":
                axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
            label_x(axes, "step")
    return path


def layers_of(record: Record, quantity: str) -> dict[int, str]:
    """0-based layer -> key of the record, in order; a decoder's behind its encoder's. Activations are taken at the FFN, the
    end of a layer."""
    pattern = re.compile(rf"{quantity}/(encoder\.|decoder\.)?(?:layer\.(\d+)|blocks\.(\d+)\.ffn)")
    places = {}
    for key in record.keys(f"{quantity}/"):
        match = pattern.fullmatch(key)
        if match:
            places[match[1] != "encoder.", int(match[2] or match[3])] = key
    below = max((layer + 1 for behind, layer in places if not behind), default=0)
    return {layer + behind * below: key for (behind, layer), key in sorted(places.items())}


@contextmanager
def figure(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure of that size in inches, saved to ``path`` at the end; needs no display."""
    with matplotlib.rc_context(STYLE):
        made = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(made)
        yield made
        made.savefig(path)


def label_x(axes: Axes, against: str) -> None:
    axes.set_xlabel("tokens" if against == "tokens" else "step")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.margins(x=0.02)
    low, high = axes.get_xlim()
    if high - low < 2:  # one step: room for a tick on each side
        axes.set_xlim((low + high) / 2 - 1, (low + high) / 2 + 1)


def log_y(axes: Axes) -> None:
    """A logarithmic axis that shows plain numbers where the values span less than two decades."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if high < 100 * low:
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())


def fit_loss(axes: Axes, series: Sequence[Sequence[float]]) -> None:
    """Limits that a spike or a divergence cannot stretch: no higher than where the curves begin."""
    begins = [values[0] for values in series if values and math.isfinite(values[0])]
    lows = [min(v for v in values if math.isfinite(v)) for values in series if any(map(math.isfinite, values))]
    if begins and lows:
        room = 0.05 * max(max(begins) - min(lows), 0.1)
        axes.set_ylim(min(lows) - room, max(begins) + room)


def smooth(values: Sequence[float], span: float = 0.02) -> list[float]:
    """Mean over a centred window of ``span`` of the series, shorter at its ends; nan where the value is not finite."""
    reach = int(span * len(values) / 2)
    finite = [math.isfinite(value) for value in values]
    totals = [0.0, *accumulate(value if good else 0.0 for value, good in zip(values, finite, strict=True))]
    counts = [0, *accumulate(finite)]
    out = []
    for i, good in enumerate(finite):
        near = min(reach, i, len(values) - 1 - i)  # the same on both sides: a one-sided window would lag
        low, high = i - near, i + near + 1
        out.append((totals[high] - totals[low]) / (counts[high] - counts[low]) if good else math.nan)
    return out
