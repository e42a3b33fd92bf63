"""PREFIX.meta.json: a checksum of every chunk of PREFIX.bin and PREFIX.idx, and what is known of their content."""

import json
import zlib
from collections.abc import Mapping
from typing import Any

from megnorm.data.atomic import write_atomic
from megnorm.data.errors import DataError
from megnorm.data.storage import Stored, find, pieces, require_local

CHUNK = 16 << 20  # bytes
SUFFIX = ".meta.json"
LARGEST = 256 << 20  # bytes of a sidecar, and of a chunk


class Summer:
    """CRC-32 of every CHUNK bytes of a stream."""

    def __init__(self, chunk: int = CHUNK) -> None:
        self.chunk, self.size, self.current, self.sums = chunk, 0, 0, list[int]()

    def update(self, content: bytes) -> None:
        view = memoryview(content)
        while len(view):
            room = self.chunk - self.size % self.chunk
            part = view[:room]
            self.current = zlib.crc32(part, self.current)
            self.size += len(part)
            view = view[room:]
            if self.size % self.chunk == 0:
                self.sums.append(self.current)
                self.current = 0

    def digest(self) -> list[str]:
        tail = [self.current] if self.size % self.chunk else []
        return [f"{value:08x}" for value in self.sums + tail]


def write_sidecar(prefix: str, sums: Mapping[str, Summer], notes: Mapping[str, Any]) -> None:
    """Write PREFIX.meta.json; sums has the keys bin and idx."""
    files = {name: {"bytes": s.size, "crc32": s.digest()} for name, s in sums.items()}
    record = {"format": 1, "chunk_bytes": CHUNK, "files": files, **notes}
    write_atomic(prefix + SUFFIX, json.dumps(record, indent=1).encode())


def read_sidecar(prefix: str) -> dict[str, Any] | None:
    """The record beside a data set; None where there is none (data written by other tools)."""
    path = prefix + SUFFIX
    file = find(path)
    if file is None:
        return None
    if file.size > LARGEST:
        raise DataError(f"{path}: has {file.size} bytes, which no record of checksums has; delete it.")
    content = file.read(0, file.size)
    try:
        record: dict[str, Any] = json.loads(content)
        if record["format"] != 1 or not isinstance(record["files"], dict):
            raise ValueError("unknown format")
        if not isinstance(record["chunk_bytes"], int) or not 1 <= record["chunk_bytes"] <= LARGEST:
            raise ValueError("no chunk size")
        for name in ("bin", "idx"):
            entry = record["files"][name]
            if not isinstance(entry["bytes"], int) or not isinstance(entry["crc32"], list):
                raise ValueError("no byte counts or checksums")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"{path}: not a record of checksums ({error}); delete it and run megnorm data verify --write."
        ) from None
    return record


def verify(prefix: str) -> int:
    """Compare both files with their checksums; returns the number of chunks compared."""
    record = read_sidecar(prefix)
    if record is None:
        raise DataError(f"{prefix}{SUFFIX} not found: there are no checksums; megnorm data verify --write makes them.")
    count, chunk = 0, int(record["chunk_bytes"])
    for name in ("idx", "bin"):
        path, entry = f"{prefix}.{name}", record["files"][name]
        file = _open(path)
        if file.size != entry["bytes"]:
            raise DataError(f"{path}: has {file.size} bytes, {entry['bytes']} were written; copy it again.")
        if len(entry["crc32"]) != -(-file.size // chunk):
            raise DataError(f"{prefix}{SUFFIX}: has not as many checksums as {path} has chunks; copy it again.")
        for place, (part, wanted) in enumerate(zip(pieces(file, chunk), entry["crc32"], strict=True)):
            if f"{zlib.crc32(part):08x}" != wanted:
                raise DataError(
                    f"{path}: bytes from {place * chunk} on differ from what was written; copy the file again."
                )
            count += 1
    return count


def sum_files(prefix: str) -> dict[str, Summer]:
    """Checksums of the files as they are now."""
    require_local(prefix)
    sums = {}
    for name in ("bin", "idx"):
        sums[name] = Summer()
        for part in pieces(_open(f"{prefix}.{name}"), CHUNK):
            sums[name].update(part)
    return sums


def _open(path: str) -> Stored:
    file = find(path)
    if file is None:
        raise DataError(f"{path} not found: copy the data again.")
    return file
