"""What came out of a study: its table in Markdown, and its figures, both beside its runs.

python examples/studies/summary.py {masked,translation,depth} FOLDER
python examples/studies/summary.py rate FOLDER         prints the better rate of a task's runs
"""

import json
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from megnorm.metrics.plots import COLORS, figure, fit_loss, label_x, log_y, smooth
from megnorm.metrics.record import Record
from megnorm.train.finetune import reached

SCHEMES = {"deepnorm": "DeepNorm", "postln": "Post-LN"}
SCORES = tuple(
    (split, said, metric, name)
    for split, said in (("valid", "validation"), ("test", "test"))
    for metric, name in (("bleu", "BLEU"), ("chrf", "chrF"))
)
LINES = ("-", "--", ":")


def accuracies(folder: Path) -> list[float]:
    """Of the seeds in it."""
    return [reached(seed)["accuracy"] for seed in sorted(folder.glob("seed-*"))]


def better_rate(folder: Path) -> str:
    """Of the rates that a task was trained with, by validation accuracy (the median, where there are several seeds)."""
    rates = sorted((path.name for path in folder.iterdir() if path.name != "test"), key=float)
    return max(rates, key=lambda rate: statistics.median(accuracies(folder / rate)))


def masked(folder: Path) -> list[list[str]]:
    """Also the masked model's curve."""
    record = Record.read(folder / "pretraining")
    with figure(folder / "pretraining.png", 4.6, 3.4) as made:
        axes = made.add_subplot(1, 1, 1)
        axes.plot(*record.series("valid_loss"), marker=".", color=COLORS[0])
        axes.set_ylabel("held-out loss (nats per masked token)")
        label_x(axes, "step")
    rows = [["task", "start", "rate", "test, median", "test, least to most"]]
    for task in ("wntopic", "wnhyper", "wnsense"):
        for start in ("pretrained", "scratch"):
            test = accuracies(folder / task / start / "test")
            spread = f"{min(test):.3f} to {max(test):.3f}"
            rows.append([task, start, better_rate(folder / task / start), f"{statistics.median(test):.3f}", spread])
    return rows


def translation(folder: Path) -> list[list[str]]:
    """Best of each scheme first, by BLEU of the validation set; also the curves."""
    runs = of_schemes(folder)
    draw(runs, folder / "loss.png", [("valid_loss", "held-out loss (nats per token)")])
    head = ["scheme", "rate", "held-out loss", *(f"{name}, {split}" for _, split, _, name in SCORES), "ended"]
    rows = []
    for run in runs:
        scores = judged(run)
        scheme, rate = run.name.split("-", 1)
        lost = Record.read(run).series("valid_loss")[1]
        told = [f"{scores[k, m]:.2f} ± {scores[k, m + '_spread']:.2f}" for k, _, m, _ in SCORES]
        row = [SCHEMES[scheme], rate, f"{lost[-1]:.3f}" if lost else "none", *told, ended(run)]
        rows.append((scheme, -scores["valid", "bleu"], row))
    return [head, *(row for _, _, row in sorted(rows))]


def judged(run: Path) -> Mapping[tuple[str, str], float]:
    """Scores of a run's last evaluation by split and metric, -1 where there are none."""
    found: dict[tuple[str, str], float] = defaultdict(lambda: -1.0)
    path = run / "eval.jsonl"
    results = json.loads(path.read_text().splitlines()[-1])["results"] if path.is_file() else {}
    for name, values in results.items():
        found |= {(Path(name).name.split(".")[0], metric): value for metric, value in values.items()}
    return found


def depth(folder: Path) -> list[list[str]]:
    """Loss and size of updates; one figure for each depth."""
    rows = [["layers", "scheme", "rate", "loss, first", "loss, last ten steps", "largest update", "ended"]]
    for place in sorted((path for path in folder.iterdir() if path.is_dir()), key=lambda path: int(path.name)):
        runs = of_schemes(place)
        for run in runs:
            record = Record.read(run)
            loss, updates = record.series("loss")[1], update_norms(record)[1]
            scheme, rate = run.name.split("-", 1)
            last = f"{statistics.mean(loss[-10:]):.3f}"
            rows.append([f"{place.name}-{place.name}", SCHEMES[scheme], rate, f"{loss[0]:.3f}", last,
                         f"{max(updates, default=math.nan):.3g}", ended(run)])  # fmt: skip
        panels = [("loss", "training loss (nats per token)"), ("update_norm", "size of the update")]
        draw(runs, folder / f"depth_{place.name}.png", panels)
    return rows


def of_schemes(folder: Path) -> list[Path]:
    runs = [path for path in folder.iterdir() if path.name.split("-", 1)[0] in SCHEMES]
    return sorted(runs, key=lambda path: (path.name.split("-", 1)[0], float(path.name.split("-", 1)[1])))


def ended(run: Path) -> str:
    """In the table's words: at the last step, or by an error, as a loss that is not finite."""
    code = (run / "ended").read_text().strip()
    return "well" if code == "0" else f"with {code} after step {Record.read(run).rows[-1]['step']}"


def update_norms(record: Record) -> tuple[list[float], list[float]]:
    """Steps, and the 2-norm of what an update changed in all matrices."""
    names = record.keys("update_norm/role.")
    rows = [row for row in record.rows if all(name in row for name in names)] if names else []
    return [row["step"] for row in rows], [math.sqrt(sum(row[name] ** 2 for name in names)) for row in rows]


def draw(runs: Sequence[Path], path: Path, panels: Sequence[tuple[str, str]]) -> None:
    """A panel for each quantity; colours are schemes, lines are rates."""
    records = [Record.read(run) for run in runs]
    rates = sorted({run.name.split("-", 1)[1] for run in runs}, key=float)
    with figure(path, 4.6 * len(panels), 3.4) as made:
        for place, (name, label) in enumerate(panels, 1):
            axes, curves = made.add_subplot(1, len(panels), place), []
            for run, record in zip(runs, records, strict=True):
                scheme, rate = run.name.split("-", 1)
                x, y = update_norms(record) if name == "update_norm" else record.series(name)
                curves.append(y)
                shown = smooth(y, 0.05) if name == "loss" else y
                style = LINES[rates.index(rate) % len(LINES)]
                color = COLORS[list(SCHEMES).index(scheme)]
                axes.plot(x, shown, color=color, linestyle=style, label=f"{SCHEMES[scheme]}, {rate}")
            axes.set_ylabel(label)
            label_x(axes, "step")
            if name == "update_norm":
                log_y(axes)
            else:
                fit_loss(axes, curves)
            if place == len(panels):
                axes.legend()
    print(path)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def main(study: str, folder: Path) -> None:
    if study == "rate":
        print(better_rate(folder))
        return
    text = markdown({"masked": masked, "translation": translation, "depth": depth}[study](folder))
    (folder / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
