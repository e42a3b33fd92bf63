"""A shard: the slice of a logical tensor that one rank holds; and tensors seen as plain bytes."""

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megnorm.checkpoint.format import DTYPES, MAX_DIM, MAX_DIMS, TENSOR_NAME, CheckpointError

_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Shard:
    """``tensor`` is the box at ``offset`` of the logical tensor ``name`` of global ``shape``; on any device."""

    name: str
    tensor: Tensor
    shape: tuple[int, ...]
    offset: tuple[int, ...]

    @staticmethod
    def whole(name: str, tensor: Tensor) -> "Shard":
        """A shard that is the whole logical tensor."""
        return Shard(name, tensor, tuple(tensor.shape), (0,) * tensor.dim())

    @property
    def local(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def bytes(self) -> int:
        return self.tensor.numel() * self.tensor.element_size()

    def check(self) -> None:
        """Raise if this cannot be a slice of the tensor it names, or has a dtype that the format lacks."""
        if not TENSOR_NAME.fullmatch(self.name):
            raise CheckpointError(f"{self.name[:80]!r} is no tensor name: use letters, digits and . _ - /")
        dtype_name(self.tensor.dtype, self.name)
        sizes = (len(self.shape), len(self.offset), self.tensor.dim())
        if len(set(sizes)) > 1 or sizes[0] > MAX_DIMS or max(self.shape, default=0) > MAX_DIM:
            raise CheckpointError(f"shard {self.name}: {self.local} at {self.offset} does not fit in {self.shape}")
        if any(o < 0 or o + n > size for o, n, size in zip(self.offset, self.local, self.shape, strict=True)):
            raise CheckpointError(f"shard {self.name}: {self.local} at {self.offset} is not inside {self.shape}")


def dtype_name(dtype: torch.dtype, tensor: str) -> str:
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise CheckpointError(f"tensor {tensor} has dtype {name}; checkpoints hold {', '.join(DTYPES)}")
    return name


def integers(tensor: Tensor) -> np.ndarray[Any, Any]:
    """A CPU tensor's own memory as a numpy array of integers of the same size and strides (numpy lacks bfloat16)."""
    return tensor.detach().view(_SAME_SIZE[tensor.element_size()]).numpy()


def flat_bytes(tensor: Tensor) -> memoryview:
    """A tensor's elements in row-major order as bytes; a copy only if it is on another device or not contiguous."""
    array = integers(tensor.detach().cpu().contiguous()).reshape(-1)
    return array.view(np.uint8).data


def region(offset: tuple[int, ...], shape: tuple[int, ...], base: tuple[int, ...]) -> tuple[slice, ...]:
    """The box as an index into an array that begins at ``base``."""
    return tuple(slice(o - b, o - b + n) for o, n, b in zip(offset, shape, base, strict=True))


def run_parallel(jobs: Iterable[Callable[[], None]], threads: int) -> None:
    """Run all jobs in that many threads; after a failure start no more, wait for those that run, and raise it.

    Plain threads: an executor refuses work once the main thread has ended, when a background save still runs.
    """
    iterator = iter(jobs)
    lock = threading.Lock()
    failures: list[BaseException] = []
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            try:
                with lock:
                    job = next(iterator, None)
                if job is None:
                    return
                job()
            except BaseException as error:
                failures.append(error)
                stop.set()

    workers = [threading.Thread(target=work, name=f"checkpoint-{i}") for i in range(threads - 1)]
    for worker in workers:
        worker.start()
    try:
        work()
        for worker in workers:
            worker.join()
    finally:
        stop.set()
        for worker in workers:
            worker.join()
    if failures:
        raise failures[0]
