"""What a run shows of itself from outside: its log, and its record of steps."""

import json
import re
import time
from pathlib import Path

from megnorm.metrics.record import FILE

ANNOUNCED = re.compile(r"^megnorm: ", re.MULTILINE)
CONTINUED = re.compile(r"^continuing from .*: step (\d+),", re.MULTILINE)
REQUESTED = re.compile(r"^checkpoint of step (\d+) requested", re.MULTILINE)
DURABLE = re.compile(r"^checkpoint of step (\d+) durable", re.MULTILINE)
TAIL = 4096  # bytes; lines of the record are shorter


class Life:
    """A job from one start to its end; made at the moment of the start. steps: of the whole run."""

    def __init__(self, out: Path, log: Path, steps: int) -> None:
        self.born, self.steps = time.monotonic(), steps
        self.record, self.log = out / FILE, log
        self.begin = log.stat().st_size
        self.inode = self._inode()

    def said(self) -> str:
        """Its log."""
        with self.log.open("rb") as stream:
            stream.seek(self.begin)
            return stream.read().decode(errors="replace")

    def stepped(self) -> bool:
        """Whether it has done a step."""
        return self._steps(self.said()) is not None

    def phase(self) -> str:
        """What it is doing now."""
        text = self.said()
        if not ANNOUNCED.search(text):
            return "start-up"
        requested, durable = set(REQUESTED.findall(text)), set(DURABLE.findall(text))
        if requested - durable:
            return "save requested, not yet durable"
        if str(self.steps) in durable:
            return "after the last save"
        last = self._steps(text)
        return "before the first step" if last is None else "step"

    def _steps(self, text: str) -> int | None:
        """The last step it has done, None before the first. The record of an earlier life, which may have gone further,
        is cut to the checkpoint, and thereby a new file, before it grows."""
        inode = self._inode()
        if not ANNOUNCED.search(text) or inode is None or inode == self.inode:
            return None
        continued = CONTINUED.findall(text)
        last = _last_step(self.record)
        return last if last > (int(continued[-1]) if continued else 0) else None

    def _inode(self) -> int | None:
        return self.record.stat().st_ino if self.record.exists() else None


def _last_step(record: Path) -> int:
    """The step of the last whole line."""
    with record.open("rb") as stream:
        stream.seek(max(0, record.stat().st_size - TAIL))
        lines = stream.read().rpartition(b"\n")[0].splitlines()
    return int(json.loads(lines[-1])["step"]) if lines else 0
