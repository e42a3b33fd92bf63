"""Speed of checkpoints: saving and loading beside torch.distributed.checkpoint and a raw write of the same bytes.

    python tools/bench/checkpoint.py --folder /mnt/scratch --megabytes 1000 --rounds 5

The ways take turns, in another order each round, and every file is on the disk, not in memory, when its time is taken:
saves end with fsync, cold loads begin with dropped caches. Figures are medians, ratios are medians of the rounds' ratios.
"""

import argparse
import logging
import os
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from megnorm.checkpoint import io
from megnorm.checkpoint.config import CheckpointConfig
from megnorm.checkpoint.saver import Saver
from megnorm.checkpoint.shard import Shard, flat_bytes

Times = dict[str, list[float]]


def state_of(megabytes: int, seed: int) -> dict[str, Tensor]:
    """Matrices of 16 MB, and as many vectors of 8 kB, as a model has them."""
    random = torch.Generator().manual_seed(seed)
    state = {}
    for i in range(max(1, megabytes // 16)):
        state[f"blocks.{i}.ffn.up.weight"] = torch.randn(2000, 2000, generator=random)
        state[f"blocks.{i}.ffn.input_norm.weight"] = torch.randn(2000, generator=random)
    return state


def size_of(state: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def whole(state: Mapping[str, Tensor]) -> list[Shard]:
    return [Shard.whole(name, tensor) for name, tensor in state.items()]


def take_turns(ways: Mapping[str, Callable[[], None]], rounds: int, before: Callable[[], None]) -> Times:
    """Seconds of every way in every round; ``before`` is not timed."""
    seconds: Times = {name: [] for name in ways}
    names = list(ways)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            before()
            begun = time.perf_counter()
            ways[name]()
            seconds[name].append(time.perf_counter() - begun)
    return seconds


def report(title: str, seconds: Times, size: int, ratios: Mapping[tuple[str, str], str]) -> None:
    """A line for each way, and for each ratio with its goal."""
    for name, found in seconds.items():
        middle = statistics.median(found)
        print(f"{title:<12}{name:<28}{middle:8.2f} s  {size / middle / 1e9:6.2f} GB/s")
    for (one, other), goal in ratios.items():
        found = sorted(a / b for a, b in zip(seconds[one], seconds[other], strict=True))
        print(f"{title:<12}{one} / {other}: {statistics.median(found):.2f} ({found[0]:.2f} to {found[-1]:.2f})  {goal}")
    print(f"{title:<12}load average {os.getloadavg()[0]:.1f}", flush=True)


def drop_caches(folder: Path) -> None:
    """Let the kernel forget the files of a folder."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def saves(work: Path, state: Mapping[str, Tensor], rounds: int, threads: int) -> None:
    def clear() -> None:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        os.sync()

    def raw() -> None:
        with open(work / "raw", "wb", buffering=0) as file:
            for tensor in state.values():
                file.write(flat_bytes(tensor))
            os.fsync(file.fileno())

    ways = {
        "megnorm": lambda: void(io.save(work, 1, whole(state), {}, threads=threads)),
        "torch": lambda: torch_save(state, work / "torch", 1),
        f"torch, {threads} threads": lambda: torch_save(state, work / "torch", threads),
        "raw write": raw,
    }
    seconds = take_turns(ways, rounds, clear)
    goals = {
        ("megnorm", "torch"): "<= 1",
        ("megnorm", f"torch, {threads} threads"): "<= 1",
        ("megnorm", "raw write"): "",
    }
    report("save", seconds, size_of(state), goals)


def loads(work: Path, state: Mapping[str, Tensor], rounds: int, threads: int) -> None:
    shutil.rmtree(work, ignore_errors=True)
    path = io.save(work, 1, whole(state), {}, threads=threads)
    torch_save(state, work / "torch", threads)
    target = {name: torch.zeros_like(tensor) for name, tensor in state.items()}

    def ours(verify: bool) -> None:
        found = io.resume(work, whole(target), verify=verify, threads=threads)
        assert found is not None and found.path == path

    def theirs() -> None:
        dcp.load(target, storage_reader=dcp.FileSystemReader(work / "torch"))

    ways = {"megnorm, verified": lambda: ours(True), "megnorm, unverified": lambda: ours(False), "torch": theirs}
    goals = {("megnorm, verified", "torch"): "<= 1", ("megnorm, unverified", "megnorm, verified"): ">= 0.85"}
    for title, before in (("cold load", lambda: drop_caches(work)), ("warm load", lambda: None)):
        report(title, take_turns(ways, rounds, before), size_of(state), goals)
    assert all(torch.equal(target[name], tensor) for name, tensor in state.items())


def stall(work: Path, state: Mapping[str, Tensor], rounds: int) -> None:
    """How long the step loop waits for an asynchronous save, beside a copy of the same bytes in memory."""
    shutil.rmtree(work, ignore_errors=True)
    saver = Saver(CheckpointConfig(keep_last=1), work)
    copies = {name: torch.empty_like(tensor) for name, tensor in state.items()}
    step = [0]

    def copy() -> None:
        for name, tensor in state.items():
            copies[name].copy_(tensor)

    def save() -> None:
        step[0] += 1
        saver.save(step[0], whole(state), {})

    saver.prepare(whole(state))
    saver.wait()
    copy()
    seconds = take_turns({"asynchronous save": save, "memory copy": copy}, rounds, saver.wait)
    saver.wait()
    report("stall", seconds, size_of(state), {("asynchronous save", "memory copy"): "<= 1.3"})


def torch_save(state: Mapping[str, Tensor], folder: Path, threads: int) -> None:
    dcp.save(dict(state), storage_writer=dcp.FileSystemWriter(folder, thread_count=threads))


def void(value: object) -> None:
    """For a way whose result is of no use."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured (default: a temporary folder)")
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=CheckpointConfig().threads)
    parser.add_argument("--only", choices=("save", "load", "stall"))
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    state = state_of(args.megabytes, seed=1)
    print(f"{size_of(state) / 1e6:.0f} MB in {len(state)} tensors, {os.cpu_count()} cores")
    work = Path(tempfile.mkdtemp(prefix="megnorm-bench-", dir=args.folder)) / "work"
    try:
        if args.only in (None, "save"):
            saves(work, state, args.rounds, args.threads)
        if args.only in (None, "load"):
            loads(work, state, args.rounds, args.threads)
        if args.only in (None, "stall"):
            stall(work, state, args.rounds)
    finally:
        shutil.rmtree(work.parent, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
