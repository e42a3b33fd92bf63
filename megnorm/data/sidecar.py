"""PREFIX.meta.json: a checksum of every chunk of PREFIX.bin and PREFIX.idx, and what is known of their content."""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megnorm.data.atomic import write_atomic
from megnorm.data.errors import DataError

CHUNK = 16 << 20  # bytes
SUFFIX = ".meta.json"


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
    path = Path(prefix + SUFFIX)
    if not path.is_file():
        return None
    try:
        record: dict[str, Any] = json.loads(path.read_bytes())
        if record["format"] != 1 or not isinstance(record["files"], dict):
            raise ValueError("unknown format")
        for name in ("bin", "idx"):
            if not isinstance(record["files"][name]["bytes"], int):
                raise ValueError("no byte counts")
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
    count = 0
    for name in ("idx", "bin"):
        path, entry = Path(f"{prefix}.{name}"), record["files"][name]
        found = path.stat().st_size
        if found != entry["bytes"]:
            raise DataError(f"{path}: has {found} bytes, {entry['bytes']} were written; copy it again.")
        with open(path, "rb") as file:
            for place, wanted in enumerate(entry["crc32"]):
                start = place * record["chunk_bytes"]
                if f"{zlib.crc32(file.read(record['chunk_bytes'])):08x}" != wanted:
                    raise DataError(f"{path}: bytes from {start} on differ from what was written; copy the file again.")
                count += 1
            if file.read(1):
                raise DataError(
                    f"{prefix}{SUFFIX}: lacks checksums for the end of {path}; run megnorm data verify --write."
                )
    return count


def sum_files(prefix: str) -> dict[str, Summer]:
    """Checksums of the files as they are now."""
    sums = {}
    for name in ("bin", "idx"):
        sums[name] = Summer()
        with open(f"{prefix}.{name}", "rb") as file:
            while content := file.read(CHUNK):
                sums[name].update(content)
    return sums
