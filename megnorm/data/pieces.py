"""Byte-level BPE by table: a text is cut where a word and its space begin, and each piece is encoded once.

GPT-2's pattern always begins a word at a space that stands between a non-blank or a run of blanks and a non-blank, and
looks at nothing to its left, so what lies between such spaces can be encoded apart. ``str.split`` finds them many times
faster than a regular expression would. A text with a cut of which this is not sure goes to the library as a whole.
Pieces seen for the first time are put together from words, of which there are few.
"""

import json
import re
from array import array
from typing import Any

import numpy as np
from numpy.typing import NDArray

ENTRIES = 1 << 20  # pieces kept, and words; about 150 MB each
LONGEST = 64  # characters of a piece or word worth keeping
BLANK = r" \t\n\r\f\v"
WORD = re.compile(
    rf"'(?:[stmd]|re|ve|ll)| ?(?:[A-Za-z]+|[0-9]+|[^{BLANK}A-Za-z0-9]+)|[{BLANK}]+(?![^{BLANK}])|[{BLANK}]+"
)
# How byte-level BPE writes the ASCII that cannot be seen.
MARKS = dict(zip([*range(33), 127], range(256, 290), strict=True))


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


def _cut(text: str) -> list[str]:
    """The pieces by name: without the space it begins with, NUL before the first, a NUL for every other space."""
    if "\0" in text:
        return [""]  # names could not tell its NULs from spaces
    names = ("\0" + text).replace("  ", "\0\0").replace(" \n", "\0\n").split(" ")
    return names if len(names) * LONGEST > len(text) else [""]  # no words: the library's threads do that better


class _Words(dict[str, bytes]):
    """Tokens of each ASCII word, from the model itself."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __missing__(self, word: str) -> bytes:
        ids = _pack([token.id for token in self.model.tokenize(word.translate(MARKS))])
        if len(self) >= ENTRIES:
            self.clear()
        if len(word) <= LONGEST:
            self[word] = ids
        return ids


class _Table(dict[str, bytes | None]):
    """Tokens of each piece by name, None where it cannot be encoded apart; learns what it is asked for."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.words = inner, _Words(inner.model)
        added = [re.escape(token.content) for token in inner.get_added_tokens_decoder().values()]
        self.added = re.compile("|".join(added or ["(?!)"]))

    def __missing__(self, name: str) -> bytes | None:
        ids = self._encode(name)
        if len(self) >= ENTRIES:
            self.clear()
        if len(name) <= LONGEST:
            self[name] = ids
        return ids

    def _encode(self, name: str) -> bytes | None:
        if not name or name[0].isspace() or self.added.search(name):
            return None  # the cut before it may lie within a run of blanks
        piece = (name[1:] if name[0] == "\0" else " " + name).replace("\0", " ")
        if piece.isascii():
            return b"".join(map(self.words.__getitem__, WORD.findall(piece)))
        return _pack(self.inner.encode(piece, add_special_tokens=False).ids)


class Pieces:
    """Encodes with a table in front of a ``tokenizers`` tokenizer."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.table = inner, _Table(inner)

    def encode_batch(self, texts: list[str]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """(tokens of all texts, number of tokens of each)."""
        look = self.table.__getitem__
        parts, whole = [], []
        for place, text in enumerate(texts):
            try:
                parts.append(b"".join(map(look, _cut(text))))  # type: ignore[arg-type]
            except TypeError:
                parts.append(b"")
                whole.append(place)
        found = self.inner.encode_batch_fast([texts[place] for place in whole], add_special_tokens=False)
        for place, item in zip(whole, found, strict=True):
            parts[place] = _pack(item.ids)
        return np.frombuffer(b"".join(parts), np.int32), np.array([len(part) // 4 for part in parts], np.int64)


def _pack(ids: list[int]) -> bytes:
    return array("i", ids).tobytes()
