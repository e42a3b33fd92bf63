"""The flight recorder: the last collectives of this process, the one it is in now, and when it last made progress.

One per process, because a process has one line of work; a rank that hangs is found by it, and its end explained.
"""

import json
import time
from pathlib import Path
from typing import Any, NamedTuple

KEPT = 1024


class Collective(NamedTuple):
    """number: counts the collectives of its axis on this rank, so that ranks can be compared. begun, seconds: of
    ``time.monotonic``; seconds is None while it runs."""

    op: str
    axis: str
    number: int
    bytes: int
    begun: float
    seconds: float | None = None

    def __str__(self) -> str:
        return f"{self.op} over {self.axis} (number {self.number}, {self.bytes} bytes)"


class Recorder:
    """A ring of collectives. Around each: begin, then end; one that raised or hangs stays ``now``.

    seconds: in collectives, of all time. pulse: when the last collective began or ended, or ``tick`` was called.
    """

    def __init__(self, size: int = KEPT) -> None:
        self._ring: list[Collective | None] = [None] * size
        self._count = 0
        self._numbers: dict[str, int] = {}
        self.now: Collective | None = None
        self.seconds = 0.0
        self.pulse = time.monotonic()

    def begin(self, op: str, axis: str, size: int) -> None:
        """size: bytes of the whole message."""
        number = self._numbers[axis] = self._numbers.get(axis, 0) + 1
        self.pulse = time.monotonic()
        self.now = Collective(op, axis, number, size, self.pulse)

    def end(self) -> None:
        now, self.pulse = self.now, time.monotonic()
        assert now is not None, "end without begin"
        took = self.pulse - now.begun
        self._ring[self._count % len(self._ring)] = now._replace(seconds=took)
        self._count += 1
        self.seconds += took
        self.now = None

    def tick(self) -> None:
        """This rank made progress outside of collectives."""
        self.pulse = time.monotonic()

    def entries(self) -> list[Collective]:
        """What the ring holds, oldest first, and last the collective that runs."""
        start = self._count % len(self._ring)
        kept = [one for one in (*self._ring[start:], *self._ring[:start]) if one is not None]
        now = self.now
        return kept if now is None else [*kept, now]

    def dump(self, path: Path, **facts: Any) -> None:
        """Write the ring as JSON lines: first ``facts`` (rank, step), then a collective each, ``begun`` in Unix time."""
        shift = time.time() - time.monotonic()
        lines = [facts, *({**one._asdict(), "begun": round(one.begun + shift, 6)} for one in self.entries())]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


RECORDER = Recorder()
