"""Which rank hangs, told from the last signs of life of all: pure functions, no threads, no network."""

import os
import signal
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Identity:
    """A process among all: where it runs, and since when, so that no other process is taken for it."""

    rank: int
    host: str
    place: str  # host and process-number space: within one, a process number is enough
    pid: int
    born: str

    @staticmethod
    def mine(rank: int) -> "Identity":
        pid, host = os.getpid(), socket.gethostname()
        space = os.readlink("/proc/self/ns/pid") if os.path.exists("/proc/self/ns/pid") else ""
        return Identity(rank, host, f"{host} {space}", pid, _stat(pid)[1])

    def state(self) -> str:
        """The letter of the process's state in Linux ("T": stopped); "" if it has ended or cannot be seen from here."""
        letter, born = _stat(self.pid)
        return letter if born and born == self.born else ""

    def kill(self) -> None:
        """End the process, which may be stopped. Only for one in this place, and only if it is still the same."""
        if self.state():
            os.kill(self.pid, signal.SIGKILL)


def _stat(pid: int) -> tuple[str, str]:
    """(state, start time) of a process, from Linux; empty where there is no such thing."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", ""
    return fields[0], fields[19]


@dataclass(frozen=True)
class Beat:
    """A rank's sign of life. age: seconds since it last made progress; limit: how many it is allowed.

    doing: what it is at, outside of collectives. waits: the collective that it is in, in words, or None.
    silent: seconds for which nothing was heard of it, by the listener's clock.
    """

    rank: int
    step: int
    age: float
    limit: float
    doing: str
    waits: str | None
    silent: float = 0.0

    @property
    def late(self) -> bool:
        return self.age + self.silent > self.limit


@dataclass(frozen=True)
class Verdict:
    """silent: the ranks at fault that may be unable to go by themselves. text: one sentence on all at fault."""

    silent: tuple[int, ...]
    text: str


def judge(beats: Sequence[Beat], people: Sequence[Identity], silence: float) -> Verdict | None:
    """Who holds up the job; None as long as somebody works within its limit, for whom the others may well wait.

    Called by a rank that makes no progress itself. A rank that was not heard of for ``silence`` seconds is at fault; else
    the ranks that are late outside of collectives are; else all wait in collectives that never complete.
    """
    silent = [beat for beat in beats if beat.silent > silence]
    alive = [beat for beat in beats if beat.silent <= silence]
    if silent:
        return _verdict([(beat, _last_words(beat, people[beat.rank])) for beat in silent], alive, people, silence)
    if not all(beat.late for beat in alive):
        return None
    stuck = [beat for beat in alive if beat.waits is None]
    if stuck:
        told = [(beat, f"no progress for {beat.age:.0f} s in step {beat.step}, {beat.doing}") for beat in stuck]
        return _verdict(told, [beat for beat in alive if beat.waits is not None], people, silence)
    return Verdict((), f"all ranks wait for each other: {_waiting(alive)}")


def _last_words(beat: Beat, who: Identity) -> str:
    at = f"in {beat.waits}" if beat.waits else beat.doing
    stopped = ", the process is stopped" if who.place == Identity.mine(-1).place and who.state() == "T" else ""
    return f"no sign of life for {beat.silent:.0f} s{stopped}; last seen in step {beat.step}, {at}"


def _verdict(
    hung: list[tuple[Beat, str]], others: Sequence[Beat], people: Sequence[Identity], silence: float
) -> Verdict:
    named = []
    for beat, words in hung[:8]:
        who = people[beat.rank]
        named.append(f"rank {who.rank} (host {who.host}, pid {who.pid}) hangs: {words}")
    more = f"; and {len(hung) - 8} other ranks" if len(hung) > 8 else ""
    waiting = [beat for beat in others if beat.waits is not None]
    rest = f"; waiting for it: {_waiting(waiting)}" if waiting else ""
    silent = tuple(beat.rank for beat, _ in hung if beat.silent > silence)
    return Verdict(silent, "; ".join(named) + more + rest)


def _waiting(beats: Sequence[Beat]) -> str:
    """Ranks by the collective that they are in."""
    by: dict[str, list[int]] = {}
    for beat in beats:
        by.setdefault(beat.waits or beat.doing, []).append(beat.rank)
    return ", ".join(
        f"{'ranks' if len(ranks) > 1 else 'rank'} {_ranges(ranks)} in {what}" for what, ranks in list(by.items())[:8]
    )


def _ranges(ranks: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> "0 to 2, 5"."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)
