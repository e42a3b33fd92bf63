"""The job that faults are done to: a tiny model on made-up text, with dropout, warm-up and low-precision weights."""

import contextlib
import logging
import math
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from megnorm.checkpoint import io
from megnorm.checkpoint.shard import Shard
from megnorm.data.indexed import IndexedWriter
from megnorm.metrics.record import Record
from megnorm.train.main import main

VOCABULARY = 61
TOKENS = 4 * 32  # of a step
STEP_NAME = re.compile(r"step-(\d{8,15})")

# All that makes a resume hard to get right: dropout, masters behind bf16 weights, a schedule, evaluation in between.
CONFIG: dict[str, dict[str, Any]] = {
    "model": {
        "layers": 2, "width": 32, "heads": 2, "ffn": 64, "vocab_size": VOCABULARY, "max_positions": 32,
        "dropout": 0.1, "attention_dropout": 0.1,
    },
    "data": {"split": [0.9, 0.1, 0.0]},
    "optim": {"lr": 1e-2, "warmup_steps": 3},
    "train": {
        "steps": 12, "sequence_length": 32, "global_batch": 4, "micro_batch": 2, "precision": "bf16", "eval_batches": 1,
        "threads": 1,
    },
    "parallel": {"timeout": 30.0},
    "checkpoint": {"every": 4, "keep_last": 2},
    "metrics": {"tensorboard": False, "progress": False},
}  # fmt: skip


class Failed(Exception):
    """A promise that was not kept; the message says what happened."""


@dataclass
class Tally:
    """Of one kind of fault: how many were survived, what went wrong with the others, and what else there is to say."""

    kind: str
    passed: int = 0
    failures: list[str] | None = None
    note: str = ""

    def fail(self, reason: str, count: int = 1) -> None:
        self.failures = [*(self.failures or []), *[reason] * count]

    @property
    def failed(self) -> int:
        return len(self.failures or [])

    def line(self) -> str:
        text = f"{self.kind}: {self.passed}/{self.passed + self.failed}"
        return f"{text}; {self.note}" if self.note else text


def write_text(prefix: Path, documents: int = 60) -> str:
    """A learnable token stream: every token is followed by its successor, now and then by a jump."""
    random = np.random.default_rng(0)
    with IndexedWriter(prefix, np.uint16) as writer:
        for _ in range(documents):
            moves = np.where(random.random(100) < 0.9, 1, random.integers(2, VOCABULARY, 100))
            tokens = (random.integers(VOCABULARY) + np.cumsum(moves)) % VOCABULARY
            writer.add(tokens, [len(tokens)], [1])
    return str(prefix)


def write_config(path: Path, text: str, out: Path, **sections: Mapping[str, Any]) -> Path:
    """The job as YAML; sections change the defaults."""
    config = {name: dict(values) for name, values in CONFIG.items()}
    config["data"]["path"], config["train"]["out"] = text, str(out)
    for name, values in sections.items():
        config[name] = config.get(name, {}) | dict(values)
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def train(config: Path, log: Path, *overrides: str) -> int:
    """``megnorm train`` in a fork of this process, which has torch imported already; its exit code. log: its stderr."""

    return forked(lambda: main(["--config", str(config), *overrides]), log)


def warm(config: Path, out: Path) -> None:
    """Train once in this process: what is loaded and set up at the first step comes to every fork for nothing."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    with contextlib.redirect_stderr(StringIO()) as said:
        code = main(["--config", str(config), f"train.out={out}"])
    logging.root.handlers.clear()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if code != 0:
        raise Failed(f"the undisturbed run: exit code {code}: {said.getvalue()[-1000:]}")


def forked(work: Callable[[], int], log: Path) -> int:
    """Run ``work`` in a fork, with stdout and stderr going to a file; its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(fork(work, log), 0)[1])


def fork(work: Callable[[], int], log: Path) -> int:
    """Start ``work`` in a fork; its process id. The fork ends without leaving this function."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 70
    with contextlib.suppress(BaseException):
        fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        # the parent may have put something else there, and may log to it
        sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))
        logging.root.handlers.clear()
        try:
            code = work()
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def weights(out: Path) -> dict[str, Tensor]:
    """Every tensor of a run's newest checkpoint, and its step as one more."""
    path = io.latest(out / "checkpoints")
    if path is None:
        raise Failed(f"{out.name} has no checkpoint")
    return io.read_full(path, io.available(path)) | {"step": torch.tensor(io.read_meta(path)["step"])}


def losses(out: Path) -> list[tuple[float, float]]:
    """(step, loss) of the record."""
    return list(zip(*Record.read(out).series("loss"), strict=True))


def check_same(out: Path, undisturbed: Path) -> None:
    """Raise Failed unless the last checkpoint is the undisturbed run's bit for bit, and the record of losses too."""
    found, wanted = weights(out), weights(undisturbed)
    if found.keys() != wanted.keys():
        raise Failed(f"other tensors: {sorted(found.keys() ^ wanted.keys())[:3]}")
    for name, tensor in wanted.items():
        if not same_bits(found[name], tensor):
            raise Failed(f"{name} is not what it is without the fault")
    if losses(out) != losses(undisturbed):
        raise Failed("the record of losses is not that of the undisturbed run")


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal in shape, dtype and every bit, NaNs included."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    return torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))


def ranges(shape: tuple[int, ...], begin: int, end: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(offset, shape) of the boxes that hold elements begin .. end of a row-major array: a part of a row, whole rows, a
    part of a row. So a rank's share of a flat buffer lies in the tensors of it."""
    if begin >= end or not shape:
        if begin < end:
            yield (), ()
        return
    row = math.prod(shape[1:])
    first, last = -(-begin // row), end // row
    if first > last:  # inside one row
        yield from _in_row(shape, begin // row, begin % row, end - begin // row * row)
        return
    if begin < first * row:
        yield from _in_row(shape, first - 1, begin - (first - 1) * row, row)
    if first < last:
        yield (first, *(0,) * (len(shape) - 1)), (last - first, *shape[1:])
    if last * row < end:
        yield from _in_row(shape, last, 0, end - last * row)


def _in_row(
    shape: tuple[int, ...], row: int, begin: int, end: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    for offset, local in ranges(shape[1:], begin, end):
        yield (row, *offset), (1, *local)


def dealt(tensors: Mapping[str, Tensor], rank: int, world: int) -> list[Shard]:
    """A rank's equal share of all tensors laid out one after the other."""
    total = sum(tensor.numel() for tensor in tensors.values())
    low, high = total * rank // world, total * (rank + 1) // world
    shards, start = [], 0
    for name, tensor in tensors.items():
        shape = tuple(tensor.shape)
        begin, end = max(low - start, 0), min(high - start, tensor.numel())
        for offset, local in ranges(shape, begin, end):
            box = tensor[tuple(slice(o, o + n) for o, n in zip(offset, local, strict=True))]
            shards.append(Shard(name, box, shape, offset))
        start += tensor.numel()
    return shards
