"""Small data sets for the tests of this folder."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from megnorm.data.indexed import IndexedDataset, IndexedWriter
from megnorm.data.preprocess import Job
from megnorm.data.tokenizer import load

TEXTS = ["one two", "", "drei vier \u00fcnf", "x" * 300, "line\nbreak", "last"]
GOOD = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in TEXTS)


def write(prefix: Path, documents: list[list[int]], dtype: str = "uint16") -> str:
    """Write documents, each one sequence; returns the prefix."""
    with IndexedWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(document)
    return str(prefix)


def numbered(prefix: Path, tokens: int, *, documents: int = 7, vocab: int = 60000, seed: int = 0) -> str:
    """A data set whose token at place i is i modulo vocab, cut into random documents."""
    cuts = np.sort(np.random.default_rng(seed).choice(np.arange(1, tokens), documents - 1, replace=False))
    return write(prefix, [part.tolist() for part in np.split(np.arange(tokens) % vocab, cuts)])


def job(source: Path, out: Path, **options: object) -> Job:
    base = Job(inputs=(str(source),), output=str(out), tokenizer="bytes", progress=False, max_line_bytes=1 << 20)
    return replace(base, **options)


def texts_of(prefix: Path) -> list[str]:
    data, words = IndexedDataset(prefix), load("bytes")
    return ["".join(words.decode(part) for part in data.document(i)) for i in range(data.document_count)]


def files(prefix: Path) -> list[bytes]:
    return [Path(f"{prefix}{suffix}").read_bytes() for suffix in (".bin", ".idx")]


def command(project: Path, source: Path, out: Path, *more: object) -> list[str]:
    tool = project / "tools/preprocess_data.py"
    words = [sys.executable, tool, "--input", source, "--output-prefix", out, "--tokenizer-type", "ByteLevelTokenizer"]
    return [*map(str, words), "--append-eod", "--quiet", *map(str, more)]
