"""Token files in object stores: the same samples as from a disk, few requests, clear refusals."""

import builtins
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
import torch

from megnorm.data.config import DataConfig
from megnorm.data.errors import DataError
from megnorm.data.indexed import IndexedDataset, IndexedWriter
from megnorm.data.loader import Loader
from megnorm.data.sidecar import sum_files, verify
from tests.data.helpers import numbered

SUFFIXES = (".bin", ".idx", ".meta.json")


@pytest.fixture
def store() -> Iterator[fsspec.AbstractFileSystem]:
    """A store in memory, empty before and after."""
    found = fsspec.filesystem("memory")
    found.store.clear()
    yield found
    found.store.clear()


def put(store: fsspec.AbstractFileSystem, prefix: str, name: str) -> str:
    """Copy a data set into the store; its address."""
    for suffix in SUFFIXES:
        store.pipe_file(f"/{name}{suffix}", Path(prefix + suffix).read_bytes())
    return f"memory://{name}"


def loader(path: str | tuple[str, ...], **options: object) -> Loader:
    config = DataConfig(path=path, split=(1, 0, 0), **options)
    return Loader(config, "train", sequence_length=16, seed=3, vocab_size=60000, samples=100)


@pytest.mark.parametrize("order", ["default", "megatron"])
def test_the_same_samples_as_from_a_disk(tmp_path: Path, store: fsspec.AbstractFileSystem, order: str) -> None:
    local = tuple(numbered(tmp_path / name, 900, seed=seed) for seed, name in enumerate("ab"))
    remote = tuple(put(store, path, Path(path).name) for path in local)
    through = tuple(f"file://{path}" for path in local)
    wanted = loader(local, order=order, verify=True).batch(0, 60).tokens
    for paths in (remote, through):
        assert torch.equal(loader(paths, order=order, verify=True).batch(0, 60).tokens, wanted)
    packed = {"order": order, "separate_documents": True}
    assert torch.equal(loader(remote, **packed).batch(0, 9).cu_seqlens, loader(local, **packed).batch(0, 9).cu_seqlens)


def test_a_batch_is_one_request(
    tmp_path: Path, store: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = loader(put(store, numbered(tmp_path / "a", 2000), "a"))
    asked = []
    real = store.cat_ranges

    def counts(paths: list[str], starts: list[int], ends: list[int], **rest: object) -> list[bytes]:
        asked.append(sum(end - start for start, end in zip(starts, ends, strict=True)))
        return real(paths, starts, ends, **rest)

    monkeypatch.setattr(store, "cat_ranges", counts)
    one.batch(0, 20)
    assert asked == [20 * 17 * 2]


def test_the_index_is_fetched_once_per_node(tmp_path: Path, store: fsspec.AbstractFileSystem) -> None:
    path, cache = put(store, numbered(tmp_path / "a", 2000), "a"), str(tmp_path / "cache")
    first = IndexedDataset(path, cache=cache)
    assert len(list((tmp_path / "cache").glob("idx-*/idx.npy"))) == 1
    patch = pytest.MonkeyPatch()
    with patch.context() as context:
        context.setattr(type(first.idx_file), "read", lambda *_: pytest.fail("fetched again"))
        assert IndexedDataset(path, cache=cache).lengths.tolist() == first.lengths.tolist()


def test_damage_in_the_store_is_told(tmp_path: Path, store: fsspec.AbstractFileSystem) -> None:
    path = put(store, numbered(tmp_path / "a", 2000), "a")
    assert verify(path) == 2
    content = bytearray(store.cat_file("/a.bin"))
    content[100] ^= 1
    store.pipe_file("/a.bin", bytes(content))
    loader(path)
    with pytest.raises(DataError, match=r"memory://a\.bin: bytes from 0 on differ"):
        loader(path, verify=True)
    store.pipe_file("/a.bin", bytes(content[:-2]))
    with pytest.raises(DataError, match=r"memory://a\.bin: has 3998 bytes"):
        IndexedDataset(path)
    store.pipe_file("/a.idx", store.cat_file("/a.idx")[:20])
    with pytest.raises(DataError, match=r"memory://a\.idx: size is 20 bytes"):
        IndexedDataset(path)


def test_a_file_that_shrinks_is_told(tmp_path: Path, store: fsspec.AbstractFileSystem) -> None:
    data = IndexedDataset(put(store, numbered(tmp_path / "a", 2000), "a"))
    store.pipe_file("/a.bin", b"12345678")
    with pytest.raises(DataError, match="became shorter"):
        data.read(0, 100)
    store.rm_file("/a.bin")
    with pytest.raises(DataError, match=r"memory://a\.bin: cannot be read"):
        data.read(0, 100)


def test_refusals(tmp_path: Path, store: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"memory://nowhere\.idx not found"):
        IndexedDataset("memory://nowhere")
    with pytest.raises(DataError, match="object stores are only read"):
        IndexedWriter("memory://a", "uint16")
    with pytest.raises(DataError, match="object stores are only read"):
        sum_files("memory://a")
    with pytest.raises(DataError, match=r"nokind://bucket/a.*cannot be reached"):
        IndexedDataset("nokind://bucket/a")
    config = replace(DataConfig(), path=put(store, numbered(tmp_path / "a", 900), "a"))
    real = builtins.__import__

    def without(name: str, *rest: object) -> object:
        if name == "fsspec":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match=r"memory://a.* pip install megnorm\[remote\]"):
        Loader(config, "train", sequence_length=16, seed=3, vocab_size=60000)
