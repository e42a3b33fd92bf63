"""Documents out of JSONL files: units of work, lines, and what is done with bad ones."""

import bz2
import glob
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from megnorm.data.errors import DataError

SHOWN = 5  # bad lines that are told one by one
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
BLOCK = 1 << 20
PIECE = 1 << 10  # compressed bytes taken at a time: a zstd block of 4 bytes can stand for 128 KiB of zeros


@dataclass(frozen=True)
class Unit:
    """A piece of work: the lines of a file that begin in bytes start .. end; compressed files are one unit each."""

    path: str
    start: int
    end: int

    @property
    def bytes(self) -> int:
        return self.end - self.start


@dataclass
class Tally:
    """Lines that were left out: how many, and the first few as ``file:line: reason``."""

    strict: bool = False
    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, path: str, line: int, reason: str) -> None:
        if self.strict:
            raise DataError(f"{path}:{line}: {reason}: mend the line, or leave out --strict to skip such lines.")
        self.count += 1
        if len(self.first) < SHOWN:
            self.first.append(f"{path}:{line}: {reason}")


class BadLine(Exception):
    """Why a line gives no document."""


def find_inputs(patterns: Sequence[str]) -> list[str]:
    """Files of paths and globs, in the order given; the files of one glob sorted by name."""
    found: list[str] = []
    for pattern in patterns:
        names = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))
        names = [name for name in names if Path(name).is_file()]
        if not names:
            raise DataError(f"{pattern}: no such file: give a JSONL file or a quoted glob.")
        found.extend(names)
    return found


def plan_units(paths: Sequence[str], unit_bytes: int) -> list[Unit]:
    """Cut files into units, in input order; the cut does not depend on how many workers there are."""
    units = []
    for path in paths:
        size = Path(path).stat().st_size
        step = size if path.endswith((*COMPRESSED, ".parquet")) else unit_bytes
        units += [Unit(path, start, min(start + step, size)) for start in range(0, size, max(step, 1))]
    return units


def decompress(path: str, raw: IO[bytes]) -> IO[bytes]:
    """A file as bytes, decompressed by its suffix; raw is the open file."""
    if path.endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]
    if path.endswith(".bz2"):
        return bz2.BZ2File(raw)
    if path.endswith(".xz"):
        return lzma.LZMAFile(raw)
    if path.endswith(".zst"):
        return io.BufferedReader(_Zstd(path, raw), BLOCK)
    return raw


class _Zstd(io.RawIOBase):
    """All frames of a .zst file; unlike the library's own reader it does not take a torn frame for the end."""

    def __init__(self, path: str, raw: IO[bytes]) -> None:
        try:
            import zstandard
        except ImportError:
            raise DataError(f"{path}: .zst files need the extra: pip install megnorm[data].") from None
        self.decoder, self.raw, self.error = zstandard.ZstdDecompressor(), raw, zstandard.ZstdError
        self.frame: Any = None
        self.left, self.ready = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.ready:
            packed = self.left or self.raw.read(PIECE)
            self.left = b""
            if not packed:
                if self.frame is not None:
                    raise EOFError("the file ends inside a frame")
                return 0
            self.frame = self.frame or self.decoder.decompressobj()
            try:
                self.ready = memoryview(self.frame.decompress(packed))
            except self.error as error:
                raise OSError(str(error)) from None
            if self.frame.eof:
                self.left, self.frame = self.frame.unused_data, None
        count = min(len(buffer), len(self.ready))
        buffer[:count], self.ready = self.ready[:count], self.ready[count:]
        return count


class Lines:
    """(line number from the unit's start, line) of a unit; a line longer than ``limit`` bytes is None and never held.

    position: bytes of the file, as it lies on disk, that have been read since the unit's start.
    """

    def __init__(self, unit: Unit, limit: int) -> None:
        self.unit, self.limit, self.position = unit, limit, 0

    def __iter__(self) -> Iterator[tuple[int, bytes | None]]:
        path, number = self.unit.path, 0
        packed = path.endswith(COMPRESSED)
        with open(path, "rb") as raw:
            file = decompress(path, raw)
            try:
                place = self._first_line(raw)
                while packed or place < self.unit.end:
                    line = file.readline(self.limit + 1)
                    if not line:
                        return
                    number += 1
                    place += len(line)
                    whole = len(line) <= self.limit or line.endswith(b"\n")
                    if not whole:
                        place += _skip_line(file)
                    self.position = raw.tell() if packed else place - self.unit.start
                    yield number, line if whole else None
            except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
                raise self._broken(number, error) from None

    def _first_line(self, raw: IO[bytes]) -> int:
        """Go to the first line that begins in the unit; a line belongs to the unit in which it begins."""
        place = self.unit.start
        if place:
            raw.seek(place - 1)
            place += _skip_line(raw) - 1
        return place

    def _broken(self, number: int, error: Exception) -> DataError:
        return DataError(f"{self.unit.path}: cannot be read beyond line {number} ({error}); copy the file again.")


def _skip_line(file: IO[bytes]) -> int:
    skipped = 0
    while part := file.readline(BLOCK):
        skipped += len(part)
        if part.endswith(b"\n"):
            break
    return skipped


def lines_before(unit: Unit) -> int:
    """Lines of the file that begin before the unit: read only when a bad line is to be named."""
    count, left = 0, unit.start
    if left == 0:
        return 0
    with open(unit.path, "rb") as file:
        last = b"\n"
        while left > 0 and (part := file.read(min(BLOCK, left))):
            count += part.count(b"\n")
            left -= len(part)
            last = part[-1:]
    return count + (last != b"\n")


def parse(line: bytes | None, keys: Sequence[str], table: bool = False) -> list[str]:
    """The texts of a line's keys, or BadLine with the reason. table: a line of TSV, the keys are column numbers from 0."""
    if line is None:
        raise BadLine("the line is longer than --max-line-bytes")
    if not line.strip():
        raise BadLine("empty line")
    if line.startswith(b"\xef\xbb\xbf"):
        raise BadLine("begins with a byte order mark")
    if b"\x00" in line:
        raise BadLine("holds NUL bytes")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadLine(f"not UTF-8 at byte {error.start + 1}") from None
    if table:
        columns = dict(enumerate(text.rstrip("\r\n").split("\t")))
        return [_text({key: columns[int(key)]} if int(key) in columns else {}, key, False) for key in keys]
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise BadLine(f"not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise BadLine("nested too deep") from None
    except ValueError as error:
        raise BadLine(f"not JSON: {error}") from None
    if not isinstance(record, dict):
        raise BadLine(f"a JSON {_kind(record)}, not an object")
    return [_text(record, key, b"\\u" in line) for key in keys]


def _text(record: dict[str, Any], key: str, escaped: bool) -> str:
    if key not in record:
        raise BadLine(f"no key {key!r}")
    text = record[key]
    if not isinstance(text, str):
        raise BadLine(f"{key!r} is {_kind(text)}, not a string")
    if text.isspace():
        raise BadLine(f"{key!r} is nothing but white space")
    if escaped:
        if "\x00" in text:
            raise BadLine(f"{key!r} holds NUL characters")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadLine(f"{key!r} holds a lone surrogate at character {error.start + 1}") from None
    return text


def _kind(value: object) -> str:
    if value is None:
        return "null"
    names: dict[type, str] = {
        bool: "boolean",
        int: "number",
        float: "number",
        str: "string",
        list: "list",
        dict: "object",
    }
    return names.get(type(value), type(value).__name__)


def documents(lines: Lines, keys: Sequence[str], tally: Tally) -> Iterator[tuple[int, list[str]]]:
    """(bytes of the line, texts of the keys) of every good line; the bad ones go to the tally."""
    if lines.unit.path.endswith(".parquet"):
        yield from _parquet(lines, keys, tally)
        return
    before: int | None = None
    table = ".tsv" in Path(lines.unit.path).suffixes
    if table and not all(key.isdecimal() for key in keys):
        raise DataError(f"{lines.unit.path}: the keys of TSV files are column numbers, as in --keys 0 1.")
    for number, line in lines:
        try:
            texts = parse(line, keys, table)
        except BadLine as reason:
            if before is None:
                before = lines_before(lines.unit)
            tally.add(lines.unit.path, before + number, str(reason))
            continue
        yield len(line or b""), texts


def _parquet(lines: Lines, keys: Sequence[str], tally: Tally) -> Iterator[tuple[int, list[str]]]:
    """Rows of a Parquet file, counted from 1 in messages."""
    path = lines.unit.path
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise DataError(f"{path}: .parquet files need the extra: pip install megnorm[data].") from None
    try:
        file = parquet.ParquetFile(path)
        missing = [key for key in keys if key not in file.schema_arrow.names]
        if missing:
            raise DataError(f"{path}: no column {missing[0]!r}, it has {', '.join(file.schema_arrow.names)}.")
        number = 0
        for batch in file.iter_batches(batch_size=1024, columns=list(keys)):
            for record in batch.to_pylist():
                number += 1
                lines.position = lines.unit.bytes * number // file.metadata.num_rows
                try:
                    texts = [_text(record, key, True) for key in keys]
                except BadLine as reason:
                    tally.add(path, number, str(reason))
                    continue
                yield sum(len(text.encode()) for text in texts), texts
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a sound Parquet file ({error}); copy it again.") from None
