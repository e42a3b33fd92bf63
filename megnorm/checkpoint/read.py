"""Read tensors out of a checkpoint: any slices, written in any layout; no byte is used before its checksum is right."""

import json
import math
import os
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megnorm.checkpoint.folder import open_file, read_manifest, read_meta_bytes
from megnorm.checkpoint.format import (
    CheckpointError,
    Ints,
    Manifest,
    Record,
    boxes,
    check_cover,
    intersect,
    load_json,
)
from megnorm.checkpoint.shard import Shard, dtype_name, integers, region, run_parallel

BATCH_BYTES = 8 << 20
MAX_REPORTED = 3
THREADS = 4


@dataclass
class _Chunk:
    """A checked unit of a file: a box of a tensor, and the wanted shards that take a part of it."""

    name: str
    offset: Ints
    shape: Ints
    start: int
    bytes: int
    crc32: int
    dtype: str
    takers: list[tuple[Shard, tuple[slice, ...], tuple[slice, ...]]] = field(default_factory=list)


def load(
    path: Path, wanted: Sequence[Shard], *, verify: bool = True, convert: bool = False, threads: int = THREADS,
    untouched: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Fill each wanted shard's tensor in place from whichever saved slices meet it; the checkpoint's meta.

    convert: allow another dtype than the saved one. verify: compare checksums of all that is read.
    untouched: check everything first, and only then change the first tensor (reads twice, the second time from the page
    cache). Otherwise each chunk is copied as soon as it is right: still no unchecked byte gets into a tensor, but after
    an error some tensors are filled and others are not, so the caller must load another checkpoint or stop.

    Raises CheckpointError, naming file and tensor, for a damaged, torn or missing file, a missing tensor, other shapes
    or dtypes.
    """
    path = Path(path)
    manifest, _ = read_manifest(path)
    meta = _meta(path, manifest)
    plan = _plan(path, manifest, wanted, convert)
    _check_files(path, manifest, plan, verify)
    if verify and untouched:
        _run(path, manifest, plan, threads, check=True, copy=False)
        _run(path, manifest, plan, threads, check=False, copy=True)
    else:
        _run(path, manifest, plan, threads, check=verify, copy=True)
    return meta


def read_meta(path: Path) -> dict[str, Any]:
    """The caller's record of a checkpoint, its checksum compared."""
    path = Path(path)
    return _meta(path, read_manifest(path)[0])


def _meta(path: Path, manifest: Manifest) -> dict[str, Any]:
    meta = load_json(read_meta_bytes(path, manifest), str(path / "meta.json"))
    if not isinstance(meta, dict):
        raise CheckpointError(f"{path / 'meta.json'} must hold an object; load another checkpoint")
    return meta


def available(path: Path) -> dict[str, tuple[int, ...]]:
    """Logical tensor name -> global shape."""
    return {name: record.shape for name, record in read_manifest(Path(path))[0].tensors.items()}


def read_full(path: Path, names: Iterable[str], *, verify: bool = True) -> dict[str, Tensor]:
    """Whole logical tensors, on the CPU in their saved dtypes."""
    tensors = read_manifest(Path(path))[0].tensors
    full = {}
    for name in names:
        if name not in tensors:
            raise _missing(Path(path), name)
        full[name] = torch.empty(tensors[name].shape, dtype=getattr(torch, tensors[name].dtype))
    load(path, [Shard.whole(name, tensor) for name, tensor in full.items()], verify=verify, untouched=False)
    return full


def verify(path: Path, *, threads: int = THREADS) -> list[str]:
    """Check every byte of a checkpoint; the problems found, one sentence each (none: it is whole)."""
    path = Path(path)
    try:
        manifest, _ = read_manifest(path)
        _meta(path, manifest)
    except CheckpointError as error:
        return [str(error)]
    problems: list[str] = []
    for name, record in manifest.tensors.items():
        _note(problems, partial(check_cover, name, record, str(path / "manifest.json")))
    good: dict[str, list[_Chunk]] = {}
    plan = _chunks(manifest)
    for name in manifest.files:
        if _note(problems, partial(_check_header, path, name, manifest)):
            good[name] = plan.get(name, [])
    return problems + _run(path, manifest, good, threads, check=True, copy=False, collect=True)


def _note(problems: list[str], check: Callable[[], None]) -> bool:
    try:
        check()
    except CheckpointError as error:
        problems.append(str(error))
        return False
    return True


def _check_header(path: Path, name: str, manifest: Manifest) -> None:
    file = manifest.files[name]
    fd = open_file(path / name, file.bytes)
    with os.fdopen(fd, "rb") as stream:
        if zlib.crc32(stream.read(file.header_bytes)) != file.header_crc32:
            raise CheckpointError(f"{path / name}: the header is damaged{_stranger(path / name, manifest.step)}")


# Planning -----------------------------------------------------------------------------------------------------------


def _missing(path: Path, name: str) -> CheckpointError:
    return CheckpointError(
        f"{path} has no tensor {name}; the model differs from the one that was saved "
        "(`megnorm checkpoint inspect` lists what there is)"
    )


def _plan(path: Path, manifest: Manifest, wanted: Sequence[Shard], convert: bool) -> dict[str, list[_Chunk]]:
    """file -> the chunks to read, in file order, each with what is taken from it; raises for all that cannot fit."""
    chunks: dict[tuple[str, int], _Chunk] = {}
    checked: set[str] = set()
    for shard in wanted:
        shard.check()
        record = manifest.tensors.get(shard.name)
        if record is None:
            raise _missing(path, shard.name)
        _check_fit(path, shard, record, convert)
        if shard.name not in checked:
            check_cover(shard.name, record, str(path / "manifest.json"))
            checked.add(shard.name)
        for piece in record.slices:
            if intersect(shard.offset, shard.local, piece.offset, piece.shape) is None:
                continue
            for file, chunk in _piece_chunks(manifest, shard.name, record, piece):
                shared = intersect(shard.offset, shard.local, chunk.offset, chunk.shape)
                if shared is not None:
                    chunk = chunks.setdefault((file, chunk.start), chunk)
                    chunk.takers.append((shard, region(*shared, shard.offset), region(*shared, chunk.offset)))
    plan: dict[str, list[_Chunk]] = {}
    for (file, _), chunk in sorted(chunks.items(), key=lambda item: item[0]):
        plan.setdefault(file, []).append(chunk)
    return plan


def _check_fit(path: Path, shard: Shard, record: Record, convert: bool) -> None:
    if shard.shape != record.shape:
        raise CheckpointError(
            f"{path}: tensor {shard.name} has shape {list(record.shape)} in the checkpoint and {list(shard.shape)} "
            "in the model; use the model settings in the checkpoint's meta.json"
        )
    dtype = dtype_name(shard.tensor.dtype, shard.name)
    if dtype != record.dtype and not convert:
        raise CheckpointError(
            f"{path}: tensor {shard.name} is {record.dtype} in the checkpoint and {dtype} in the model; "
            "use the precision it was saved with, or ask for a conversion"
        )


def _chunks(manifest: Manifest) -> dict[str, list[_Chunk]]:
    """file -> all chunks of all tensors, in file order."""
    plan: dict[str, list[_Chunk]] = {}
    for name, record in manifest.tensors.items():
        for piece in record.slices:
            for file, chunk in _piece_chunks(manifest, name, record, piece):
                plan.setdefault(file, []).append(chunk)
    for chunks in plan.values():
        chunks.sort(key=lambda chunk: chunk.start)
    return plan


def _piece_chunks(manifest: Manifest, name: str, record: Record, piece: Any) -> Iterator[tuple[str, _Chunk]]:
    start = piece.start
    cut = boxes(piece.shape, record.itemsize, manifest.chunk_bytes)
    for (offset, shape), crc32 in zip(cut, piece.crc32, strict=True):
        size = math.prod(shape) * record.itemsize
        place = tuple(a + b for a, b in zip(piece.offset, offset, strict=True))
        yield piece.file, _Chunk(name, place, shape, start, size, crc32, record.dtype)
        start += size


def _check_files(path: Path, manifest: Manifest, plan: dict[str, list[_Chunk]], verify: bool) -> None:
    """Missing and torn files are found before anything is read, and damaged headers, though nothing here needs them."""
    for file, chunks in plan.items():
        try:
            if verify:
                _check_header(path, file, manifest)
            else:
                os.close(open_file(path / file, manifest.files[file].bytes))
        except CheckpointError as error:
            raise CheckpointError(f"{error} (it holds tensor {chunks[0].name})") from error


# Reading ------------------------------------------------------------------------------------------------------------


def _run(
    path: Path, manifest: Manifest, plan: dict[str, list[_Chunk]], threads: int, *, check: bool, copy: bool,
    collect: bool = False,
) -> list[str]:  # fmt: skip
    """Read all chunks in several threads. All that is damaged is found; raises, or returns it if ``collect``."""
    problems: list[tuple[str, int, str]] = []
    local = threading.local()

    def read(file: str, batch: list[_Chunk]) -> None:
        if not hasattr(local, "buffer"):
            local.buffer = np.empty(manifest.chunk_bytes, dtype=np.uint8)
        fd = open_file(path / file, manifest.files[file].bytes)
        try:
            for chunk in batch:
                problem = _read_chunk(fd, path / file, chunk, local.buffer, check, copy)
                if problem is not None:
                    problems.append((file, chunk.start, problem))
        finally:
            os.close(fd)

    run_parallel((partial(read, file, batch) for file, batch in _batches(plan)), threads)
    problems.sort()
    sentences = [sentence + _stranger(path / file, manifest.step) for file, _, sentence in problems]
    if sentences and not collect:
        more = len(sentences) - MAX_REPORTED
        text = "; ".join(sentences[:MAX_REPORTED]) + (f"; and {more} more" if more > 0 else "")
        raise CheckpointError(f"{text}: restore the file from a copy, or load an earlier checkpoint")
    return sentences


def _batches(plan: dict[str, list[_Chunk]]) -> Iterator[tuple[str, list[_Chunk]]]:
    """Neighbouring chunks of one file, so that small tensors do not open it once each."""
    for file, chunks in plan.items():
        batch: list[_Chunk] = []
        size = 0
        for chunk in chunks:
            if batch and size + chunk.bytes > BATCH_BYTES:
                yield file, batch
                batch, size = [], 0
            batch.append(chunk)
            size += chunk.bytes
        if batch:
            yield file, batch


def _read_chunk(
    fd: int, file: Path, chunk: _Chunk, buffer: np.ndarray[Any, Any], check: bool, copy: bool
) -> str | None:
    """Read one chunk, compare its checksum, copy its parts to those who want them; a problem, or None."""
    direct = None if check else _direct(chunk)
    data = buffer[: chunk.bytes] if direct is None else direct
    try:
        read = _read_all(fd, data.data, chunk.start)
    except OSError as error:
        return f"{file}: bytes {chunk.start}.. of tensor {chunk.name} cannot be read ({error.strerror})"
    if read != chunk.bytes:
        return f"{file}: the file ends inside tensor {chunk.name}"
    if check and zlib.crc32(data.data) != chunk.crc32:
        return f"{file}: bytes {chunk.start}..{chunk.start + chunk.bytes} of tensor {chunk.name} are damaged"
    if copy and direct is None:
        source = torch.from_numpy(data).view(getattr(torch, chunk.dtype)).view(chunk.shape)
        for shard, there, here in chunk.takers:
            _copy(shard.tensor, there, source[here])
    return None


def _direct(chunk: _Chunk) -> np.ndarray[Any, Any] | None:
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


def _box(tensor: Tensor, index: tuple[slice, ...]) -> np.ndarray[Any, Any]:
    """A view of a CPU tensor's memory; an array for a tensor without dimensions, too."""
    whole: tuple[Any, ...] = (*index, ...)
    view: np.ndarray[Any, Any] = integers(tensor)[whole]
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


def _stranger(file: Path, step: int) -> str:
    """ " (the file was written for step ...)" if a damaged file's own header says that it belongs to another save."""
    try:
        with os.fdopen(open_file(file), "rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(min(size, 16 << 20)))
        written = header["__metadata__"]["step"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""
    return f" (the file was written for step {written})" if str(written) != str(step) else ""
