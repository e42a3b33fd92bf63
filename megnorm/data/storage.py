"""Files by path: on a local disk, or in an object store by an address such as s3://bucket/name (fsspec, extra "remote").

Object stores are read only: whole (.idx, .meta.json) or by ranges (.bin). Writing goes to a local disk.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from megnorm.data.errors import DataError


class Stored(Protocol):
    """A file that is there. size: bytes. stamp: changes when its content does. read: bytes from start on."""

    size: int
    stamp: str

    def read(self, start: int, count: int) -> bytes: ...
    def read_many(self, starts: Sequence[int], counts: Sequence[int]) -> list[bytes]: ...


def is_remote(path: str | Path) -> bool:
    """Is this an address of an object store, such as s3://bucket/name?"""
    return "://" in str(path)


def require_local(path: str | Path) -> None:
    """Refuse to write to an object store."""
    if is_remote(path):
        raise DataError(f"{path}: object stores are only read: write to a local disk and copy the files there.")


def find(path: str | Path) -> Stored | None:
    """The file of a path; None where there is none."""
    if is_remote(path):
        return Remote.find(str(path))
    return Local(Path(path)) if Path(path).is_file() else None


def pieces(file: Stored, size: int) -> Iterator[bytes]:
    """The whole content, ``size`` bytes at a time."""
    for start in range(0, file.size, size):
        yield file.read(start, min(size, file.size - start))


class Local:
    """A file on a disk."""

    def __init__(self, path: Path) -> None:
        state = path.stat()
        self.path, self.size, self.stamp = path, state.st_size, str(state.st_mtime_ns)
        self._handle: int | None = None

    def read(self, start: int, count: int) -> bytes:
        if self._handle is None:
            self._handle = os.open(self.path, os.O_RDONLY)
        parts: list[bytes] = []
        while count > 0 and (part := os.pread(self._handle, count, start)):  # one call gives 2 GB at most
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return _whole(b"".join(parts), count, self.path)

    def read_many(self, starts: Sequence[int], counts: Sequence[int]) -> list[bytes]:
        return [self.read(start, count) for start, count in zip(starts, counts, strict=True)]

    def __del__(self) -> None:
        if self._handle is not None:
            os.close(self._handle)


class Remote:
    """A file of an object store; many ranges are asked for at once, since each waits for the network."""

    def __init__(self, address: str, system: Any, path: str, info: dict[str, Any]) -> None:
        self.address, self.system, self.path = address, system, path
        self.size = int(info["size"])
        marks = (info.get(name) for name in ("ETag", "etag", "md5Hash", "LastModified", "mtime", "created"))
        self.stamp = str(next((mark for mark in marks if mark is not None), ""))

    @staticmethod
    def find(address: str) -> "Remote | None":
        try:
            import fsspec
        except ImportError:
            raise DataError(f"{address}: object stores need the extra: pip install megnorm[remote].") from None
        try:
            system, path = fsspec.core.url_to_fs(address)
            info = system.info(path)
        except FileNotFoundError:
            return None
        except ImportError as error:
            raise DataError(f"{address}: this kind of store needs its own package ({error}).") from None
        except (ValueError, OSError) as error:
            raise DataError(f"{address}: cannot be reached ({error}).") from None
        return Remote(address, system, path, info) if info["type"] == "file" else None

    def read(self, start: int, count: int) -> bytes:
        return self.read_many([start], [count])[0]

    def read_many(self, starts: Sequence[int], counts: Sequence[int]) -> list[bytes]:
        wanted = [(start, start + count) for start, count in zip(starts, counts, strict=True) if count]
        first, last = ([pair[side] for pair in wanted] for side in (0, 1))
        try:
            found = iter(self.system.cat_ranges([self.path] * len(wanted), first, last, on_error="raise"))
        except OSError as error:
            raise DataError(f"{self.address}: cannot be read ({error}).") from None
        parts = [bytes(next(found)) if count else b"" for count in counts]
        return [_whole(part, count - len(part), self.address) for part, count in zip(parts, counts, strict=True)]


def _whole(content: bytes, missing: int, path: str | Path) -> bytes:
    if missing:
        raise DataError(f"{path}: became shorter while it was read; nobody may write to it during a run.")
    return content
