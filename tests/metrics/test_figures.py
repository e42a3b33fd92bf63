"""Figures and tables from records: they show what they should, and judge runs that were made to go wrong."""

import argparse
import math
import random
from pathlib import Path
from typing import Any

import pytest

from megnorm.metrics import commands, plots
from megnorm.metrics.compare import count_spikes, diverged_at, draw_comparison, summarize, table
from megnorm.metrics.record import Record, Writer


def curve(steps: int, *, end: float = 3.0, seed: int = 0) -> list[float]:
    noise = random.Random(seed)
    return [end + 4 * math.exp(-6 * i / steps) + noise.gauss(0, 0.05) for i in range(steps)]


def write(folder: Path, loss: list[float], *, layers: int = 3, held: bool = True, tokens: bool = True) -> Record:
    writer = Writer(folder / "metrics.jsonl")
    for step, value in enumerate(loss, 1):
        values = {"loss": value, "lr": 1e-3 / step, "grad_norm": 1.0, "tokens_per_second": 1e4, "mfu": 0.3}
        if tokens:
            values["tokens"] = 512.0 * step
        if step % 10 == 0:
            values |= {f"grad_norm/layer.{i}": (i + 1) / step for i in range(layers)}
            values |= {f"stream_rms/blocks.{i}.ffn": float(i + 1) for i in range(layers)}
            if held:
                values["valid_loss"] = value + 0.1
        writer.log(step, values)
    writer.close()
    return Record.read(folder)


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


@pytest.mark.parametrize("layers", [3, 24])
def test_every_figure_that_there_are_numbers_for_is_drawn(layers: int, tmp_path: Path) -> None:
    made = plots.draw(write(tmp_path, curve(60), layers=layers), tmp_path / "plots", unigram_entropy=6.5)
    assert [path.name for path in made] == ["loss.png", "grad_norms.png", "stream.png", "training.png"]
    assert all(map(is_png, made))


def test_short_flat_and_broken_records_can_be_drawn(tmp_path: Path) -> None:
    for i, loss in enumerate(([4.0], [math.nan] * 12, [*curve(80), *[math.nan] * 20])):
        record = write(tmp_path / str(i), loss, layers=12, tokens=i != 2)
        assert is_png(plots.draw_loss(record, tmp_path / f"{i}.png"))
    for n in (2, 12):
        rows = ({"step": step, "loss": 5.0} | {f"grad_norm/layer.{i}": value for i in range(n)}
                for step, value in ((1, 0.0), (2, math.nan)))  # fmt: skip
        assert is_png(plots.draw_layers(Record("flat", tuple(rows)), "grad_norm", "gradient norm", tmp_path / "g.png"))


def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures made from now on, kept for inspection."""
    made: list[Any] = []
    original = plots.Figure

    def keep(*args: Any, **kwargs: Any) -> Any:
        made.append(original(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(plots, "Figure", keep)
    return made


def test_the_loss_figure_shows_both_losses_and_the_entropy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = drawn(monkeypatch)
    record = write(tmp_path, [5.0, 4.0, 90.0, *curve(27)])
    plots.draw_loss(record, tmp_path / "loss.png", unigram_entropy=4.5)
    axes = figures[0].axes[0]
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert list(lines) == ["training", "held out", "unigram entropy"]
    assert list(lines["held out"].get_xdata()) == [512.0 * step for step in (10, 20, 30)]
    assert list(lines["unigram entropy"].get_ydata()) == [4.5, 4.5]
    assert axes.get_xlabel() == "tokens" and axes.get_ylim()[1] < 10  # a spike does not stretch the axis


def test_the_heat_map_has_a_cell_a_layer_and_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = drawn(monkeypatch)
    plots.draw_layers(write(tmp_path, curve(50), layers=12), "grad_norm", "gradient norm", tmp_path / "g.png")
    axes = figures[0].axes[0]
    mesh = axes.collections[0]
    assert mesh.get_array().shape == (12, 5)
    assert mesh.get_array()[11, 4] == pytest.approx(12 / 50)
    assert axes.get_ylim() == (0.5, 12.5) and mesh.norm.vmin == pytest.approx(1 / 50)


def test_layers_are_ordered_by_number(tmp_path: Path) -> None:
    assert list(plots.layers_of(write(tmp_path, curve(10), layers=11), "grad_norm")) == list(range(11))


def test_smoothing_keeps_lines_straight_and_gaps_open() -> None:
    line = [float(i) for i in range(200)]
    assert plots.smooth(line, 0.1) == pytest.approx(line)
    noisy = [(-1.0) ** i for i in range(200)]
    assert max(map(abs, plots.smooth(noisy, 0.1)[15:-15])) < 0.1
    broken = plots.smooth([1.0, math.nan, 1.0, 1.0], 1.0)
    assert math.isnan(broken[1]) and broken[0] == broken[2] == 1.0


def test_spikes_are_counted_once_each() -> None:
    loss = curve(300)
    assert count_spikes(loss) == 0
    for at in (120, 200):
        for i in range(6):
            loss[at + i] += 2.0 - 0.3 * i
    loss[250] = math.nan
    assert count_spikes(loss) == 3


def test_a_run_diverges_only_if_it_does_not_come_back() -> None:
    steps = [float(10 * (i + 1)) for i in range(300)]
    spiky, lost, broken = curve(300), curve(300), curve(300)
    for i in range(100, 140):
        spiky[i] += 3.0
    for i in range(100, 300):
        lost[i] = 7.0
    broken[250:] = [math.nan] * 50
    assert diverged_at(steps, spiky) is None
    assert diverged_at(steps, lost) == 1010
    assert diverged_at(steps, broken) == 2510


def test_the_table_ranks_runs_and_puts_the_diverged_last(tmp_path: Path) -> None:
    records = [
        write(tmp_path / "worse", curve(100, end=3.2)),
        write(tmp_path / "lost", [*curve(60, end=1.0), *[8.0] * 40]),
        write(tmp_path / "better", curve(100, end=2.9)),
    ]
    text = table([summarize(record) for record in records]).splitlines()
    assert [line.split()[1] for line in text[2:]] == ["better", "worse", "lost"]
    assert "step 61" in text[-1] and "51,200" in text[2]
    assert len({len(line) for line in text}) == 1
    tail = [row["loss"] for row in records[0].rows[-10:]]
    assert summarize(records[0]).final_loss == pytest.approx(sum(tail) / 10)
    assert is_png(draw_comparison(records, tmp_path / "compare.png"))


def test_the_comparison_uses_what_all_runs_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = drawn(monkeypatch)
    with_held, without = write(tmp_path / "a", curve(40)), write(tmp_path / "b", curve(40), held=False, tokens=False)
    draw_comparison([with_held, with_held], tmp_path / "c.png")
    draw_comparison([with_held, without], tmp_path / "c.png")
    first, second = (figure.axes[0] for figure in figures)
    assert (first.get_xlabel(), first.get_ylabel()) == ("tokens", "held-out loss (nats per token)")
    assert (second.get_xlabel(), second.get_ylabel()) == ("step", "training loss (nats per token)")


def test_a_record_without_a_loss_cannot_be_compared(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "metrics.jsonl")
    writer.log(1, {"lr": 0.1})
    writer.close()
    with pytest.raises(ValueError, match="no 'loss' was logged"):
        summarize(Record.read(tmp_path))


def test_verbs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("x/run", "y/run"):
        write(tmp_path / name, curve(40))
    parser = argparse.ArgumentParser()
    commands.add_plot_arguments(parser)
    assert commands.run_plot(parser.parse_args([str(tmp_path / "x/run"), "--unigram-entropy", "6"])) == 0
    assert is_png(tmp_path / "x/run/plots/loss.png")
    parser = argparse.ArgumentParser()
    commands.add_compare_arguments(parser)
    out = tmp_path / "figures/c.png"
    runs = [str(tmp_path / name) for name in ("x/run", "y/run")]
    assert commands.run_compare(parser.parse_args([*runs, "--out", str(out)])) == 0
    printed = capsys.readouterr().out
    assert all(run in printed for run in runs) and is_png(out)


def test_layers_of_two_stacks_are_counted_through() -> None:
    names = ["encoder.layer.0", "encoder.layer.1", "encoder.layer.2", "decoder.layer.0", "decoder.layer.1"]
    row = {
        "step": 1.0,
        "grad_norm/encoder.final_norm.weight": 1.0,
        **{f"grad_norm/{name}": 1.0 for name in names[::-1]},
    }
    found = plots.layers_of(Record("two", (row,)), "grad_norm")
    assert found == {i: f"grad_norm/{name}" for i, name in enumerate(names)}
