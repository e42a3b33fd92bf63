"""Write the shards of one rank to safetensors files, checksums taken on the way."""

import errno
import json
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from megnorm.checkpoint.format import DTYPES, CheckpointError, File, Ints, Record, Slice, boxes, checksum
from megnorm.checkpoint.shard import Shard, dtype_name, flat_bytes, region, run_parallel


@dataclass
class _Piece:
    """A box of a shard that goes to one file; ``start`` counts from the file's first byte."""

    name: str
    dtype: str
    shard: Shard
    offset: Ints
    shape: Ints
    bytes: int
    start: int = 0
    sums: list[int] = field(default_factory=list)


@dataclass
class _Output:
    """A file being written; the thread that finishes its last chunk makes it durable and closes it."""

    path: Path
    pieces: list[_Piece]
    header: bytes = b""
    fd: int = -1
    left: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def bytes(self) -> int:
        return len(self.header) + sum(piece.bytes for piece in self.pieces)

    def done(self, chunks: int) -> None:
        with self.lock:
            self.left -= chunks
            last = self.left == 0
        if last:
            os.fsync(self.fd)
            self.close()

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


def write_shards(
    folder: Path, shards: Sequence[Shard], *, rank: int, step: int, chunk_bytes: int, max_file_bytes: int, threads: int
) -> tuple[dict[str, File], dict[str, Record]]:
    """Write ``shards`` to new files in ``folder``, durable on return; the files and tensors for the manifest.

    Chunks are summed and written in ``threads`` threads (both release the interpreter's lock), small ones together; a
    file is flushed to the disk while the next is written. Errors are OSErrors of the disk, or CheckpointErrors about a
    shard.
    """
    kinds: dict[str, tuple[Ints, str]] = {}
    for shard in shards:
        shard.check()
        kind = (shard.shape, dtype_name(shard.tensor.dtype, shard.name))
        if kinds.setdefault(shard.name, kind) != kind:
            raise CheckpointError(f"shards of tensor {shard.name} disagree: {kinds[shard.name]} and {kind}")
    outputs = _plan(folder, shards, rank, step, max_file_bytes)
    _check_space(folder, sum(output.bytes for output in outputs))
    try:
        run_parallel(_jobs(outputs, chunk_bytes), threads)
    finally:
        for output in outputs:
            output.close()
    files = {output.path.name: File(output.bytes, len(output.header), checksum(output.header)) for output in outputs}
    slices: dict[str, list[Slice]] = {name: [] for name in kinds}
    for output in outputs:
        for p in output.pieces:
            slices[p.name].append(Slice(p.offset, p.shape, output.path.name, p.start, tuple(p.sums)))
    return files, {name: Record(*kinds[name], tuple(slices[name])) for name in slices}


def _plan(folder: Path, shards: Sequence[Shard], rank: int, step: int, max_file_bytes: int) -> list[_Output]:
    """Which piece goes where. Wide elements first, so that every tensor is aligned to its own element size."""
    outputs: list[_Output] = []
    filled = max_file_bytes
    for shard in sorted(shards, key=lambda shard: -shard.tensor.element_size()):
        dtype = dtype_name(shard.tensor.dtype, shard.name)
        for offset, shape in boxes(shard.local, DTYPES[dtype][1], max_file_bytes):
            size = DTYPES[dtype][1] * math.prod(shape)
            if filled + size > max_file_bytes:
                path = folder / f"rank-{rank:05d}-{len(outputs):05d}.safetensors"
                outputs.append(_Output(path, []))
                filled = 0
            filled += size
            place = tuple(a + b for a, b in zip(shard.offset, offset, strict=True))
            outputs[-1].pieces.append(_Piece(shard.name, dtype, shard, place, shape, size))
    for output in outputs:
        output.header = _header(output.pieces, step, rank)
        start = len(output.header)
        for piece in output.pieces:
            piece.start = start
            start += piece.bytes
    return outputs


def _header(pieces: Sequence[_Piece], step: int, rank: int) -> bytes:
    """A safetensors header; a slice that is not the whole tensor is called ``name@offset``."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt", "step": str(step), "rank": str(rank)}}
    end = 0
    for piece in pieces:
        key = piece.name if piece.shape == piece.shard.shape else f"{piece.name}@{','.join(map(str, piece.offset))}"
        if key in entries:
            raise CheckpointError(f"tensor {piece.name} is passed twice at offset {list(piece.offset)} by one rank")
        begin, end = end, end + piece.bytes
        entries[key] = {"dtype": DTYPES[piece.dtype][0], "shape": list(piece.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


@dataclass
class _Chunk:
    """Consecutive bytes of a piece: chunk ``index`` of it."""

    piece: _Piece
    index: int
    data: memoryview


def _jobs(outputs: Sequence[_Output], chunk_bytes: int) -> Iterator[Callable[[], None]]:
    """One job per batch of chunks. Lazy: pieces on other devices or with gaps are copied to CPU memory one at a time."""
    for output in outputs:
        layouts = [list(boxes(piece.shape, DTYPES[piece.dtype][1], chunk_bytes)) for piece in output.pieces]
        output.left = 1 + sum(map(len, layouts))
        output.fd = os.open(output.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        yield partial(_write_header, output)
        batch: list[_Chunk] = []
        size, start = 0, len(output.header)
        for chunk in _chunks(output, layouts):
            if batch and size + len(chunk.data) > chunk_bytes:
                yield partial(_write_batch, output, batch, start)
                batch, size, start = [], 0, start + size
            batch.append(chunk)
            size += len(chunk.data)
        if batch:
            yield partial(_write_batch, output, batch, start)


def _chunks(output: _Output, layouts: Sequence[Sequence[tuple[Ints, Ints]]]) -> Iterator[_Chunk]:
    """All chunks of a file, in its order and without gaps."""
    for piece, layout in zip(output.pieces, layouts, strict=True):
        piece.sums = [0] * len(layout)
        data = flat_bytes(piece.shard.tensor[region(piece.offset, piece.shape, piece.shard.offset)])
        begin = 0
        for index, (_, shape) in enumerate(layout):
            end = begin + DTYPES[piece.dtype][1] * math.prod(shape)
            yield _Chunk(piece, index, data[begin:end])
            begin = end


def _write_header(output: _Output) -> None:
    write_all(output.fd, memoryview(output.header), 0)
    output.done(1)


def _write_batch(output: _Output, batch: Sequence[_Chunk], start: int) -> None:
    for chunk in batch:
        chunk.piece.sums[chunk.index] = checksum(chunk.data)
    # tensors may be cut in thousands of boxes of some bytes each: one call writes what lies together
    data = batch[0].data if len(batch) == 1 else memoryview(b"".join(chunk.data for chunk in batch))
    write_all(output.fd, data, start)
    output.done(len(batch))


def write_all(fd: int, data: memoryview, start: int) -> None:
    """pwrite until everything is written."""
    while data:
        written = os.pwrite(fd, data, start)
        data, start = data[written:], start + written


def _check_space(folder: Path, size: int) -> None:
    """Fail at once rather than after minutes of writing; a disk that others fill meanwhile fails later all the same."""
    disk = os.statvfs(folder)
    free = disk.f_bavail * disk.f_frsize
    if disk.f_blocks and size > free:
        raise OSError(errno.ENOSPC, f"{size / 1e6:.0f} MB to write, {free / 1e6:.0f} MB free", str(folder))
