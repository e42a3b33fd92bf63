"""Megatron's indexed dataset: PREFIX.bin holds tokens back to back, PREFIX.idx says where sequences and documents lie.

Both directions are byte-identical with Megatron-LM. The whole .idx is checked when it is opened.
"""

import hashlib
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from megnorm.data.atomic import AtomicFile
from megnorm.data.cache import cached
from megnorm.data.errors import DataError
from megnorm.data.sidecar import Summer, write_sidecar
from megnorm.data.storage import Stored, find, is_remote, require_local

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
CODES: dict[int, Any] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}
CHUNK = 1 << 20  # entries checked at a time: the check of 10^9 sequences needs no more memory than this
SCAN = 1 << 24  # elements looked through at a time


def code_of(dtype: DTypeLike) -> int:
    """The format's number for a dtype."""
    for code, kind in CODES.items():
        if np.dtype(kind) == np.dtype(dtype):
            return code
    raise DataError(
        f"dtype {np.dtype(dtype)} cannot be stored; use one of {[np.dtype(k).name for k in CODES.values()]}."
    )


def smallest_dtype(vocab_size: int | None) -> Any:
    """Megatron's rule: uint16 below 65500 tokens, else int32."""
    return np.uint16 if vocab_size is not None and vocab_size < 65500 else np.int32


def strip_suffix(path: str | Path) -> str:
    """The prefix, also when somebody gives PREFIX.bin or PREFIX.idx."""
    text = str(path)
    return text[:-4] if text.endswith((".bin", ".idx")) else text


class IndexedDataset:
    """Read access to one prefix, on a local disk or in an object store.

    lengths [S] int32, pointers [S] int64 (bytes), documents [D] int64 are views of the whole .idx; document i is the
    sequences documents[i] .. documents[i + 1]. mapped False reads ranges of .bin instead of mapping it, as is always done
    with object stores. cache: local folder in which the .idx of an object store is kept, once per node.
    """

    def __init__(
        self, prefix: str | Path, *, multimodal: bool = False, mapped: bool = True, cache: str | None = None
    ) -> None:
        self.prefix = strip_suffix(prefix)
        self.idx, self.bin = self.prefix + ".idx", self.prefix + ".bin"
        self.idx_file, self.bin_file = self._find(self.idx), self._find(self.bin)
        self.mapped = mapped and not is_remote(self.prefix)
        self._read_header(self._index(cache), multimodal)
        self.total = self._check()
        self._tokens: NDArray[Any] | None = None

    def _find(self, path: str) -> Stored:
        found = find(path)
        if found is None:
            raise DataError(
                f"{path} not found: give the prefix of a .bin/.idx pair, or write one with megnorm preprocess."
            )
        return found

    def _fail(self, field: str, found: object, wanted: object) -> DataError:
        return DataError(
            f"{self.idx}: {field} is {found}, expected {wanted}: the file is damaged or belongs to other data; copy it "
            "again or write it anew with megnorm preprocess."
        )

    def _index(self, cache: str | None) -> NDArray[np.uint8]:
        """The bytes of .idx."""
        file = self.idx_file
        if file.size < HEADER.size:
            raise self._fail("size", f"{file.size} bytes", f"at least {HEADER.size} bytes of header")
        if not is_remote(self.idx):
            return np.memmap(self.idx, dtype=np.uint8, mode="r")
        mark = hashlib.sha256(f"{self.idx} {file.size} {file.stamp}".encode()).hexdigest()[:24]
        fetched = cached(cache, f"idx-{mark}", lambda: {"idx": np.frombuffer(file.read(0, file.size), np.uint8)})
        return fetched["idx"]

    def _read_header(self, raw: NDArray[np.uint8], multimodal: bool) -> None:
        size = len(raw)
        magic, version, code, sequences, entries = HEADER.unpack(raw[: HEADER.size].tobytes())
        if magic != MAGIC:
            raise self._fail("magic", magic, MAGIC)
        if version != 1:
            raise self._fail("version", version, 1)
        if code not in CODES:
            raise self._fail("dtype code", code, "1 to 8")
        wanted = HEADER.size + 12 * sequences + 8 * entries
        if not multimodal and size == wanted + sequences and sequences:
            raise DataError(
                f"{self.idx}: holds modes as well (multimodal data): open it with multimodal=True or --multimodal."
            )
        wanted += sequences if multimodal else 0
        if size != wanted:
            raise self._fail(
                "size", f"{size} bytes", f"{wanted} bytes for {sequences} sequences and {entries} document entries"
            )
        self.dtype = np.dtype(CODES[code]).newbyteorder("<")

        def view(start: int, count: int, kind: str) -> NDArray[Any]:
            return np.ndarray(shape=(count,), dtype=kind, buffer=raw, offset=start) if count else np.zeros(0, kind)

        start = HEADER.size
        self.lengths = view(start, sequences, "<i4")
        self.pointers = view(start + 4 * sequences, sequences, "<i8")
        self.documents = view(start + 12 * sequences, entries, "<i8")
        self.modes = view(start + 12 * sequences + 8 * entries, sequences, "<i1") if multimodal else None

    def _check(self) -> int:
        """Every length, pointer and document index; the number of elements in all."""
        size, total = self.dtype.itemsize, 0
        for start in range(0, len(self.lengths), CHUNK):
            lengths = self.lengths[start : start + CHUNK].astype(np.int64)
            if lengths.min() < 0:
                place = int(np.argmax(lengths < 0))
                raise self._fail(f"length of sequence {start + place}", lengths[place], ">= 0")
            ends = np.cumsum(lengths)
            wrong = self.pointers[start : start + CHUNK] != (total + ends - lengths) * size
            if wrong.any():
                place = int(np.argmax(wrong))
                wanted = (total + int(ends[place] - lengths[place])) * size
                raise self._fail(f"pointer of sequence {start + place}", self.pointers[start + place], wanted)
            total += int(ends[-1])
        self._check_documents()
        found = self.bin_file.size
        if found != total * size:
            raise DataError(
                f"{self.bin}: has {found} bytes, its .idx describes {total * size}: one of the two is truncated or "
                "of other data; copy both again or write them anew with megnorm preprocess."
            )
        return total

    def _check_documents(self) -> None:
        if not len(self.documents):
            raise self._fail("number of document entries", 0, "at least 1")
        if self.documents[0] != 0:
            raise self._fail("document index 0", self.documents[0], 0)
        for start in range(0, len(self.documents) - 1, CHUNK):
            part = self.documents[start : start + CHUNK + 1].astype(np.int64)
            wrong = part[1:] < part[:-1]
            if wrong.any():
                place = int(np.argmax(wrong))
                raise self._fail(f"document index {start + place + 1}", part[place + 1], f">= {part[place]}")
        if self.documents[-1] != len(self.lengths):
            raise self._fail("last document index", self.documents[-1], f"{len(self.lengths)}, the number of sequences")

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def document_count(self) -> int:
        return len(self.documents) - 1

    @property
    def tokens(self) -> NDArray[Any]:
        """All elements of .bin, [total], mapped."""
        if self._tokens is None:
            mapped = np.memmap(self.bin, dtype=self.dtype, mode="r") if self.total else np.zeros(0, self.dtype)
            self._tokens = mapped.view(np.ndarray)  # a slice of a memmap costs ten times that of a plain array
        return self._tokens

    def read(self, start: int, count: int) -> NDArray[Any]:
        """Elements start .. start + count, counted from the head of .bin."""
        if not 0 <= start <= start + count <= self.total:
            raise DataError(f"{self.bin}: elements {start} to {start + count} asked for, it has {self.total}.")
        if self.mapped:
            return self.tokens[start : start + count]
        size = self.dtype.itemsize
        return np.frombuffer(self.bin_file.read(start * size, count * size), dtype=self.dtype)

    def read_many(self, starts: NDArray[Any], counts: NDArray[Any]) -> NDArray[Any]:
        """Several pieces, one behind the other; from an object store all at once, since each read waits."""
        ends = starts + counts
        if starts.min(initial=0) < 0 or counts.min(initial=0) < 0 or ends.max(initial=0) > self.total:
            raise DataError(f"{self.bin}: elements {starts.min()} to {ends.max()} asked for, it has {self.total}.")
        if self.mapped:
            tokens = self.tokens
            parts = [tokens[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
            return np.concatenate(parts) if parts else np.zeros(0, self.dtype)
        size = self.dtype.itemsize
        found = self.bin_file.read_many((starts * size).tolist(), (counts * size).tolist())
        return np.frombuffer(b"".join(found), dtype=self.dtype)

    def identity(self) -> str:
        """Tells data sets apart by what they hold, wherever they lie: sizes, and both ends of lengths and elements."""
        digest = hashlib.blake2b(f"{self.dtype} {len(self)} {len(self.documents)} {self.total}".encode(), digest_size=8)
        count = min(1 << 16, self.total)
        for part in (self.lengths[: 1 << 16], self.lengths[-(1 << 16) :]):
            digest.update(np.ascontiguousarray(part).tobytes())
        for start in (0, self.total - count):
            digest.update(self.read(start, count).tobytes())
        return digest.hexdigest()

    def largest(self, upto: int | None = None) -> int:
        """The largest element of the first ``upto`` (None: all); -1 where there is none."""
        end = self.total if upto is None else min(upto, self.total)
        return max((int(self.read(i, min(SCAN, end - i)).max()) for i in range(0, end, SCAN)), default=-1)

    def get(self, sequence: int, offset: int = 0, length: int | None = None) -> NDArray[Any]:
        """Elements of one sequence, or a part of it."""
        if not 0 <= sequence < len(self):
            raise IndexError(f"{self.prefix}: sequence {sequence} asked for, it has {len(self)}.")
        whole = int(self.lengths[sequence])
        length = whole - offset if length is None else length
        if not 0 <= offset <= offset + length <= whole:
            raise IndexError(
                f"{self.prefix}: elements {offset} to {offset + length} of a sequence of {whole} asked for."
            )
        return self.read(int(self.pointers[sequence]) // self.dtype.itemsize + offset, length)

    def __getitem__(self, sequence: int) -> NDArray[Any]:
        return self.get(sequence)

    def document(self, index: int) -> list[NDArray[Any]]:
        """The sequences of one document."""
        return [self.get(i) for i in range(int(self.documents[index]), int(self.documents[index + 1]))]

    def document_start(self, index: int) -> int:
        """Where document ``index`` begins in .bin, in elements; index may be the number of documents."""
        sequence = int(self.documents[index])
        return self.total if sequence == len(self) else int(self.pointers[sequence]) // self.dtype.itemsize

    def document_starts(self) -> NDArray[np.int64]:
        """Where every document begins, [documents + 1], in elements."""
        starts = np.append(self.pointers.astype(np.int64) // self.dtype.itemsize, self.total)
        return starts[self.documents.astype(np.int64)]


class IndexedWriter:
    """Writes one prefix; nothing lies under the final names before ``finish``. Use as a context manager.

    The sidecar PREFIX.meta.json gets checksums, the largest id and whatever ``notes`` holds.
    """

    def __init__(self, prefix: str | Path, dtype: DTypeLike, *, multimodal: bool = False) -> None:
        require_local(prefix)
        self.prefix, self.dtype = strip_suffix(prefix), np.dtype(dtype).newbyteorder("<")
        self.code, self.multimodal = code_of(dtype), multimodal
        self.lengths: list[NDArray[np.int32]] = []
        self.documents: list[NDArray[np.int64]] = [np.zeros(1, np.int64)]
        self.modes: list[NDArray[np.int8]] = []
        self.sequences, self.elements, self.max_id = 0, 0, -1
        self.notes: dict[str, Any] = {}
        self._sum = Summer()
        self._bin = AtomicFile(self.prefix + ".bin")

    def add(
        self, tokens: Any, lengths: Sequence[int] | NDArray[Any], ends: Sequence[int] | NDArray[Any], modes: Any = ()
    ) -> None:
        """Many documents at once: tokens [n], lengths of their sequences, and for each document how many of these
        sequences have been written when it ends."""
        values = self._cast(np.asarray(tokens))
        sizes = np.asarray(lengths, dtype=np.int64)
        last = np.asarray(ends, dtype=np.int64)
        if int(sizes.sum()) != values.size:
            raise DataError(f"{self.prefix}: {values.size} elements given, the lengths sum to {int(sizes.sum())}.")
        if self.multimodal and len(modes) != len(sizes):
            raise DataError(f"{self.prefix}: {len(sizes)} sequences need as many modes, {len(modes)} given.")
        content = values.tobytes()
        self._bin.file.write(content)
        self._sum.update(content)
        if values.size and values.dtype.kind in "iu":
            self.max_id = max(self.max_id, int(values.max()))
        self.lengths.append(sizes.astype(np.int32))
        self.documents.append(last + self.sequences)
        if self.multimodal:
            self.modes.append(np.asarray(modes, dtype=np.int8))
        self.sequences += len(sizes)
        self.elements += values.size

    def add_document(self, tokens: Any, lengths: Sequence[int] | None = None, modes: Any = ()) -> None:
        """One document; lengths None: it is one sequence, or none where it is empty."""
        values = np.asarray(tokens)
        sizes = ([values.size] if values.size else []) if lengths is None else list(lengths)
        self.add(values, sizes, [len(sizes)], modes)

    def add_dataset(self, other: IndexedDataset) -> None:
        """All documents of another data set, as Megatron's merge does."""
        if other.dtype != self.dtype:
            raise DataError(
                f"{other.prefix} holds {other.dtype}, {self.prefix} {self.dtype}: only equal dtypes can be merged."
            )
        if self.multimodal != (other.modes is not None):
            raise DataError(f"{other.prefix}: multimodal and plain data cannot be merged.")
        for start in range(0, other.total, CHUNK):
            values = other.read(start, min(CHUNK, other.total - start))
            content = values.tobytes()
            self._bin.file.write(content)
            self._sum.update(content)
            if values.dtype.kind in "iu":
                self.max_id = max(self.max_id, int(values.max()))
        self.lengths.append(other.lengths.astype(np.int32))
        self.documents.append(other.documents[1:].astype(np.int64) + self.sequences)
        if other.modes is not None:
            self.modes.append(other.modes.astype(np.int8))
        self.sequences += len(other)
        self.elements += other.total

    def _cast(self, values: NDArray[Any]) -> NDArray[Any]:
        if values.size and self.dtype.kind in "iu" and values.dtype != self.dtype:
            info = np.iinfo(self.dtype)
            low, high = values.min(), values.max()
            if values.dtype.kind not in "iu" or low < info.min or high > info.max:
                raise DataError(
                    f"{self.prefix}: id {high if high > info.max else low} does not fit {self.dtype}; use int32."
                )
        return np.ascontiguousarray(values, dtype=self.dtype).reshape(-1)

    def finish(self) -> None:
        """Write .idx and the sidecar, then give all three their names."""
        lengths = np.concatenate(self.lengths) if self.lengths else np.zeros(0, np.int32)
        documents = np.concatenate(self.documents)
        index = AtomicFile(self.prefix + ".idx")
        sums = Summer()
        try:
            parts: list[Iterable[bytes] | bytes] = [
                HEADER.pack(MAGIC, 1, self.code, len(lengths), len(documents)),
                (lengths[i : i + CHUNK].astype("<i4").tobytes() for i in range(0, len(lengths), CHUNK)),
                self._pointers(lengths),
                (documents[i : i + CHUNK].astype("<i8").tobytes() for i in range(0, len(documents), CHUNK)),
                (part.tobytes() for part in self.modes),
            ]
            for part in parts:
                for content in (part,) if isinstance(part, bytes) else part:
                    index.file.write(content)
                    sums.update(content)
            Path(self.prefix + ".idx").unlink(missing_ok=True)  # an old .idx must not meet the new .bin
            self._bin.commit()
            index.commit()
        except BaseException:
            index.discard()
            raise
        notes = {"max_id": self.max_id if self.dtype.kind in "iu" else None, **self.notes}
        write_sidecar(self.prefix, {"bin": self._sum, "idx": sums}, notes)

    def _pointers(self, lengths: NDArray[np.int32]) -> Iterable[bytes]:
        total = 0
        for start in range(0, len(lengths), CHUNK):
            sizes = lengths[start : start + CHUNK].astype(np.int64) * self.dtype.itemsize
            ends = np.cumsum(sizes) + total
            yield (ends - sizes).astype("<i8").tobytes()
            total = int(ends[-1])

    def discard(self) -> None:
        self._bin.discard()

    def __enter__(self) -> "IndexedWriter":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is None:
            try:
                self.finish()
            except BaseException:
                self.discard()
                raise
        else:
            self.discard()
