"""A watch over every rank: finds the one that hangs, names it with the collective that the others wait in, ends the job.

Two threads a rank. One tells the others, through a torch store of the job's own (not the process group, which is what
hangs), what this rank is at; the other looks whether this rank makes progress, and only when it has made none for its
limit reads what the others told. The first to come to a verdict says it; all write their stacks and leave.
"""

import contextlib
import faulthandler
import json
import math
import os
import signal
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch.distributed import Store

from megnorm.parallel.recorder import RECORDER, Recorder
from megnorm.train.config import WatchdogConfig
from megnorm.train.hang import Beat, Identity, Verdict, judge

EXIT_HUNG = 76  # a rank hung; torchrun, or the next start, goes on from the last checkpoint
WARM_UP = 5  # steps before the limit is learned
SAVING = (
    3600.0  # seconds allowed around checkpoints: longer than the saver's own barrier, which names who does not come
)
PARTING = 2.0  # seconds that the one who spoke waits for the others to have heard


class Watchdog:
    """Watches while the context is open; ``step`` and ``patient`` tell it what this rank is at.

    patience: seconds allowed before the first steps are done. people: every rank, by rank.
    store: this rank's own client of a store that all reach, of keys that no other start of the job uses; None: alone.
    keeper: the rank in whose process the store lives, None if it is none of them. leave: how to end the process.
    """

    def __init__(
        self,
        config: WatchdogConfig,
        *,
        rank: int,
        people: Sequence[Identity],
        store: Store | None,
        keeper: int | None,
        patience: float,
        folder: Path,
        recorder: Recorder = RECORDER,
        leave: Callable[[int], object] = os._exit,
    ) -> None:
        self.config, self.rank, self.people, self.store, self.keeper = config, rank, people, store, keeper
        self.patience, self.folder, self.recorder, self.leave = patience, folder, recorder, leave
        self.interval = min(1.0, config.timeout / 8)
        self.silence = max(config.timeout / 4, 3 * self.interval)
        self.now_step, self.doing, self._least = 0, "before its first step", 0.0
        self._times: deque[float] = deque(maxlen=64)
        self._floor = self._heard = time.monotonic()
        self._told: Verdict | None = None
        self._closed, self._news = threading.Event(), threading.Event()
        self._ending, self._left = threading.Event(), threading.Event()
        self._seen: dict[int, tuple[str, float]] = {}  # rank -> its last beat as text, and when it was first read
        self._threads = [threading.Thread(target=self._watch, name="watchdog", daemon=True)]
        if store is not None:
            self._threads.append(threading.Thread(target=self._talk, name="heartbeat", daemon=True))

    def __enter__(self) -> "Watchdog":
        if self.config.timeout:
            # The only way to the stack of a process whose threads cannot run; stderr may have no descriptor.
            with contextlib.suppress(ValueError, OSError, RuntimeError):
                faulthandler.register(signal.SIGUSR2, file=sys.__stderr__ or sys.stderr, all_threads=True)
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """An error of a rank that was stuck comes of others that have left: their verdict will be here in a moment."""
        if kind is not None and self.config.timeout and self._stuck_for() > self.silence:
            self._ending.wait(2 * self.interval + 1.0)
        if self._ending.is_set():
            self._left.wait(60.0)  # the watching thread ends the process
        self._closed.set()
        self._news.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(1.0)

    # What this rank is at, told by the main thread

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around a training step; its time teaches the limit."""
        begun = time.monotonic()
        self.now_step, self.doing = number, "in its forward and backward passes or update"
        self.recorder.tick()
        yield
        self._times.append(time.monotonic() - begun)
        self.doing = "between steps"
        self.recorder.tick()

    @contextlib.contextmanager
    def patient(self, doing: str) -> Iterator[None]:
        """Around what may take long by nature: work on a checkpoint, as ``doing`` says."""
        before = self.doing, self._least
        self.doing, self._least = doing, max(SAVING, self.patience)
        self.recorder.tick()
        yield
        self.recorder.tick()
        self.doing, self._least = before

    def limit(self) -> float:
        """Seconds without progress that are allowed now."""
        times = list(self._times)
        learned = max(self.config.timeout, self.config.factor * statistics.median(times)) if times else 0.0
        return max(learned, self._least, self.patience if len(times) < WARM_UP else 0.0)

    def _stuck_for(self) -> float:
        return time.monotonic() - max(self.recorder.pulse, self._floor)

    def beat(self) -> Beat:
        now = self.recorder.now
        return Beat(
            self.rank, self.now_step, self._stuck_for(), self.limit(), self.doing, None if now is None else str(now)
        )

    # The thread that talks to the others. It may itself hang, with the store.

    def _talk(self) -> None:
        assert self.store is not None
        number = 0
        while not self._closed.wait(self.interval):
            number += 1
            try:
                self.store.set(f"beat{self.rank}", json.dumps([number, asdict(self.beat())]))
                if self.store.check(["verdict"]):
                    self._told = _parse(self.store.get("verdict"))
                    self._news.set()
                    return
                if self._stuck_for() > self.limit() - self.silence + 0.25 * min(self.rank, 8):
                    self._listen()
                else:
                    self._seen = {}
                self._heard = time.monotonic()
            except Exception:  # the store has gone: its keeper has ended, or hangs; the watching thread sees it
                return

    def _listen(self) -> None:
        """Read the last beat of every rank."""
        assert self.store is not None
        keys = [f"beat{who.rank}" for who in self.people]
        if not self.store.check(keys):  # a rank that has never given one: reading them all would wait for it
            keys = [key for key in keys if self.store.check([key])]
        found = dict(zip(keys, self.store.multi_get(keys), strict=True))
        now, seen = time.monotonic(), dict(self._seen)
        for who in self.people:
            text = found.get(f"beat{who.rank}", b"").decode()
            if who.rank not in seen or seen[who.rank][0] != text:
                seen[who.rank] = text, now
        self._seen = seen

    # The thread that watches. It never waits for anything.

    def _watch(self) -> None:
        woke = time.monotonic()
        while not self._closed.is_set():
            self._news.wait(self.interval)
            slept, woke = time.monotonic() - woke, time.monotonic()
            if slept > 4 * self.interval + 1.0:  # this whole process was stopped, and goes on: no reason to end it
                self._floor = woke
            if self._told is not None:
                return self._end(self._told, speak=False)
            if not self._closed.is_set() and self._stuck_for() > self.limit():
                verdict = self._judge()
                if verdict is not None:
                    return self._end(*self._publish(verdict))

    def _judge(self) -> Verdict | None:
        mine, now = self.beat(), time.monotonic()
        if self.store is None:
            return judge([mine], self.people, self.silence)
        if now - self._heard > self.silence:
            if self.keeper is not None and self.keeper != self.rank:
                lost = Beat(self.keeper, 0, 0.0, 0.0, "it keeps the store of the job", None, now - self._heard)
                return judge([mine, lost], self.people, self.silence)
            at = mine.waits or mine.doing
            return Verdict((), f"rank {self.rank} makes no progress in {at}, and the store of the job does not answer")
        beats, seen = [mine], self._seen
        for rank, (text, since) in seen.items():
            if rank != self.rank:
                silent = now - since
                unheard = Beat(rank, 0, 0.0, math.inf, "before its first sign of life", None)
                told = json.loads(text)[1] if text else asdict(unheard)
                beats.append(Beat(**(told | {"silent": silent})))
        complete = len(beats) == len(self.people)
        return judge(sorted(beats, key=lambda beat: beat.rank), self.people, self.silence) if complete else None

    def _publish(self, verdict: Verdict) -> tuple[Verdict, bool]:
        """The verdict that counts, the first one of all ranks', and whether it is ours to say."""
        if self.store is None or time.monotonic() - self._heard > self.silence:
            return verdict, True
        mine = json.dumps({"by": self.rank, "silent": verdict.silent, "text": verdict.text})
        try:
            first = self.store.compare_set("verdict", "", mine)
        except Exception:
            return verdict, True
        return (verdict, True) if first.decode() == mine else (_parse(first), False)

    def _end(self, verdict: Verdict, speak: bool) -> None:
        """Leave word and go; the hung ones in this place are taken along, since they may not be able to go themselves."""
        self._ending.set()
        stem = self.folder / f"step-{self.now_step:08d}-rank-{self.rank:05d}"
        with contextlib.suppress(OSError):  # a full disk is no reason to stay
            self.folder.mkdir(parents=True, exist_ok=True)
            with stem.with_suffix(".stacks.txt").open("a", encoding="utf-8") as file:
                file.write(f"{verdict.text}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            self.recorder.dump(
                stem.with_suffix(".collectives.jsonl"), rank=self.rank, step=self.now_step, said=verdict.text
            )
        if speak:
            print(
                f"megnorm train: {verdict.text}. Stacks are in {self.folder}; all ranks end with exit code {EXIT_HUNG}, and a "
                "restart goes on from the last checkpoint",
                file=sys.stderr,
                flush=True,
            )
        with contextlib.suppress(ValueError, OSError):  # stderr may have no descriptor
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
        self._take_along(verdict)
        if self.store is not None and (speak or self.keeper == self.rank):
            time.sleep(PARTING)  # whoever keeps the store, or spoke, goes last: the others must have heard
        self._left.set()
        self.leave(EXIT_HUNG)

    def _take_along(self, verdict: Verdict) -> None:
        """End the silent processes of this place: one that is stopped, or whose threads cannot run, does not hear us."""
        here = self.people[self.rank].place
        silent = [who for rank, who in enumerate(self.people) if rank in verdict.silent and who.place == here]
        running = [who for who in silent if who.state() not in ("", "T")]
        for who in running:
            with contextlib.suppress(OSError):
                os.kill(who.pid, signal.SIGUSR2)  # its stack, written by a signal handler in C
        if running:
            time.sleep(0.5)
        for who in silent:
            with contextlib.suppress(OSError):
                who.kill()


def _parse(text: bytes) -> Verdict:
    found: dict[str, Any] = json.loads(text)
    return Verdict(tuple(found["silent"]), found["text"])
