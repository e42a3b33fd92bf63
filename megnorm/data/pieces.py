"""Byte-level BPE by table: each run of characters between blanks is encoded once and then looked up.

GPT-2's pattern always ends a word where white space begins, and looks at nothing to its left, so the pieces
``[blanks][non-blanks]`` of a text can be encoded apart. The one exception, a piece that ends in white space which is not
ASCII, sends the whole text to the library. On English text this is several times faster than encoding every word anew.
"""

import json
import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

PIECE = re.compile(r"[ \t\n\r\f\v]*[^ \t\n\r\f\v]+|[ \t\n\r\f\v]+")
ENTRIES = 1 << 20  # pieces kept; about 150 MB
LONGEST = 64  # characters of a piece worth keeping


def applies(inner: Any) -> bool:
    """Is this a tokenizer whose pieces are independent: GPT-2's pattern, no normalizer, plain added tokens?"""
    spec = json.loads(inner.to_str())
    split = spec.get("pre_tokenizer") or {}
    added = spec.get("added_tokens", [])
    return (
        spec.get("normalizer") is None
        and spec["model"].get("type") == "BPE"
        and not spec["model"].get("dropout")
        and split.get("type") == "ByteLevel"
        and split.get("use_regex", True)
        and not split.get("add_prefix_space")
        and not any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in added)
        and all(token["content"] and not re.search(r"\s", token["content"]) for token in added)
    )


class Pieces:
    """Encodes with a table in front of a ``tokenizers`` tokenizer."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.table: dict[str, bytes | None] = {}

    def encode_batch(self, texts: list[str]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """(tokens of all texts, number of tokens of each)."""
        pieces = [PIECE.findall(text) for text in texts]
        new = set().union(*pieces).difference(self.table)
        if new:
            self._learn(list(new))
        look = self.table.__getitem__
        parts = []
        for text, words in zip(texts, pieces, strict=True):
            try:
                parts.append(b"".join(map(look, words)))  # type: ignore[arg-type]
            except TypeError:
                parts.append(_pack(self.inner.encode(text, add_special_tokens=False).ids))
        for piece in new:
            if len(piece) > LONGEST:
                del self.table[piece]
        if len(self.table) > ENTRIES:
            self.table.clear()
        return np.frombuffer(b"".join(parts), np.int32), np.array([len(part) // 4 for part in parts], np.int64)

    def _learn(self, pieces: list[str]) -> None:
        for piece, found in zip(pieces, self.inner.encode_batch_fast(pieces, add_special_tokens=False), strict=True):
            alone = not piece[-1].isspace() or piece[-1] in " \t\n\r\f\v"
            self.table[piece] = _pack(found.ids) if alone else None


def _pack(ids: list[int]) -> bytes:
    return np.array(ids, np.int32).tobytes()
