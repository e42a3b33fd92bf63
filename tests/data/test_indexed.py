"""The .bin/.idx format: bytes, refusals, and damage that must not pass unseen."""

import struct
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megnorm.data.errors import DataError
from megnorm.data.indexed import CODES, IndexedDataset, IndexedWriter
from megnorm.data.sidecar import verify
from tests.data.helpers import write

DOCUMENTS = [[[1, 2, 3], [4]], [], [[5, 6]], [[7], [], [8, 9]]]


def expected_idx(code: int, size: int, documents: list[list[list[int]]]) -> bytes:
    """The format, written out once more by struct alone."""
    lengths = [len(sequence) for document in documents for sequence in document]
    pointers = [size * sum(lengths[:i]) for i in range(len(lengths))]
    ends = [sum(len(d) for d in documents[:i]) for i in range(len(documents) + 1)]
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(lengths), len(ends))
    return head + struct.pack(f"<{len(lengths)}i{len(pointers)}q{len(ends)}q", *lengths, *pointers, *ends)


@pytest.mark.parametrize("code", sorted(CODES))
def test_bytes_of_every_dtype(tmp_path: Path, code: int) -> None:
    dtype = np.dtype(CODES[code])
    with IndexedWriter(tmp_path / "x", dtype) as writer:
        for document in DOCUMENTS:
            flat = np.array([t for s in document for t in s], dtype)
            writer.add_document(flat, [len(s) for s in document])
    assert (tmp_path / "x.idx").read_bytes() == expected_idx(code, dtype.itemsize, DOCUMENTS)
    assert (tmp_path / "x.bin").read_bytes() == np.arange(1, 10).astype(dtype).tobytes()
    for mapped in (True, False):
        data = IndexedDataset(tmp_path / "x", mapped=mapped)
        found = [[s.tolist() for s in data.document(i)] for i in range(data.document_count)]
        assert found == DOCUMENTS


@settings(max_examples=40)
@given(
    documents=st.lists(st.lists(st.lists(st.integers(0, 65535), max_size=6), max_size=3), max_size=8),
    split=st.integers(0, 8),
)
def test_round_trip_and_merge(tmp_path_factory: pytest.TempPathFactory, documents: list, split: int) -> None:
    folder = tmp_path_factory.mktemp("x")
    for name, part in {"all": documents, "a": documents[:split], "b": documents[split:]}.items():
        with IndexedWriter(folder / name, np.uint16) as writer:
            for document in part:
                writer.add_document([t for s in document for t in s], [len(s) for s in document])
    data = IndexedDataset(folder / "all")
    assert [[s.tolist() for s in data.document(i)] for i in range(len(documents))] == documents
    assert data.document_starts()[-1] == data.total == sum(len(s) for d in documents for s in d)
    with IndexedWriter(folder / "joined", np.uint16) as writer:
        for name in ("a", "b"):
            writer.add_dataset(IndexedDataset(folder / name))
    for suffix in (".bin", ".idx", ".meta.json"):
        assert (folder / f"joined{suffix}").read_bytes() == (folder / f"all{suffix}").read_bytes()


def test_modes(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "m", np.int32, multimodal=True) as writer:
        writer.add_document([1, 2, 3], [2, 1], modes=[0, 1])
    assert IndexedDataset(tmp_path / "m", multimodal=True).modes.tolist() == [0, 1]
    with pytest.raises(DataError, match="holds modes"):
        IndexedDataset(tmp_path / "m")


def patch(path: Path, offset: int, content: bytes) -> None:
    whole = bytearray(path.read_bytes())
    whole[offset : offset + len(content)] = content
    path.write_bytes(whole)


@pytest.mark.parametrize(
    ("offset", "content", "field"),
    [
        (0, b"X", "magic"),
        (9, struct.pack("<Q", 2), "version"),
        (17, b"\x09", "dtype code"),
        (18, struct.pack("<Q", 1 << 60), "size"),
        (34, struct.pack("<i", -3), "length of sequence 0"),
        (34, struct.pack("<i", 4), "pointer of sequence 1"),
        (34 + 3 * 4 + 8, struct.pack("<qq", 10, 6), "pointer of sequence 1"),
        (34 + 3 * 12, struct.pack("<q", 1), "document index 0"),
        (34 + 3 * 12 + 8, struct.pack("<qq", 2, 1), "document index 2"),
        (34 + 3 * 12 + 24, struct.pack("<q", 9), "last document index"),
        (17, b"\x04", r"x\.idx|x\.bin"),
    ],
)
def test_a_damaged_index_is_named(tmp_path: Path, offset: int, content: bytes, field: str) -> None:
    write(tmp_path / "x", [[1, 2, 3], [4, 5], [6]])
    patch(tmp_path / "x.idx", offset, content)
    with pytest.raises(DataError, match=field) as caught:
        IndexedDataset(tmp_path / "x")
    assert str(tmp_path / "x.") in str(caught.value)


@pytest.mark.parametrize("suffix", [".idx", ".bin"])
@pytest.mark.parametrize("keep", [0, 10, -1])
def test_truncated_files_are_refused(tmp_path: Path, suffix: str, keep: int) -> None:
    write(tmp_path / "x", [list(range(40)), [4, 5], [6]])
    path = tmp_path / f"x{suffix}"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match="bytes"):
        IndexedDataset(tmp_path / "x")


def test_the_bin_of_another_index_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "x", [[1, 2, 3]])
    write(tmp_path / "y", [[1, 2]])
    (tmp_path / "y.bin").rename(tmp_path / "x.bin")
    with pytest.raises(DataError, match="other data"):
        IndexedDataset(tmp_path / "x")


def test_no_mutation_passes_unseen(tmp_path: Path) -> None:
    """1000 random mutations: refused at open or by checksums, and never an error of another kind."""
    write(tmp_path / "x", [list(range(i)) for i in range(30)])
    good = {s: (tmp_path / f"x{s}").read_bytes() for s in (".idx", ".bin")}
    random = np.random.default_rng(0)
    for _ in range(1000):
        suffix = (".idx", ".bin")[int(random.integers(2))]
        content = bytearray(good[suffix])
        kind, place = int(random.integers(4)), int(random.integers(len(content)))
        if kind == 0:
            content[place] ^= 1 << int(random.integers(8))
        elif kind == 1:
            del content[place : place + int(random.integers(1, 9))]
        elif kind == 2:
            content[place:place] = random.bytes(int(random.integers(1, 9)))
        else:
            content[place : place + 8] = random.bytes(8)
        if bytes(content) == good[suffix]:
            continue
        (tmp_path / f"x{suffix}").write_bytes(content)
        with suppress(DataError):  # without checksums it may open, and then nothing is read beyond its end
            data = IndexedDataset(tmp_path / "x")
            assert sum(len(part) for i in range(data.document_count) for part in data.document(i)) == data.total
        with pytest.raises(DataError):
            IndexedDataset(tmp_path / "x")
            verify(str(tmp_path / "x"))
        (tmp_path / f"x{suffix}").write_bytes(good[suffix])
    assert verify(str(tmp_path / "x")) == 2


def test_nothing_appears_before_the_end(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="killed"), IndexedWriter(tmp_path / "x", np.uint16) as writer:
        writer.add_document([1, 2])
        raise RuntimeError("killed")
    assert list(tmp_path.iterdir()) == []


def test_ids_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="70000 does not fit uint16"):
        write(tmp_path / "x", [[70000]])
    with pytest.raises(DataError, match="-1 does not fit uint16"):
        write(tmp_path / "x", [[-1, 5]])


def test_reads_stay_inside(tmp_path: Path) -> None:
    data = IndexedDataset(write(tmp_path / "x", [[1, 2, 3], [4]]))
    assert data.get(0, 1).tolist() == [2, 3]
    for arguments in ((2,), (0, 2, 2), (0, -1), (-1,)):
        with pytest.raises(IndexError):
            data.get(*arguments)
    with pytest.raises(DataError):
        data.read(3, 2)
    assert data.read_many(np.array([2, 0]), np.array([2, 1])).tolist() == [3, 4, 1]
    for starts, counts in (([0, 3], [1, 2]), ([-1], [1]), ([2], [-1])):
        with pytest.raises(DataError):
            data.read_many(np.array(starts), np.array(counts))
