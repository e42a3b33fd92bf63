"""Which chunks of which files a load must read, and what is taken from each."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megnorm.checkpoint.format import CheckpointError, Ints, Manifest, Record, Slice, boxes, check_cover, intersect
from megnorm.checkpoint.shard import Shard, dtype_name, region


@dataclass
class Chunk:
    """A checked unit of a file: a box of a tensor, and the wanted shards that take a part of it."""

    name: str
    offset: Ints
    shape: Ints
    start: int
    bytes: int
    sum: int
    dtype: str
    takers: list[tuple[Shard, tuple[slice, ...], tuple[slice, ...]]] = field(default_factory=list)

    @property
    def end(self) -> int:
        return self.start + self.bytes


Plan = dict[str, list[Chunk]]  # file -> chunks in file order


def missing(path: Path, name: str) -> CheckpointError:
    return CheckpointError(
        f"{path} has no tensor {name}; the model differs from the one that was saved "
        "(`megnorm checkpoint inspect` lists what there is)"
    )


def plan_wanted(path: Path, manifest: Manifest, wanted: Sequence[Shard], convert: bool) -> Plan:
    """The chunks to read, each with what is taken from it; raises for all that cannot fit."""
    chunks: dict[tuple[str, int], Chunk] = {}
    finders: dict[str, Callable[[Shard], Iterator[Slice]]] = {}
    for shard in wanted:
        shard.check()
        record = manifest.tensors.get(shard.name)
        if record is None:
            raise missing(path, shard.name)
        _check_fit(path, shard, record, convert)
        if shard.name not in finders:
            check_cover(shard.name, record, str(path / "manifest.json"))
            finders[shard.name] = _finder(record)
        for piece in finders[shard.name](shard):
            for chunk in _cut(manifest, shard.name, record, piece):
                shared = intersect(shard.offset, shard.local, chunk.offset, chunk.shape)
                if shared is not None:
                    chunk = chunks.setdefault((piece.file, chunk.start), chunk)
                    chunk.takers.append((shard, region(*shared, shard.offset), region(*shared, chunk.offset)))
    plan: Plan = {}
    for (file, _), chunk in sorted(chunks.items(), key=lambda item: item[0]):
        plan.setdefault(file, []).append(chunk)
    return plan


def plan_all(manifest: Manifest) -> Plan:
    """All chunks of all tensors."""
    plan: Plan = {}
    for name, record in manifest.tensors.items():
        for piece in record.slices:
            plan.setdefault(piece.file, []).extend(_cut(manifest, name, record, piece))
    for chunks in plan.values():
        chunks.sort(key=lambda chunk: chunk.start)
    return plan


def _finder(record: Record) -> Callable[[Shard], Iterator[Slice]]:
    """The saved slices that meet a shard. In numpy, since both may be thousands: a share of a flat optimizer state."""
    count, dims = len(record.slices), len(record.shape)
    starts = np.array([piece.offset for piece in record.slices], dtype=np.int64).reshape(count, dims).T.copy()
    stops = np.array([piece.shape for piece in record.slices], dtype=np.int64).reshape(count, dims).T + starts
    filled = (stops > starts).all(0)

    def find(shard: Shard) -> Iterator[Slice]:
        if 0 in shard.local:
            return
        meet = filled.copy()
        for dim, (low, size) in enumerate(zip(shard.offset, shard.local, strict=True)):
            meet &= starts[dim] < low + size
            meet &= stops[dim] > low
        for i in np.flatnonzero(meet):
            yield record.slices[i]

    return find


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


def _cut(manifest: Manifest, name: str, record: Record, piece: Slice) -> Iterator[Chunk]:
    """The chunks of a slice."""
    start = piece.start
    cut = boxes(piece.shape, record.itemsize, manifest.chunk_bytes)
    for (offset, shape), wanted in zip(cut, piece.sums, strict=True):
        size = math.prod(shape) * record.itemsize
        place = tuple(a + b for a, b in zip(piece.offset, offset, strict=True))
        yield Chunk(name, place, shape, start, size, wanted, record.dtype)
        start += size
