"""The manifest of a checkpoint: which bytes of which file are which slice of which logical tensor.

A checkpoint is a folder ``step-00000100/`` with

- ``rank-00000-00000.safetensors`` ...: plain safetensors files, one or more per rank;
- ``meta.json``: the caller's own record (config, resolved scheme, consumed samples, seeds);
- ``manifest.json``: everything declared in this file; the SHA-256 of meta.json is among it;
- ``complete``: the SHA-256 of manifest.json in the format of ``sha256sum``, written last.

A slice is cut in chunks (``boxes``), and the manifest holds the XXH3 sum of each (64 bits; several times faster than
CRC-32, so that a verified load costs little more than reading). A rank's share of a flat optimizer state makes many small
slices, so they are written short: under the name of their file, each as [offset, shape, first byte, sums]. Manifests are
data from outside: every number is bounded and every file name checked before it is used. No torch here.
"""

import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import xxhash

FORMAT = "megnorm-checkpoint"
VERSION = 2
MANIFEST, META, COMPLETE = "manifest.json", "meta.json", "complete"
CHUNK_BYTES = 4 << 20
MAX_CHUNK_BYTES = 64 << 20
MAX_JSON_BYTES = 256 << 20
MAX_DIMS, MAX_DIM, MAX_BYTES = 8, 1 << 48, 1 << 62
MAX_COMPARISONS = 10_000_000

# name (torch's) -> (safetensors' name, bytes per element)
DTYPES: dict[str, tuple[str, int]] = {
    "float64": ("F64", 8), "float32": ("F32", 4), "float16": ("F16", 2), "bfloat16": ("BF16", 2),
    "int64": ("I64", 8), "int32": ("I32", 4), "int16": ("I16", 2), "int8": ("I8", 1),
    "uint8": ("U8", 1), "bool": ("BOOL", 1), "float8_e4m3fn": ("F8_E4M3", 1), "float8_e5m2": ("F8_E5M2", 1),
}  # fmt: skip

FILE_NAME = re.compile(r"rank-\d{5,8}-\d{5,8}\.safetensors")
TENSOR_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-/]{0,511}")
SUM = re.compile(r"[0-9a-f]{16}")

Ints = tuple[int, ...]


def checksum(data: bytes | memoryview) -> int:
    """XXH3 of some bytes, 64 bits."""
    return xxhash.xxh3_64_intdigest(data)


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or must not be read; one sentence with file, tensor and remedy."""


@dataclass(frozen=True, slots=True)
class Slice:
    """A box of a logical tensor at ``start`` (bytes) in a file, row-major; one sum per chunk of ``boxes``."""

    offset: Ints
    shape: Ints
    file: str
    start: int
    sums: Ints


@dataclass(frozen=True, slots=True)
class Record:
    """A logical tensor: its global shape, and the slices that cover it exactly once."""

    shape: Ints
    dtype: str
    slices: tuple[Slice, ...]

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype][1]


@dataclass(frozen=True, slots=True)
class File:
    """Length of a file and of its safetensors header (with its eight bytes of length), and the header's sum."""

    bytes: int
    header_bytes: int
    header_sum: int


@dataclass(frozen=True)
class Manifest:
    step: int
    world: int
    chunk_bytes: int
    meta_bytes: int
    meta_sha256: str
    files: Mapping[str, File]
    tensors: Mapping[str, Record]


def boxes(shape: Ints, itemsize: int, limit: int) -> Iterator[tuple[Ints, Ints]]:
    """(offset, shape) of the consecutive boxes of at most ``limit`` bytes into which a row-major array is cut.

    Each is contiguous in the array, so a box is both a range of bytes to read and check, and a box to copy from.
    """
    if 0 in shape:
        return
    if not shape:
        yield (), ()
        return
    dim, rows = _cut(shape, itemsize, limit)
    for outer in itertools.product(*(range(size) for size in shape[:dim])):
        for row in range(0, shape[dim], rows):
            yield (*outer, row, *(0,) * (len(shape) - dim - 1)), (
                *(1,) * dim, min(rows, shape[dim] - row), *shape[dim + 1 :]
            )  # fmt: skip


def box_count(shape: Ints, itemsize: int, limit: int) -> int:
    """How many ``boxes`` there are, without making them."""
    if not shape or 0 in shape:
        return 0 if shape else 1
    dim, rows = _cut(shape, itemsize, limit)
    return math.prod(shape[:dim]) * -(-shape[dim] // rows)


def _cut(shape: Ints, itemsize: int, limit: int) -> tuple[int, int]:
    """The outermost dimension whose rows fit in ``limit`` bytes, and how many of them do."""
    for dim in range(len(shape)):
        row = itemsize * math.prod(shape[dim + 1 :])
        if row <= limit or dim == len(shape) - 1:
            return dim, max(1, limit // row)
    raise AssertionError("a shape has a last dimension")


def intersect(a_offset: Ints, a_shape: Ints, b_offset: Ints, b_shape: Ints) -> tuple[Ints, Ints] | None:
    """The box that two boxes share, as (offset, shape); None if they do not meet."""
    low = tuple(map(max, a_offset, b_offset))
    high = tuple(min(ao + a, bo + b) for ao, a, bo, b in zip(a_offset, a_shape, b_offset, b_shape, strict=True))
    if any(h <= o for h, o in zip(high, low, strict=True)):
        return None
    return low, tuple(h - o for h, o in zip(high, low, strict=True))


def check_cover(name: str, record: Record, where: str) -> None:
    """Raise unless the slices cover the tensor exactly once."""
    slices = [piece for piece in record.slices if 0 not in piece.shape]
    if record.shape and len(slices) > 1:
        # Sweep along the dimension that separates best: only slices that meet there are compared.
        dim = max(range(len(record.shape)), key=lambda d: len({piece.offset[d] for piece in slices}))
        slices.sort(key=lambda piece: piece.offset[dim])
    else:
        dim = 0
    active: list[Slice] = []
    comparisons = 0
    for piece in slices:
        if piece.offset:
            active = [other for other in active if other.offset[dim] + other.shape[dim] > piece.offset[dim]]
        comparisons += len(active)
        if comparisons > MAX_COMPARISONS:
            raise CheckpointError(f"{where}: tensor {name} is cut in too many slices across several dimensions")
        for other in active:
            if intersect(piece.offset, piece.shape, other.offset, other.shape) is not None:
                raise CheckpointError(
                    f"{where}: tensor {name} is covered twice at offset {list(piece.offset)} "
                    f"({other.file} and {piece.file}); exactly one rank must own each slice"
                )
        active.append(piece)
    covered = sum(math.prod(piece.shape) for piece in slices)
    if covered != math.prod(record.shape):
        raise CheckpointError(
            f"{where}: the slices of tensor {name} cover {covered} of its {math.prod(record.shape)} elements; "
            "some rank did not pass its shard"
        )


# Writing ------------------------------------------------------------------------------------------------------------


def part_json(files: Mapping[str, File], tensors: Mapping[str, Record]) -> dict[str, Any]:
    """The part of the manifest that one rank knows, as JSON values."""
    return {
        "files": {
            name: {"bytes": f.bytes, "header_bytes": f.header_bytes, "header_sum": f"{f.header_sum:016x}"}
            for name, f in files.items()
        },
        "tensors": {
            name: {"shape": record.shape, "dtype": record.dtype, "slices": _slices_json(record)}
            for name, record in tensors.items()
        },
    }


def _slices_json(record: Record) -> dict[str, list[Any]]:
    slices: dict[str, list[Any]] = {}
    for piece in record.slices:
        row = [piece.offset, piece.shape, piece.start, [f"{one:016x}" for one in piece.sums]]
        slices.setdefault(piece.file, []).append(row)
    return slices


def dump(manifest: Manifest) -> bytes:
    head = {
        "format": FORMAT,
        "version": VERSION,
        "step": manifest.step,
        "world": manifest.world,
        "chunk_bytes": manifest.chunk_bytes,
        "meta": {"file": META, "bytes": manifest.meta_bytes, "sha256": manifest.meta_sha256},
    }
    return json.dumps(head | part_json(manifest.files, manifest.tensors), separators=(",", ":")).encode()


def merge(
    parts: Sequence[tuple[Mapping[str, File], Mapping[str, Record]]], where: str
) -> tuple[dict[str, File], dict[str, Record]]:
    """One map of files and one of tensors out of every rank's; raises unless each tensor is covered exactly once."""
    files: dict[str, File] = {}
    gathered: dict[str, list[Record]] = {}
    for part_files, part_tensors in parts:
        files |= part_files
        for name, record in part_tensors.items():
            gathered.setdefault(name, []).append(record)
    tensors = {}
    for name, records in gathered.items():
        first = records[0]
        for other in records:
            if (other.shape, other.dtype) != (first.shape, first.dtype):
                raise CheckpointError(
                    f"{where}: ranks disagree about tensor {name}: {list(first.shape)} {first.dtype} "
                    f"and {list(other.shape)} {other.dtype}"
                )
        tensors[name] = Record(first.shape, first.dtype, tuple(s for record in records for s in record.slices))
        check_cover(name, tensors[name], where)
    return files, tensors


# Reading ------------------------------------------------------------------------------------------------------------


def load_json(data: bytes, where: str) -> Any:
    """JSON of bounded size, without NaN; every way in which it can be broken is a CheckpointError."""
    if len(data) > MAX_JSON_BYTES:
        raise CheckpointError(f"{where} is larger than {MAX_JSON_BYTES >> 20} MiB; this is no file of megnorm's")

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(data.decode(), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not JSON ({error}); load another checkpoint") from error


def parse(data: bytes, where: str) -> Manifest:
    """The manifest in ``data``, with every value checked; ``where`` names it in errors."""
    check = Checker(where)
    root = check.mapping(load_json(data, where), "it")
    if root.get("format") != FORMAT:
        raise CheckpointError(f"{where} is not a manifest of megnorm's (format is {str(root.get('format'))[:40]!r})")
    if root.get("version") != VERSION:
        raise CheckpointError(
            f"{where} has version {str(root.get('version'))[:20]}, not {VERSION}; use the megnorm that wrote it"
        )
    meta = check.mapping(root.get("meta"), "meta")
    chunk_bytes = check.integer(root.get("chunk_bytes"), "chunk_bytes", MAX_CHUNK_BYTES, low=8)
    files, tensors = parse_part(root, chunk_bytes, where)
    return Manifest(
        step=check.integer(root.get("step"), "step", MAX_DIM),
        world=check.integer(root.get("world"), "world", 1 << 24, low=1),
        chunk_bytes=chunk_bytes,
        meta_bytes=check.integer(meta.get("bytes"), "meta.bytes", MAX_JSON_BYTES),
        meta_sha256=check.text(meta.get("sha256"), "meta.sha256", re.compile("[0-9a-f]{64}")),
        files=files,
        tensors=tensors,
    )


def parse_part(root: Mapping[str, Any], chunk_bytes: int, where: str) -> tuple[dict[str, File], dict[str, Record]]:
    """Files and tensors of a manifest, or of one rank's part of it."""
    check = Checker(where)
    files = {}
    for name, value in check.mapping(root.get("files"), "files").items():
        check.text(name, "a file name", FILE_NAME)
        entry = check.mapping(value, name)
        size = check.integer(entry.get("bytes"), f"{name}: bytes", MAX_BYTES)
        files[name] = File(
            bytes=size,
            header_bytes=check.integer(entry.get("header_bytes"), f"{name}: header_bytes", min(size, MAX_JSON_BYTES)),
            header_sum=int(check.text(entry.get("header_sum"), f"{name}: header_sum", SUM), 16),
        )
    tensors = {}
    for name, value in check.mapping(root.get("tensors"), "tensors").items():
        check.text(name, "a tensor name", TENSOR_NAME)
        entry = check.mapping(value, name)
        shape = check.integers(entry.get("shape"), f"{name}: shape", MAX_DIM, MAX_DIMS)
        dtype = entry.get("dtype")
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise CheckpointError(f"{where}: tensor {name} has dtype {str(dtype)[:40]!r}; known: {', '.join(DTYPES)}")
        itemsize = DTYPES[dtype][1]
        if math.prod(shape) * itemsize > MAX_BYTES:
            raise CheckpointError(f"{where}: tensor {name} of shape {list(shape)} is too large")
        slices: list[Slice] = []
        for file, rows in check.mapping(entry.get("slices"), f"{name}: slices").items():
            if file not in files:
                raise CheckpointError(f"{where}: {name}: file {file[:80]!r} is not among the checkpoint's files")
            for row in check.sequence(rows, f"{name}: slices"):
                slices.append(_slice(check, row, f"{name}: slices", shape, itemsize, chunk_bytes, file, files[file]))
        tensors[name] = Record(shape, dtype, tuple(slices))
    return files, tensors


def _slice(
    check: "Checker", value: Any, what: str, shape: Ints, itemsize: int, chunk_bytes: int, name: str, file: File
) -> Slice:
    row = check.sequence(value, what)
    if len(row) != 4:
        raise CheckpointError(f"{check.where}: {what}: a slice has {len(row)} values instead of 4")
    offset = check.integers(row[0], f"{what}: offset", MAX_DIM, MAX_DIMS)
    local = check.integers(row[1], f"{what}: shape", MAX_DIM, MAX_DIMS)
    if not len(offset) == len(local) == len(shape) or any(
        o + n > size for o, n, size in zip(offset, local, shape, strict=True)
    ):
        raise CheckpointError(f"{check.where}: {what}: {list(local)} at {list(offset)} is not inside {list(shape)}")
    size = math.prod(local) * itemsize
    start = check.integer(row[2], f"{what}: first byte", MAX_BYTES, low=file.header_bytes)
    if start + size > file.bytes:
        raise CheckpointError(f"{check.where}: {what}: bytes {start}..{start + size} are not inside {name}")
    sums = check.sequence(row[3], f"{what}: sums")
    if len(sums) != box_count(local, itemsize, chunk_bytes):
        raise CheckpointError(f"{check.where}: {what}: {len(sums)} sums for {size} bytes")
    return Slice(offset, local, name, start, tuple(int(check.text(one, f"{what}: sums", SUM), 16) for one in sums))


@dataclass(frozen=True)
class Checker:
    """Types and bounds of JSON values; ``where`` is the file they come from."""

    where: str

    def mapping(self, value: Any, what: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise CheckpointError(f"{self.where}: {what} must be an object")
        return value

    def sequence(self, value: Any, what: str) -> list[Any]:
        if not isinstance(value, list):
            raise CheckpointError(f"{self.where}: {what} must be a list")
        return value

    def integer(self, value: Any, what: str, high: int, low: int = 0) -> int:
        if type(value) is not int or not low <= value <= high:
            raise CheckpointError(f"{self.where}: {what} is {str(value)[:40]}, not an integer in {low}..{high}")
        return value

    def integers(self, value: Any, what: str, high: int, most: int | None) -> Ints:
        values = self.sequence(value, what)
        if most is not None and len(values) > most:
            raise CheckpointError(f"{self.where}: {what} has {len(values)} values; at most {most} are known")
        return tuple(self.integer(item, what, high) for item in values)

    def text(self, value: Any, what: str, pattern: re.Pattern[str]) -> str:
        if not isinstance(value, str) or not pattern.fullmatch(value):
            raise CheckpointError(f"{self.where}: {what} is {str(value)[:80]!r}, which megnorm never writes")
        return value
