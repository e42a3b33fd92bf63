"""Files made to harm, one for each format that megnorm opens: no code of theirs runs, nothing is written outside, and
what their headers claim is not allocated."""

import contextlib
import gzip
import json
import pickle
import resource
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from megnorm import config as configs
from megnorm.checkpoint import io
from megnorm.checkpoint.folder import complete_text
from megnorm.checkpoint.saver import Saver
from megnorm.config import ConfigError
from megnorm.data import tokenizer as tokenizers
from megnorm.data.documents import Lines, Tally, Unit, documents
from megnorm.data.errors import DataError
from megnorm.data.indexed import HEADER, MAGIC, IndexedDataset, IndexedWriter
from megnorm.data.sidecar import SUFFIX, read_sidecar, verify
from tests.marks import thinned
from tools.faults.job import forked

MARK = "MEGNORM_TEST_MARK"  # names the file that hostile code would make
TOUCH = f"import os, pathlib; pathlib.Path(os.environ['{MARK}']).touch()"
MEMORY = 96 << 20  # bytes more than before, at most
DEEP = 100_000


class Hostile:
    """Pickled, it is code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (TOUCH,)


@pytest.fixture(autouse=True)
def nothing_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The mark is not made, and nothing beside the folder ``in`` has changed."""
    monkeypatch.setenv(MARK, str(tmp_path / "mark"))
    monkeypatch.setattr("builtins.input", lambda *prompt: "yes")  # a question whether to run code would be answered so
    (tmp_path / "in").mkdir()
    outside = tmp_path / "outside"
    outside.write_bytes(b"mine")
    yield
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "outside"]
    assert outside.read_bytes() == b"mine"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "in"


def in_little_memory(work: Callable[[], object], log: Path) -> int:
    """Do it in a fork that may have MEMORY more than this process has; 0 if it was enough."""

    def limited() -> int:
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))
        work()
        return 0

    return forked(limited, log)


def test_the_trap_works(folder: Path, tmp_path: Path) -> None:
    """Else no test below could fail."""
    pickle.loads(pickle.dumps(Hostile()))
    assert (tmp_path / "mark").exists()
    (tmp_path / "mark").unlink()
    assert in_little_memory(lambda: bytearray(2 * MEMORY), folder / "log") != 0


# YAML ---------------------------------------------------------------------------------------------------------------

BOMB = "model:\n  norm:\n    options:\n      a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"      {b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
YAML = {
    "a call": f"train: !!python/object/apply:exec ['{TOUCH.replace(chr(39), chr(34))}']\n",
    "a new object": "train: !!python/object/new:os.system ['true']\n",
    "a module": "train:\n  out: !!python/module:os\n",
    "a name": "train:\n  out: !!python/name:os.system\n",
    "aliases of aliases": BOMB,
    "itself": "model:\n  norm:\n    options: &x {a: *x}\n",
    "deep": f"train: {'[' * 5000}\n",
    "deep mappings": "model: " + "{a: " * 3000 + "1" + "}" * 3000,
    "large": "#" * (5 << 20),
}


@pytest.mark.parametrize("kind", YAML)
def test_yaml(folder: Path, kind: str) -> None:
    path = folder / "run.yaml"
    path.write_text(YAML[kind])
    with pytest.raises(ConfigError, match="run.yaml"):
        configs.load(path)
    with pytest.raises(ConfigError):
        configs.load(None, [f"train.out={YAML[kind].partition(':')[2].strip() or '{'}"])


# Checkpoints (what their manifests may hold: tests/checkpoint/test_damage.py) --------------------------------------------


def test_checkpoint_of_pickles(folder: Path) -> None:
    path = io.save(folder, 1, [io.Shard.whole("w", torch.ones(100))], {"a": 1})
    for name in ("manifest.json", "meta.json", "complete", "rank-00000-00000.safetensors"):
        good = (path / name).read_bytes()
        (path / name).write_bytes(pickle.dumps(Hostile()).ljust(len(good), b"\0"))
        assert io.verify(path)
        with pytest.raises(io.CheckpointError):
            io.load(path, [io.Shard.whole("w", torch.ones(100))])
        (path / name).write_bytes(good)


def test_checkpoint_with_links_to_the_outside(folder: Path, tmp_path: Path) -> None:
    """Leftovers of a save that are links: what they point to is neither written nor deleted."""
    for name in (".tmp-latest", "latest", ".tmp-step-00000002", ".trash-step-00000009", ".old-step-00000002"):
        (folder / name).symlink_to(tmp_path / "outside")
    other = folder.parent / "in" / "victim"
    other.mkdir()
    (other / "file").touch()
    (folder / ".tmp-step-00000007").symlink_to(other)
    io.save(folder, 2, [io.Shard.whole("w", torch.ones(2))], {})
    assert (other / "file").exists()
    assert io.latest(folder) == folder / "step-00000002"
    with Saver(configs.CheckpointConfig(keep_last=1), folder) as saver:
        (folder / "step-00000001").symlink_to(other)
        saver.save(3, [io.Shard.whole("w", torch.ones(2))], {})
        saver.wait()
    assert (other / "file").exists()


def test_checkpoint_whose_record_leads_outside(folder: Path) -> None:
    io.save(folder / "a", 1, [io.Shard.whole("w", torch.ones(2))], {})
    io.save(folder / "b", 1, [io.Shard.whole("w", torch.zeros(2))], {})
    manifest = (folder / "b/step-00000001/manifest.json").read_bytes()
    digest = complete_text(manifest).decode().split()[0]
    (folder / "a/latest").write_text(f"{digest}  ../b/step-00000001/manifest.json\n")
    assert io.latest(folder / "a") == folder / "a/step-00000001"


def test_config_of_a_checkpoint_names_no_code(folder: Path) -> None:
    """Its config may name plug-ins, as the user's does; they are not loaded."""
    from megnorm.hf.native import read_native
    from megnorm.norms.resolve import resolve

    (folder / "evil.py").write_text(TOUCH)
    config = configs.to_dict(configs.RunConfig())
    config["model"]["norm"]["plugins"] = [str(folder / "evil.py")]
    resolved = resolve(configs.RunConfig().model.norm, configs.RunConfig().model.layers)
    io.save(
        folder / "run/checkpoints",
        1,
        [io.Shard.whole("w", torch.ones(2))],
        {"config": config, "resolved": resolved.to_json(), "step": 1},
    )
    assert read_native(folder / "run").state["w"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("key", ["config", "resolved", "step"])
def test_a_checkpoint_of_something_else_is_refused(folder: Path, key: str) -> None:
    from megnorm.hf.native import read_native

    record = {"config": {}, "resolved": {}, "step": 1}
    del record[key]
    io.save(folder / "run/checkpoints", 1, [io.Shard.whole("w", torch.ones(2))], record)
    with pytest.raises(ValueError, match=f"meta.json has no '{key}'; it was not written by megnorm"):
        read_native(folder / "run")


# Token files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sequences", "entries", "code"),
    [(2**60, 1, 8), (1, 2**60, 8), (2**61, 2**61, 8), (2**64 - 1, 2**64 - 1, 8), (1, 2, 255), (1, 2, 0)],
)
def test_idx(folder: Path, sequences: int, entries: int, code: int) -> None:
    (folder / "a.bin").write_bytes(b"\0\0")
    lengths = struct.pack("<iqqq", 1, 0, 0, 1)
    (folder / "a.idx").write_bytes(HEADER.pack(MAGIC, 1, code, sequences, entries) + lengths)
    with pytest.raises(DataError, match="a.idx"):
        IndexedDataset(folder / "a")


def test_bin_of_a_pickle(folder: Path) -> None:
    """It is tokens."""
    with IndexedWriter(folder / "a", np.uint8) as writer:
        content = np.frombuffer(pickle.dumps(Hostile()), np.uint8)
        writer.add(content, [len(content)], [1])
    assert IndexedDataset(folder / "a").read(0, 2).tolist() == content[:2].tolist()
    np.save(folder / "b.npy", np.array([Hostile()], dtype=object), allow_pickle=True)
    (folder / "b.npy").rename(folder / "b.idx")
    (folder / "b.bin").write_bytes(b"")
    with pytest.raises(DataError, match="b.idx: magic"):
        IndexedDataset(folder / "b")


def sidecar(chunk_bytes: int) -> bytes:
    files = {"bin": {"bytes": 8, "crc32": ["0"]}, "idx": {"bytes": 58, "crc32": ["0"]}}
    return json.dumps({"format": 1, "chunk_bytes": chunk_bytes, "files": files}).encode()


SIDECARS: dict[str, bytes] = {
    "pickle": pickle.dumps(Hostile()),
    "deep": b"[" * DEEP,
    "a list": b"[]",
    "huge chunks": sidecar(2**62),
    "chunks of nothing": sidecar(-1),
}


@pytest.mark.parametrize("kind", SIDECARS)
def test_sidecar(folder: Path, kind: str) -> None:
    with IndexedWriter(folder / "a", np.uint16) as writer:
        writer.add(np.arange(4), [4], [1])
    (folder / f"a{SUFFIX}").write_bytes(SIDECARS[kind])
    for read in (read_sidecar, verify):
        with pytest.raises(DataError, match="a.meta.json: not a record of checksums"):
            read(str(folder / "a"))


# Texts --------------------------------------------------------------------------------------------------------------


def read_lines(path: Path, limit: int = 1 << 20) -> list[list[str]]:
    tally = Tally()
    return [texts for _, texts in documents(Lines(Unit(str(path), 0, path.stat().st_size), limit), ["text"], tally)]


def test_jsonl(folder: Path) -> None:
    path = folder / "a.jsonl"
    path.write_bytes(
        b'{"text": ' + b"[" * DEEP + b"\n" + pickle.dumps(Hostile()) + b"\n" + b'{"text": ' + b"1" * 5000 + b"}\n"
        b'{"text": NaN}\n{"text": "__import__(\'os\')"}\n'
    )
    assert read_lines(path) == [["__import__('os')"]]


def zeros_zst(blocks: int) -> bytes:
    """Each four bytes stand for 128 KiB of zeros."""
    header = b"\x28\xb5\x2f\xfd\x00\x38"  # a window of 128 KiB
    block = [((128 << 10) << 3 | 1 << 1 | last).to_bytes(3, "little") + b"0" for last in (0, 1)]
    return header + block[0] * (blocks - 1) + block[1]


@pytest.mark.parametrize("kind", thinned(["gz", "zst", "bz2", "xz"], 4))
def test_compressed_bombs(folder: Path, kind: str) -> None:
    """Some hundred kB that grow to 256 MB: one line, too long to be held."""
    import bz2
    import lzma

    part = b"0" * (16 << 20)
    packed = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
    path = folder / f"a.jsonl.{kind}"
    path.write_bytes(zeros_zst(2048) if kind == "zst" else packed[kind](part) * 16)
    if kind == "zst":
        pytest.importorskip("zstandard")

    def work() -> None:
        assert read_lines(path) == []

    assert in_little_memory(work, folder / "log") == 0, (folder / "log").read_text()


def test_parquet_with_a_pickled_type(folder: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    hostile = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": pickle.dumps(Hostile())}
    schema = arrow.schema([arrow.field("text", arrow.string(), metadata=hostile)])
    parquet.write_table(arrow.table({"text": ["a"]}, schema=schema), folder / "a.parquet")
    try:
        assert read_lines(folder / "a.parquet") == [["a"]]
    except DataError as error:
        assert "a.parquet" in str(error)


TOKENIZERS: dict[str, bytes] = {
    "pickle": pickle.dumps(Hostile()),
    "deep": b"[" * DEEP,
    "other things": json.dumps({"model": {"type": "os.system", "vocab": {}}}).encode(),
    "huge": json.dumps({"model": {"type": "BPE", "vocab": {"a": 2**63}, "merges": []}}).encode(),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tokenizer_json(folder: Path, kind: str) -> None:
    (folder / "tokenizer.json").write_bytes(TOKENIZERS[kind])
    with pytest.raises(DataError, match="tokenizer.json: not a tokenizer file"):
        tokenizers.load(str(folder))


# Hugging Face folders -------------------------------------------------------------------------------------------------


@pytest.fixture
def exported(folder: Path) -> Path:
    """A folder that brings code for its class."""
    automatic = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", None]}
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": automatic}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T", "auto_map": automatic}))
    for name in ("evil.py", "modeling_megnorm.py", "configuration_megnorm.py", "setup.py", "__init__.py"):
        (folder / name).write_text(f"{TOUCH}\nclass C: pass\nclass M: pass\nclass T: pass\n")
    save_file({"model.embed_tokens.weight": torch.ones(2, 2)}, folder / "model.safetensors")
    return folder


def test_folder_with_code(exported: Path) -> None:
    pytest.importorskip("transformers")
    from megnorm.hf.convert import from_hf
    from megnorm.hf.tokenizer import load_tokenizer
    from megnorm.infer import generate

    for read in (from_hf, generate.load, load_tokenizer):
        with pytest.raises(ValueError):
            read(exported)
    # a known class beside the code: it is the known one that is used
    sizes = dict.fromkeys(
        ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"), 2
    )
    config = json.loads((exported / "config.json").read_text())
    (exported / "config.json").write_text(json.dumps({**config, **sizes, "model_type": "llama"}))
    for load in (from_hf, generate.load):
        with contextlib.suppress(ValueError, RuntimeError):
            load(exported)


def test_folder_with_pickled_weights(folder: Path) -> None:
    from megnorm.hf.convert import from_hf

    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(ValueError, match="safetensors files are missing"):
        from_hf(folder)


def test_folder_whose_index_leads_outside(exported: Path, tmp_path: Path) -> None:
    from megnorm.hf.convert import from_hf

    for name in ("../outside", str(tmp_path / "outside"), "a/../../outside"):
        (exported / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(ValueError, match="is not a file of this folder"):
            from_hf(exported)


@pytest.mark.parametrize(
    "content",
    [struct.pack("<Q", 2**63 - 1), struct.pack("<Q", 2**40) + b"{}", struct.pack("<Q", 2) + b"[]", pickle.dumps(Hostile())],
    ids=["longest header", "long header", "no object", "pickle"],
)  # fmt: skip
def test_safetensors(exported: Path, content: bytes) -> None:
    from safetensors import SafetensorError

    from megnorm.hf.convert import from_hf

    (exported / "model.safetensors").write_bytes(content)

    def work() -> None:
        with pytest.raises((ValueError, SafetensorError)):
            from_hf(exported)

    assert in_little_memory(work, exported / "log") == 0, (exported / "log").read_text()
