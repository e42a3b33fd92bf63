"""The record of a run: ``metrics.jsonl``, one JSON object per logged step.

Every object has "step". A number that is not finite is written as null, so that any JSON reader takes the file, and
is read back as nan.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

FILE = "metrics.jsonl"


class Writer:
    """Appends to the record, a line at a time: what was logged is in the file even if the process dies."""

    def __init__(self, path: Path, *, after: int = 0) -> None:
        """Opens ``path`` to go on behind step ``after``; lines of later steps are dropped first."""
        path.parent.mkdir(parents=True, exist_ok=True)
        cut(path, after)
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        line = {"step": step} | {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")

    def close(self) -> None:
        self._file.close()


def cut(path: Path, after: int) -> None:
    """Drop the lines of steps later than ``after``, and a last line that a crash left torn; all or nothing."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = [line for line, values in zip(lines, _parse(path, lines), strict=False) if values["step"] <= after]
    text = "".join(f"{line}\n" for line in kept)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _parse(path: Path, lines: list[str]) -> list[dict[str, float]]:
    parsed = []
    for number, line in enumerate(lines, 1):
        try:
            values = json.loads(line)
            step = values["step"]
            if not isinstance(step, int):
                raise TypeError("step is not a whole number")
            parsed.append({k: v if v is not None else math.nan for k, v in values.items()})
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):  # the only line that an interrupted write can tear
                break
            raise ValueError(f"{path}, line {number}: not a metrics record ({error}); remove that line") from None
    return parsed


@dataclass(frozen=True)
class Record:
    """A run's metrics by step. ``name`` is the run folder's name."""

    name: str
    rows: tuple[dict[str, float], ...]

    @staticmethod
    def read(run: Path) -> "Record":
        """Read a run folder, or its metrics.jsonl. Raises ValueError if there is none, or if a line is broken."""
        path = run / FILE if run.is_dir() else run
        if not path.is_file():
            raise ValueError(f"{path}: there is no such file; give a run folder that holds {FILE}")
        merged: dict[int, dict[str, float]] = {}
        for row in _parse(path, path.read_text(encoding="utf-8").splitlines()):
            merged.setdefault(int(row["step"]), {}).update(row)
        if not merged:
            raise ValueError(f"{path}: nothing was logged yet; train at least train.log_every steps")
        return Record(path.resolve().parent.name, tuple(merged[step] for step in sorted(merged)))

    def series(self, key: str, against: str = "step") -> tuple[list[float], list[float]]:
        """(x, y) of the rows that have both."""
        pairs = [(row[against], row[key]) for row in self.rows if key in row and against in row]
        return [x for x, _ in pairs], [y for _, y in pairs]

    def keys(self, prefix: str = "") -> list[str]:
        """The names logged anywhere that begin with ``prefix``, in the order of their first appearance."""
        return [key for key in dict.fromkeys(key for row in self.rows for key in row) if key.startswith(prefix)]
