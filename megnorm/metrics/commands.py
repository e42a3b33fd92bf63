"""The verbs ``plot`` and ``compare``."""

import argparse
from pathlib import Path

from megnorm.metrics.record import Record


def add_plot_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Draw a run's figures from its metrics.jsonl."
    parser.add_argument("run", type=Path, help="run folder (train.out)")
    parser.add_argument("--out", type=Path, help="folder for the figures (default: <run>/plots)")
    parser.add_argument("--unigram-entropy", type=float, metavar="NATS", help="draw this line in the loss figure")


def run_plot(args: argparse.Namespace) -> int:
    from megnorm.metrics.plots import draw

    record = Record.read(args.run)
    base = args.run if args.run.is_dir() else args.run.parent
    for path in draw(record, args.out or base / "plots", unigram_entropy=args.unigram_entropy):
        print(path)
    return 0


def add_compare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Several runs as a table and one figure of their losses."
    parser.add_argument("runs", type=Path, nargs="+", help="run folders")
    parser.add_argument("--out", type=Path, help="file for the figure, e.g. compare.png (default: no figure)")


def run_compare(args: argparse.Namespace) -> int:
    from megnorm.metrics.compare import draw_comparison, summarize, table

    records = _distinct([Record.read(run) for run in args.runs], args.runs)
    print(table([summarize(record) for record in records]))
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        print(f"\n{draw_comparison(records, args.out)}")
    return 0


def _distinct(records: list[Record], runs: list[Path]) -> list[Record]:
    """Runs whose folders share a name are called by their whole path."""
    names = [record.name for record in records]
    return [
        record if names.count(record.name) == 1 else Record(str(run), record.rows)
        for record, run in zip(records, runs, strict=True)
    ]
