"""Small data sets for the tests of this folder."""

from pathlib import Path

import numpy as np

from megnorm.data.indexed import IndexedWriter


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
