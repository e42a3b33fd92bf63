"""A save that ends in the middle: what is resumed afterwards is the checkpoint before or the new one, whole."""

import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from megnorm.checkpoint import io
from megnorm.checkpoint.config import CheckpointConfig
from megnorm.checkpoint.saver import Saver
from tools.faults.disk import AFTER, BEFORE, DIED, TORN, WRITES, Disk
from tools.faults.job import Failed, Tally, dealt, fork, same_bits

STEP = 4
LIMIT = 60.0  # seconds of a save


@dataclass(frozen=True)
class Scene:
    """How it is saved. again: the step has a checkpoint already. background: with the asynchronous saver."""

    ranks: int
    again: bool
    background: bool

    @property
    def step(self) -> int:
        return STEP if self.again else STEP + 1


@dataclass(frozen=True)
class Cut:
    """Where the save of one rank ends."""

    scene: Scene
    rank: int
    at: int
    function: str
    when: str
    power: bool

    def __str__(self) -> str:
        what = "power cut" if self.power else "kill"
        place = f"{self.when} {self.function} (call {self.at} of rank {self.rank})"
        return f"{what} {place}, {self.scene}"


SCENES = [Scene(*values) for values in product((1, 2), (False, True), (False, True))]


def run(folder: Path, count: int, seed: int) -> Tally:
    """Do ``count`` cuts."""
    dice, tally = random.Random(f"{seed} cuts"), Tally("save cuts")
    old, new = tensors(1), tensors(2)
    base = folder / "base"
    io.save(base, STEP - 1, dealt(tensors(0), 0, 1), {"is": "older"})
    io.save(base, STEP, dealt(old, 0, 1), {"is": "old"})
    places = [cut for scene in SCENES for cut in rehearse(folder, base, scene, new)]
    hit: Counter[str] = Counter()
    found: Counter[str] = Counter()
    for number, cut in enumerate(dice.choices(places, k=count) if count > len(places) else dice.sample(places, count)):
        work = folder / f"cut-{number}"
        shutil.copytree(base, work)
        try:
            found[one(work, cut, old, new, f"{seed} {number}")] += 1
            tally.passed += 1
        except Failed as error:
            tally.fail(f"{cut}: {error}")
        hit[cut.function] += 1
        hit["power"] += cut.power
        shutil.rmtree(work, ignore_errors=True)
    power = hit.pop("power", 0)
    functions = ", ".join(f"{name} {times}" for name, times in hit.most_common())
    tally.note = f"at {functions} of {len(places)} places; {power} with the power gone; resumed from {dict(found)}"
    return tally


def tensors(seed: int) -> dict[str, Tensor]:
    """The state that is saved; tensors that two ranks cut within a row, a vector, a number."""
    random = torch.Generator().manual_seed(seed)
    return {
        "blocks.0.ffn.up.weight": torch.randn(37, 23, generator=random),
        "blocks.0.ffn.down.weight": torch.randn(23, 37, generator=random).bfloat16(),
        "final_norm.weight": torch.randn(23, generator=random),
        "updates": torch.tensor(seed),
    }


def rehearse(folder: Path, base: Path, scene: Scene, new: Mapping[str, Tensor]) -> list[Cut]:
    """Save once without a cut: every place where one can be."""
    work = folder / "rehearsal"
    shutil.copytree(base, work)
    calls = folder / "calls"
    codes = play(work, scene, new, calls=calls)
    if any(codes):
        raise Failed(f"a save that nobody disturbs ends with {codes}, {scene}: {said(work)}")
    places = []
    for rank in range(scene.ranks):
        for at, function in enumerate(json.loads(Path(f"{calls}-{rank}").read_text()), 1):
            moments = (BEFORE, TORN, AFTER) if function in WRITES else (BEFORE, AFTER)
            places += [Cut(scene, rank, at, function, *rest) for rest in product(moments, (False, True))]
    shutil.rmtree(work)
    return places


def play(
    work: Path,
    scene: Scene,
    new: Mapping[str, Tensor],
    cut: Cut | None = None,
    calls: Path | None = None,
    seed: str = "",
) -> list[int]:
    """The save, in a process for each rank, one of which may die on the way; exit codes by rank.

    calls: where each rank leaves the names of the functions it called.
    """
    meeting = multiprocessing.get_context("fork").Barrier(scene.ranks)

    def barrier() -> None:
        meeting.wait(LIMIT)

    def rank_of(rank: int) -> int:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        disk = Disk(dice=random.Random(seed))
        if cut is not None and cut.rank == rank:
            disk.at, disk.when, disk.power = cut.at, cut.when, cut.power
        config = CheckpointConfig(keep_last=2, asynchronous=scene.background, threads=1)
        saver = Saver(config, work, rank, scene.ranks, barrier)
        shards = dealt(new, rank, scene.ranks)
        disk.watch()
        saver.save(scene.step, shards, {"is": "new"})
        saver.wait()
        disk.stop()
        if calls is not None:
            Path(f"{calls}-{rank}").write_text(json.dumps(disk.calls))
        return 0

    ranks = [fork(partial(rank_of, rank), work.with_suffix(".log")) for rank in range(scene.ranks)]
    return ends(ranks)


def ends(processes: Sequence[int]) -> list[int]:
    """Exit codes. Once one has failed the others are killed, as a launcher does."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + LIMIT
    while len(codes) < len(processes):
        for process in processes:
            if process not in codes:
                found, status = os.waitpid(process, os.WNOHANG)
                if found:
                    codes[process] = os.waitstatus_to_exitcode(status)
        if any(codes.values()) or time.monotonic() > deadline:
            for process in set(processes) - codes.keys():
                os.kill(process, signal.SIGKILL)
        time.sleep(0.001)
    return [codes[process] for process in processes]


def one(work: Path, cut: Cut, old: Mapping[str, Tensor], new: Mapping[str, Tensor], seed: str) -> str:
    """Do a cut; which state is resumed from, "old" or "new". Raises Failed if it is neither, or a promise was broken."""
    codes = play(work, cut.scene, new, cut, seed=seed)
    if codes[cut.rank] != DIED:
        raise Failed(f"the save ended with {codes}: {said(work)}")
    found = resumed(work, {"old": old, "new": new})
    if found == "old" and "durable" in said(work):
        raise Failed("the save was said to be durable, and is lost")
    try:
        path = io.save(work, STEP + 2, dealt(new, 0, 1), {"is": "new"})
    except io.CheckpointError as error:
        raise Failed(f"the next save: {error}") from None
    left = sorted(place.name for place in work.iterdir() if place.name.startswith("."))
    if left or io.verify(path) or resumed(work, {"new": new}) != "new":
        raise Failed(f"the next save leaves {left}, {io.verify(path)}")
    return found


def resumed(work: Path, states: Mapping[str, Mapping[str, Tensor]]) -> str:
    """Which of the states a new start goes on from."""
    blank = {name: torch.zeros_like(tensor) for name, tensor in next(iter(states.values())).items()}
    try:
        loaded = io.resume(work, dealt(blank, 0, 1))
    except io.CheckpointError as error:
        raise Failed(f"nothing to resume from: {error}") from None
    if loaded is None:
        raise Failed("nothing to resume from")
    which = str(loaded.meta["is"])
    if which not in states:
        raise Failed(f"it goes on from {loaded.path.name}, the {which} state")
    if not all(same_bits(blank[name], tensor) for name, tensor in states[which].items()):
        raise Failed(f"{loaded.path.name} says it is the {which} state, and is not")
    return which


def said(work: Path) -> str:
    log = work.with_suffix(".log")
    return log.read_text(errors="replace") if log.exists() else ""
