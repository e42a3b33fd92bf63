"""Read the chunks of a plan in several threads; no byte stays in a tensor unless its checksum is right."""

import json
import os
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megnorm.checkpoint.chunks import Chunk, Plan
from megnorm.checkpoint.folder import open_file
from megnorm.checkpoint.format import CheckpointError, Manifest, checksum
from megnorm.checkpoint.shard import integers, run_parallel

MAX_REPORTED = 3
TOGETHER = 256 << 10  # bytes up to which neighbouring chunks are read in one call


def fetch(
    path: Path, manifest: Manifest, plan: Plan, threads: int, *, check: bool, copy: bool, collect: bool = False
) -> list[str]:
    """Read all chunks. All that is damaged is found; raises CheckpointError, or returns the sentences if ``collect``."""
    problems: list[tuple[str, int, str]] = []
    local = threading.local()

    def read(file: str, run: list[Chunk]) -> None:
        if not hasattr(local, "buffer"):
            local.buffer = np.empty(max(manifest.chunk_bytes, TOGETHER), dtype=np.uint8)
        fd = open_file(path / file, manifest.files[file].bytes)
        try:
            for start, problem in _read_run(fd, path / file, run, local.buffer, check, copy):
                problems.append((file, start, problem))
        finally:
            os.close(fd)

    jobs = (partial(read, file, run) for file, chunks in plan.items() for run in _runs(chunks))
    run_parallel(jobs, threads)
    problems.sort()
    sentences = [sentence + stranger(path / file, manifest.step) for file, _, sentence in problems]
    if sentences and not collect:
        more = len(sentences) - MAX_REPORTED
        text = "; ".join(sentences[:MAX_REPORTED]) + (f"; and {more} more" if more > 0 else "")
        raise CheckpointError(f"{text}: restore the file from a copy, or load an earlier checkpoint")
    return sentences


def _runs(chunks: Sequence[Chunk]) -> Iterator[list[Chunk]]:
    """Chunks that are read in one call: a large one alone, small ones with their neighbours."""
    run: list[Chunk] = []
    for chunk in chunks:
        if run and (chunk.start != run[-1].end or chunk.end - run[0].start > TOGETHER):
            yield run
            run = []
        run.append(chunk)
    if run:
        yield run


def _read_run(
    fd: int, file: Path, run: Sequence[Chunk], buffer: NDArray[np.uint8], check: bool, copy: bool
) -> Iterator[tuple[int, str]]:
    """Read neighbouring chunks, compare checksums, copy the parts to those who want them; (first byte, problem)."""
    start, size = run[0].start, run[-1].end - run[0].start
    direct = _direct(run[0]) if copy and len(run) == 1 else None
    data = buffer[:size] if direct is None else direct
    try:
        read = _read_all(fd, data.data, start)
    except OSError as error:
        yield start, f"{file}: bytes {start}.. of tensor {run[0].name} cannot be read ({error.strerror})"
        read = 0
    else:
        if read != size:
            yield start, f"{file}: the file ends inside tensor {run[0].name}"
    for chunk in run if read == size else ():
        part = data[chunk.start - start : chunk.end - start]
        if check and checksum(part.data) != chunk.sum:
            yield chunk.start, f"{file}: bytes {chunk.start}..{chunk.end} of tensor {chunk.name} are damaged"
            read = 0
        elif copy and direct is None:
            source = torch.from_numpy(part).view(getattr(torch, chunk.dtype)).view(chunk.shape)
            for shard, there, here in chunk.takers:
                _copy(shard.tensor, there, source[here])
    if direct is not None and read != size:
        direct[:] = 0


def _direct(chunk: Chunk) -> NDArray[np.uint8] | None:
    """The wanted memory itself, if the one taker wants the whole chunk and has it in the same form."""
    if len(chunk.takers) != 1:
        return None
    shard, there, _ = chunk.takers[0]
    if shard.tensor.device.type != "cpu" or str(shard.tensor.dtype) != f"torch.{chunk.dtype}":
        return None
    target = _box(shard.tensor, there)
    if target.shape != chunk.shape or not target.flags.c_contiguous:
        return None
    return target.reshape(-1).view(np.uint8)


def _box(tensor: Tensor, index: tuple[slice, ...]) -> NDArray[Any]:
    """A view of a CPU tensor's memory; an array for a tensor without dimensions, too."""
    whole: tuple[Any, ...] = (*index, ...)
    view: NDArray[Any] = integers(tensor)[whole]
    return view


def _copy(target: Tensor, there: tuple[slice, ...], source: Tensor) -> None:
    if target.device.type == "cpu" and target.dtype == source.dtype:
        # numpy: torch would start its own threads in each of ours.
        np.copyto(_box(target, there), integers(source))
    else:
        target.detach()[there].copy_(source)


def _read_all(fd: int, data: memoryview, start: int) -> int:
    """pread until ``data`` is full or the file ends; bytes read."""
    done = 0
    while done < len(data):
        count = os.preadv(fd, [data[done:]], start + done)
        if count == 0:
            break
        done += count
    return done


def stranger(file: Path, step: int) -> str:
    """ " (the file was written for step ...)" if a damaged file's own header says that it belongs to another save."""
    try:
        with os.fdopen(open_file(file), "rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(min(size, 16 << 20)))
        written = header["__metadata__"]["step"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""
    return f" (the file was written for step {written})" if str(written) != str(step) else ""
