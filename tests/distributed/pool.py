"""Real gloo ranks that live as long as the test session: the first start costs seconds, a call milliseconds.

    def work(rank, world, x):          # a top-level function of the test's module
        ...
        return result                  # one per rank; tensors come back as copies

    def test_it(ranks):
        zero, one = ranks(2).run(work, x)

In a rank torch has one thread, the default group is gloo over all ranks, and every call starts with the same seed and
default dtype. A rank that raises fails the call with its traceback; the pool then starts afresh at the next call,
because its groups may be out of step. Expect an error inside the function if it is what you test.
"""

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

GRACE = 1.0  # seconds that the other ranks get to answer once one has failed

_pools: dict[int, "Pool"] = {}
_kept: dict[Any, Any] = {}


class RankError(AssertionError):
    """A function failed on one rank or more; the message holds their tracebacks."""


class Pool:
    """``world`` processes, joined in one gloo group; started at the first call."""

    def __init__(self, world: int) -> None:
        self.world = world
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._folder = ""

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 300.0, **kwargs: Any) -> list[Any]:
        """Call ``function(rank, world, *args, **kwargs)`` on every rank; the results by rank. timeout in seconds."""
        call = pickle.dumps((function, args, kwargs))
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send_bytes(call)
        answers = self._collect(timeout)
        failed = {rank: text for rank, (good, text) in sorted(answers.items()) if not good}
        if failed:
            self.close()
            report = "\n".join(f"--- rank {rank} of {self.world}:\n{text}" for rank, text in failed.items())
            raise RankError(f"{function.__qualname__}\n{report}")
        return [answers[rank][1] for rank in range(self.world)]

    def _start(self) -> None:
        # Ranks are copies of a process that has read torch already: eight of them start in a second, not in half a minute.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["megnorm.train.build"])
        self._folder = tempfile.mkdtemp(prefix="megnorm-ranks-")
        store = os.path.join(self._folder, "store")
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, self.world, store, theirs, list(sys.path)), daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def _collect(self, timeout: float) -> dict[int, tuple[bool, Any]]:
        """Answers by rank, until all have answered, or GRACE after the first failure, or the timeout."""
        answers: dict[int, tuple[bool, Any]] = {}
        deadline = time.monotonic() + timeout
        waiting: dict[Connection, int] = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = waiting.pop(pipe)
                try:
                    answers[rank] = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    self._processes[rank].join(1)
                    answers[rank] = False, f"the process ended with exit code {self._processes[rank].exitcode}"
                if not answers[rank][0]:
                    deadline = min(deadline, time.monotonic() + GRACE)
        if waiting and all(good for good, _ in answers.values()):
            for rank in waiting.values():
                answers[rank] = False, f"no answer after {timeout} s; its stack is on stderr"
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._processes[rank].pid, signal.SIGUSR1)
            time.sleep(0.5)
        return answers

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []
        shutil.rmtree(self._folder, ignore_errors=True)


def pool(world: int) -> Pool:
    """The pool of this many ranks, kept until the session ends."""
    return _pools.setdefault(world, Pool(world))


def close_all() -> None:
    for one in _pools.values():
        one.close()
    _pools.clear()


def keep(key: Any, make: Callable[[], Any]) -> Any:
    """On a rank: what ``make()`` returned the first time, for groups and meshes that many calls share."""
    if key not in _kept:
        _kept[key] = make()
    return _kept[key]


def _share_device() -> None:
    """Let all gloo groups of this process share one device.

    Each group has a device of its own, and each device a thread that wakes a hundred times a second. A pool that has lived
    through many tests holds dozens of groups on every rank: their threads took the larger part of both cores.
    """
    from torch.distributed import distributed_c10d

    plain: Any = distributed_c10d.ProcessGroupGloo
    device = plain.create_default_device()

    class Sharing(plain):
        def __init__(self, store: Any, rank: int, size: int, timeout: Any) -> None:
            options = plain._Options()
            options._devices, options._timeout, options._threads = [device], timeout, 2
            super().__init__(store, rank, size, options)

    distributed_c10d.ProcessGroupGloo = Sharing  # type: ignore[misc]


def _serve(rank: int, world: int, store: str, pipe: Connection, path: list[str]) -> None:
    """The life of one rank: join the group, then answer calls until the pipe closes."""
    sys.path[:] = path
    faulthandler.register(signal.SIGUSR1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    _share_device()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    while True:
        try:
            call = pipe.recv_bytes()
        except EOFError:
            return
        torch.manual_seed(0)
        torch.set_default_dtype(torch.float32)
        try:
            function, args, kwargs = pickle.loads(call)
            answer = pickle.dumps((True, function(rank, world, *args, **kwargs)))
        except Exception:
            answer = pickle.dumps((False, traceback.format_exc()))
        pipe.send_bytes(answer)
