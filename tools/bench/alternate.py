"""Time training workers, or calls within one process, in turn: A B, B A, A B, ..., so that drift touches all alike."""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("worker.py")


@dataclass
class Worker:
    """A running worker. seconds: of every timed step, in order of rounds."""

    name: str
    process: subprocess.Popen[str]
    ready: dict[str, Any]
    seconds: list[float] = field(default_factory=list)
    peak_mb: float = 0.0

    @staticmethod
    def start(name: str, arguments: list[str]) -> "Worker":
        command = [sys.executable, str(WORKER), *arguments]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return Worker(name, process, _read(process, name))

    def step(self, count: int = 1, *, timed: bool = True) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"step {count}\n")
        self.process.stdin.flush()
        found = _read(self.process, self.name)
        self.peak_mb = found.get("peak_mb", 0.0)
        if timed:
            self.seconds.append(statistics.median(found["sec"]))

    def stop(self) -> None:
        self.process.communicate("quit\n", timeout=60)


def _read(process: "subprocess.Popen[str]", name: str) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"worker {name} ended early; see its output above")
    found: dict[str, Any] = json.loads(line)
    return found


def alternate(workers: list[Worker], rounds: int, warmup: int = 2) -> None:
    """``warmup`` untimed steps each, then one timed step each per round, the order reversed every other round."""
    for worker in workers:
        worker.step(warmup, timed=False)
    for i in range(rounds):
        for worker in workers if i % 2 == 0 else workers[::-1]:
            worker.step()


@dataclass(frozen=True)
class Ratio:
    """Seconds of one / seconds of the base, round by round: median and middle half."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(seconds: list[float], base: list[float]) -> "Ratio":
        pairs = sorted(a / b for a, b in zip(seconds, base, strict=True))
        return Ratio(statistics.median(pairs), pairs[len(pairs) // 4], pairs[-1 - len(pairs) // 4])


def in_turn(calls: Mapping[str, Callable[[], None]], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of each call in every round after ``warmup``."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(warmup + rounds):
        for name in calls if i % 2 else reversed(calls):
            begun = time.perf_counter()
            calls[name]()
            if i >= warmup:
                seconds[name].append(time.perf_counter() - begun)
    return seconds


def table(seconds: Mapping[str, list[float]]) -> str:
    """A line for each: median seconds, and time over that of the first in the same round with its middle half."""
    base, *_ = seconds.values()
    lines = [f"{'name':<10}{'s/step':>8}{'time ratio':>12}{'middle half':>18}"]
    for name, times in seconds.items():
        ratio = Ratio.of(times, base)
        span = f"{ratio.low:.3f} to {ratio.high:.3f}"
        lines.append(f"{name:<10}{statistics.median(times):>8.3f}{ratio.median:>12.3f}{span:>18}")
    return "\n".join(lines)
