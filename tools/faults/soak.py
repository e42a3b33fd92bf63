"""A long run in one process, with seeded faults: memory, descriptors and disk stay what they are."""

import errno
import json
import os
import random
import signal
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megnorm.checkpoint.folder import steps as checkpoints
from megnorm.train import loop
from megnorm.train.main import main
from megnorm.train.signals import EXIT_STOPPED
from tools.faults.job import Failed, Tally, check_same, forked, warm, write_config, write_text

EVERY, KEEP = 20, 2
SAMPLE = 25  # steps
FAULT_EVERY = 200  # steps, on average
SLOPE, WHOLE = 1.0, 10_000  # MB of memory in 1000 steps, in a run of that many steps
PAGE = os.sysconf("SC_PAGE_SIZE")


class Crash(Exception):
    """The run ends in the middle of a step."""


@dataclass
class Soak:
    """What goes on in the process. samples: (steps done, bytes of memory, descriptors, checkpoints)."""

    out: Path
    dice: random.Random
    done: int = 0
    failing: int = 0  # errno of the writes of checkpoints
    faults: Counter[str] = field(default_factory=Counter)
    samples: list[tuple[int, int, int, int]] = field(default_factory=list)

    def step(self, real: Any, run: Any) -> Any:
        """In place of the training step."""
        if self.done % SAMPLE == SAMPLE // 2:
            memory = int(Path("/proc/self/statm").read_text().split()[1]) * PAGE
            held = len(checkpoints(self.out / "checkpoints"))
            self.samples.append((self.done, memory, len(os.listdir("/proc/self/fd")), held))
        self.done += 1
        if self.dice.random() < 1 / FAULT_EVERY:
            self.fault(self.dice.choice(("stop", "crash", "full disk", "bad disk", "damage")))
        return real(run)

    def fault(self, kind: str) -> None:
        """Do one. Those of the disk hit the next save, which ends the run."""
        self.faults[kind] += 1
        if kind == "stop":
            os.kill(os.getpid(), signal.SIGTERM)
        elif kind in ("full disk", "bad disk"):
            self.failing = errno.ENOSPC if kind == "full disk" else errno.EIO
        elif kind == "crash":
            raise Crash("a fault of the soak")
        else:
            self.damage()
            raise Crash("a fault of the soak, with a damaged checkpoint")

    def damage(self) -> None:
        """Flip a bit of the newest checkpoint, if there is another one to go on from."""
        found = checkpoints(self.out / "checkpoints")
        if len(found) > 1:
            path = self.dice.choice(sorted(found[-1].glob("*.safetensors")))
            data = bytearray(path.read_bytes())
            data[self.dice.randrange(len(data) // 2, len(data))] ^= 1
            path.write_bytes(data)

    def write(self, real: Any, fd: int, *rest: Any) -> int:
        """In place of os.pwrite, which writes tensors only."""
        if self.failing:
            code, self.failing = self.failing, 0
            raise OSError(code, os.strerror(code))
        return int(real(fd, *rest))


def run(folder: Path, steps: int, seed: int) -> Tally:
    """Train ``steps`` steps in one process through all its faults; what must not grow did not, and nothing was lost."""
    text, tally = write_text(folder / "text"), Tally("soak")
    # one micro-batch in fp32, since most of the time goes to steps
    sections: dict[str, Any] = {
        "train": {"steps": steps, "precision": "fp32", "micro_batch": 4},
        "checkpoint": {"every": EVERY, "keep_last": KEEP},
    }
    calm = write_config(folder / "calm.yaml", text, folder / "calm", **sections)
    config = write_config(folder / "soak.yaml", text, folder / "soak", **sections)
    report = folder / "report.json"
    try:
        warm(calm, folder / "calm")
        if forked(lambda: _live(config, folder / "soak", report, random.Random(f"{seed} soak")), folder / "soak.log"):
            raise Failed(f"the run did not end well: {(folder / 'soak.log').read_text()[-2000:]}")
        found = json.loads(report.read_text())
        tally.note = judge(np.array(found["samples"]), found["faults"], steps)
        check_same(folder / "soak", folder / "calm")
        tally.passed = 1
    except (Failed, ValueError) as error:
        tally.fail(str(error))
    return tally


def _live(config: Path, out: Path, report: Path, dice: random.Random) -> int:
    """Start the training again in this same process, whatever ended it, until it is done; 0."""
    soak, step, pwrite = Soak(out, dice), loop.train_step, os.pwrite
    loop.train_step = lambda run: soak.step(step, run)
    os.pwrite = lambda fd, *rest: soak.write(pwrite, fd, *rest)  # type: ignore[assignment]
    while (code := main(["--config", str(config)])) != 0:
        soak.failing = 0
        for thread in threading.enumerate():  # a process that ends waits for its save, too
            if thread.name == "checkpoint":
                thread.join()
        text = "" if code in (EXIT_STOPPED, 1, 2) else f"exit code {code}"
        if text:
            raise Failed(text)
    report.write_text(json.dumps({"samples": soak.samples, "faults": soak.faults}))
    return 0


def judge(samples: NDArray[np.int64], faults: Mapping[str, int], steps: int) -> str:
    """Raise Failed if something grew; else the figures. The first tenth of the samples is warming up."""
    done, memory, descriptors, held = samples[len(samples) // 10 :].T
    # What an allocator and its threads keep comes to some MB however short the run is: a shorter one may grow as far.
    limit = SLOPE * max(1.0, WHOLE / steps)
    slope = float(np.polyfit(done / 1000, memory / 1e6, 1)[0])
    # a save under way holds a few more: the least of a while is what stays
    floors = [int(part.min()) for part in np.array_split(descriptors, 3)]
    said = ", ".join(f"{name} {count}" for name, count in faults.items())
    note = (
        f"{steps} steps ({done[-1]} with those done again), {said}; memory {slope:+.2f} MB per 1000 steps, "
        f"descriptors {floors[0]} to {floors[-1]}, at most {held.max()} checkpoints"
    )
    bad = {
        "memory grows": slope > limit,
        "descriptors grow": len(set(floors)) > 1,
        "checkpoints pile up": held.max() > KEEP + 1,
    }
    if any(bad.values()):
        raise Failed(f"{', '.join(name for name, found in bad.items() if found)}: {note}")
    return note
