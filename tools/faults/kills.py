"""SIGKILL from outside at uniform times of a run's life; whatever is hit, a restart ends with the same weights.

A run of one rank is started again by the loop below. In a run of two ranks one rank is killed, and torchrun starts both
again, or the whole job is, torchrun included, and the loop starts it again. A run is hit KILLS_A_RUN times at most.
"""

import contextlib
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from megnorm.metrics.record import Record
from tools.faults.job import TOKENS, Failed, Tally, check_same, write_config, write_text
from tools.faults.life import Life

PROJECT = Path(__file__).resolve().parent.parent.parent
STEPS, EVERY = 400, 10
KILLS_A_RUN, STARTS = 2, 8
LIMIT = 120.0  # seconds in which a life must end, or be killed
POLL = 0.01
ONE_RANK_DIES = 0.75  # of the kills of a job of two ranks; else all of it
PAIRS = 5  # one kill in so many hits a job of two ranks
TORCHRUN = [
    "-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", "2", "--rdzv-backend", "c10d",
    "--rdzv-endpoint", "localhost:0", "--max-restarts", str(STARTS),
]  # fmt: skip

Draw = Callable[[], float | None]  # after how many seconds a new life is killed; None: it is let live


@dataclass
class Kill:
    """seconds: after the life began. at: on the monotonic clock. recovered: seconds until the next step, if any came."""

    seconds: float
    phase: str
    at: float
    recovered: float | None = None


class Run:
    """One run from its first start to its end, over all restarts."""

    def __init__(self, folder: Path, name: str, text: str, ranks: int, steps: int) -> None:
        self.out, self.log, self.ranks, self.steps = folder / name, folder / f"{name}.log", ranks, steps
        parallel = {"tp": ranks, "timeout": 30.0}
        self.config = write_config(
            folder / f"{name}.yaml", text, self.out,
            train={"steps": steps}, parallel=parallel, checkpoint={"every": EVERY},
        )  # fmt: skip
        self.kills: list[Kill] = []
        self.seconds = 0.0

    def finish(self, draw: Draw) -> None:
        """Start again and again until it is done. Raises Failed if it never is."""
        command = [sys.executable, *(TORCHRUN if self.ranks > 1 else []), "-m", "megnorm.train"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT), "GLOO_SOCKET_IFNAME": "lo"}
        begun = time.monotonic()
        for _ in range(STARTS):
            with self.log.open("ab") as stream:
                job = subprocess.Popen(
                    [*command, "--config", str(self.config)],
                    stdout=stream, stderr=stream, env=environment, cwd=PROJECT, start_new_session=True,
                )  # fmt: skip
            try:
                code = self._watch(job, draw)
            finally:
                if job.poll() is None:
                    kill(job, children(job.pid))
            if code == 0:
                self.seconds = time.monotonic() - begun
                return
            if code != -signal.SIGKILL:
                what = f"no end after {LIMIT:g} s" if code is None else f"exit code {code}"
                raise Failed(f"{what}: {self.log.read_text(errors='replace')[-1000:]}")
        raise Failed(f"no end after {STARTS} starts")

    def _watch(self, job: "subprocess.Popen[bytes]", draw: Draw) -> int | None:
        """Wait for the end of the job, and kill when the time has come; the exit code, None if there is no end."""
        life, due = Life(self.out, self.log, self.steps), draw()
        while (code := job.poll()) is None and time.monotonic() < life.born + LIMIT:
            if self.kills and self.kills[-1].recovered is None and life.stepped():
                self.kills[-1].recovered = time.monotonic() - self.kills[-1].at
            if due is not None and time.monotonic() >= life.born + due:
                ranks = children(job.pid)
                alone = self._one_of(ranks)
                self.kills.append(Kill(due, life.phase(), time.monotonic()))
                if alone is None:
                    return kill(job, ranks)
                with contextlib.suppress(ProcessLookupError):  # it may just have ended
                    os.kill(alone, signal.SIGKILL)
                life, due = Life(self.out, self.log, self.steps), draw()  # torchrun starts the ranks again
            time.sleep(POLL)
        return code

    def _one_of(self, ranks: list[int]) -> int | None:
        """The process id of a rank to kill alone; None: the whole job."""
        dice = random.Random(f"{self.out.name} {len(self.kills)}")
        return dice.choice(ranks) if self.ranks > 1 and ranks and dice.random() < ONE_RANK_DIES else None


def kill(job: "subprocess.Popen[bytes]", ranks: list[int]) -> int:
    """End a job and its ranks at once; the exit code."""
    for process in (job.pid, *ranks):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    return job.wait()


def children(process: int) -> list[int]:
    """Process ids of the ranks that torchrun has started, each in a session of its own."""
    return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


class Budget:
    """The kills that are still to be done, shared by the runs that go on side by side."""

    def __init__(self, count: int) -> None:
        self.left, self.runs, self.lock = count, 0, threading.Lock()

    def next_run(self) -> int | None:
        """The number of a run to start; None when all kills are done."""
        with self.lock:
            self.runs += 1
            return self.runs - 1 if self.left > 0 else None

    def take(self, count: int = 1) -> bool:
        """Take some, or with a negative count put them back; whether there were enough."""
        with self.lock:
            enough = self.left >= count
            self.left -= count if enough else 0
            return enough


class Dice:
    """When the lives of a run are ended: uniform over ``length`` seconds from the start of each. A kill that would fall
    behind the end of its life is none, and is drawn again in another run."""

    def __init__(self, run: Run, budget: Budget, random: random.Random, length: float) -> None:
        self.run, self.budget, self.random, self.length = run, budget, random, length
        self.taken = 0

    def draw(self) -> float | None:
        self.settle()
        if len(self.run.kills) >= KILLS_A_RUN or not self.budget.take():
            return None
        self.taken += 1
        return self.random.uniform(0.0, self.length)

    def settle(self) -> None:
        """Put back what was taken and not done."""
        self.budget.take(len(self.run.kills) - self.taken)
        self.taken = len(self.run.kills)


def run(folder: Path, kills: int, seed: int, *, steps: int = STEPS) -> Tally:
    """Do ``kills`` kills; a line is printed for each."""
    text = write_text(folder / "text")
    tally, done = Tally("kills"), list[Run]()
    for ranks, count, side_by_side in ((1, kills - kills // PAIRS, 2), (2, kills // PAIRS, 1)):
        if count:  # steps of two ranks take twice as long
            done += _campaign(folder, text, ranks, count, min(count, side_by_side), seed, steps // ranks, tally)
    tally.note = summary(done, steps)
    return tally


def _campaign(
    folder: Path, text: str, ranks: int, count: int, side_by_side: int, seed: int, steps: int, tally: Tally
) -> list[Run]:
    """``count`` kills of runs of so many ranks. The undisturbed runs come first, and under the same load."""
    budget = Budget(count)
    calm = [Run(folder, f"calm-{ranks}-{i}", text, ranks, steps) for i in range(side_by_side)]

    def work(length: float) -> list[Run]:
        finished = []
        while (number := budget.next_run()) is not None:
            one = Run(folder, f"killed-{ranks}-{number}", text, ranks, steps)
            dice = Dice(one, budget, random.Random(f"{seed} {ranks} {number}"), length)
            try:
                one.finish(dice.draw)
                check_same(one.out, calm[0].out)
                tally.passed += len(one.kills)
            except (Failed, ValueError) as error:
                tally.fail(f"{one.out.name}: {error}", max(1, len(one.kills)))
            dice.settle()
            for kill in one.kills:
                print(f"  kill {kill.seconds:5.2f} s after a start of {ranks} rank(s): {kill.phase}", flush=True)
            finished.append(one)
        return finished

    with ThreadPoolExecutor(side_by_side) as pool:
        list(pool.map(lambda one: one.finish(lambda: None), calm))
        for other in calm[1:]:
            check_same(other.out, calm[0].out)
        length = min(one.seconds for one in calm)
        return [one for finished in pool.map(work, [length] * side_by_side) for one in finished]


def summary(runs: list[Run], steps: int) -> str:
    """Phases hit, median time to the next step, share of productive time."""
    kills = [kill for one in runs for kill in one.kills]
    phases = ", ".join(f"{name} {count}" for name, count in Counter(kill.phase for kill in kills).most_common())
    found = [kill.recovered for kill in kills if kill.recovered is not None]
    recovered = f"{statistics.median(found):.1f} s" if found else "never"
    ended = [one for one in runs if one.seconds]
    kept = sum(TOKENS / rate for one in ended for rate in Record.read(one.out).series("tokens_per_second")[1])
    share = kept / max(sum(one.seconds for one in ended), 1e-9)
    return (
        f"hit {phases}; from kill to next step {recovered} (median); productive {share:.0%} of the time, "
        f"that is the steps that count, in runs of {steps} steps ({steps // 2} on two ranks)"
    )
