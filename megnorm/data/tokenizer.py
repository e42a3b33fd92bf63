"""Tokenizers by path, and training a small one.

A path is a tokenizer.json or a folder with one (Hugging Face), a folder with vocab.json and merges.txt (GPT-2) or
vocab.txt (BERT), a SentencePiece file (*.model), "tiktoken:NAME", or "bytes". Libraries are imported when needed.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megnorm.data.atomic import write_atomic
from megnorm.data.config import DataConfig
from megnorm.data.errors import DataError
from megnorm.data.pieces import Pieces, applies

END, PAD = "<|endoftext|>", "<|pad|>"
END_NAMES = (END, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")


class Tokenizer(Protocol):
    """What preprocessing and inspection need. eod: id of the end-of-document token, None where there is none.

    encode_batch gives the tokens of all texts, one after the other, and how many each text has.
    """

    vocab_size: int
    eod: int | None

    def encode_batch(self, texts: list[str]) -> tuple[NDArray[Any], NDArray[np.int64]]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def token_id(self, name: str) -> int | None: ...


def flatten(ids: Sequence[Sequence[int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Lists of ids as one array and their lengths."""
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    return np.fromiter(chain.from_iterable(ids), np.int64, int(lengths.sum())), lengths


class HuggingFace:
    """The ``tokenizers`` library; a batch is spread over its own threads, or looked up in a table where that is exact."""

    def __init__(self, inner: Any, eod: str | None = None) -> None:
        self.inner = inner
        self.inner.no_truncation()
        self.inner.no_padding()
        self.pieces = Pieces(inner) if applies(inner) else None
        self.vocab_size = int(inner.get_vocab_size(with_added_tokens=True))
        names = (eod,) if eod else END_NAMES
        found = (inner.token_to_id(name) for name in names)
        self.eod = next((number for number in found if number is not None), None)
        if eod and self.eod is None:
            raise DataError(f"the tokenizer has no token {eod!r}: name its end-of-document token with --eod-token.")

    def encode_batch(self, texts: list[str]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        if self.pieces is not None:
            return self.pieces.encode_batch(texts)
        return flatten([item.ids for item in self.inner.encode_batch_fast(texts, add_special_tokens=False)])

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.inner.decode(list(ids), skip_special_tokens=False))

    def token_id(self, name: str) -> int | None:
        number: int | None = self.inner.token_to_id(name)
        return number


class SentencePiece:
    """The ``sentencepiece`` library (extra "data")."""

    def __init__(self, path: Path, eod: str | None = None) -> None:
        try:
            import sentencepiece
        except ImportError:
            raise DataError(f"{path}: SentencePiece files need the extra: pip install megnorm[data].") from None
        self.inner = sentencepiece.SentencePieceProcessor(model_file=str(path))
        self.vocab_size = int(self.inner.vocab_size())
        number = self.inner.piece_to_id(eod) if eod else self.inner.eos_id()
        self.eod = None if number < 0 else int(number)

    def encode_batch(self, texts: list[str]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        return flatten(self.inner.encode(texts, num_threads=os.cpu_count() or 1))

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.inner.decode(list(ids)))

    def token_id(self, name: str) -> int | None:
        number = int(self.inner.piece_to_id(name))
        return number if self.inner.id_to_piece(number) == name else None


class Tiktoken:
    """The ``tiktoken`` library (extra "data"); it fetches its files unless they are in its cache."""

    def __init__(self, name: str, eod: str | None = None) -> None:
        try:
            import tiktoken
        except ImportError:
            raise DataError(f"tiktoken:{name} needs the extra: pip install megnorm[data].") from None
        try:
            self.inner = tiktoken.get_encoding(name)
        except (ValueError, OSError) as error:
            raise DataError(
                f"tiktoken:{name}: cannot be had ({type(error).__name__}); fill TIKTOKEN_CACHE_DIR."
            ) from None
        self.vocab_size = int(self.inner.n_vocab)
        self.eod: int | None = int(self.inner.encode_single_token(eod) if eod else self.inner.eot_token)

    def encode_batch(self, texts: list[str]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        return flatten(self.inner.encode_ordinary_batch(texts, num_threads=os.cpu_count() or 1))

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.inner.decode(list(ids)))

    def token_id(self, name: str) -> int | None:
        return int(self.inner.encode_single_token(name)) if name in self.inner.special_tokens_set else None


class Bytes:
    """Ids 0 to 255 are the bytes of UTF-8, 256 ends a document."""

    vocab_size: int = 257
    eod: int | None = 256

    def encode_batch(self, texts: list[str]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        parts = [text.encode() for text in texts]
        return np.frombuffer(b"".join(parts), np.uint8), np.array([len(part) for part in parts], np.int64)

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def token_id(self, name: str) -> int | None:
        return None  # bytes have no names


def load(path: str, *, eod: str | None = None) -> Tokenizer:
    """The tokenizer at a path. eod: name of its end-of-document token, None: its own eos_token or a usual name."""
    if path == "bytes":
        return Bytes()
    if path.startswith("tiktoken:"):
        return Tiktoken(path.removeprefix("tiktoken:"), eod)
    files = files_of(path)
    if files[0].suffix == ".model":
        return SentencePiece(files[0], eod)
    from tokenizers import Tokenizer as Inner
    from tokenizers.implementations import BertWordPieceTokenizer, ByteLevelBPETokenizer

    try:
        if files[0].name == "vocab.txt":
            inner: Any = BertWordPieceTokenizer(str(files[0]))._tokenizer
        elif len(files) == 2:
            inner = ByteLevelBPETokenizer(str(files[0]), str(files[1]))._tokenizer
        else:
            inner = Inner.from_file(str(files[0]))
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"{files[0]}: not a tokenizer file ({error}).") from None
    return HuggingFace(inner, eod or _eos_token(files[0].parent))


def tokenizer_of(config: DataConfig) -> Tokenizer:
    """The tokenizer that a task needs, for the ids of its marks."""
    if config.tokenizer is None:
        raise DataError(f"data.tokenizer is needed for data.task={config.task}: it tells the ids of its marks.")
    return load(config.tokenizer)


def id_of(tokenizer: Tokenizer, name: str, key: str) -> int:
    """The id of a named token; ``key`` of the config names it."""
    number = tokenizer.token_id(name)
    if number is None:
        raise DataError(f"{key}: the tokenizer has no token {name}: name one that it has, or use another tokenizer.")
    return number


def files_of(path: str) -> list[Path]:
    """The files a tokenizer path stands for."""
    place = Path(path)
    if place.is_file():
        return [place, place.with_name("merges.txt")] if place.name == "vocab.json" else [place]
    for names in (
        ("tokenizer.json",),
        ("vocab.json", "merges.txt"),
        ("vocab.txt",),
        ("spm.model",),
        ("tokenizer.model",),
    ):
        if all((place / name).is_file() for name in names):
            return [place / name for name in names]
    raise DataError(
        f"{path}: no tokenizer there: give a tokenizer.json, a folder that holds one, a SentencePiece .model file, or "
        "make one with megnorm tokenizer train."
    )


def is_there(path: str) -> bool:
    """Is something at the path, or is it a name that needs no file?"""
    return path == "bytes" or path.startswith("tiktoken:") or Path(path).exists()


def fingerprint(path: str) -> dict[str, str]:
    """Name and sha256 of a tokenizer, recorded beside the data it wrote."""
    if path == "bytes" or path.startswith("tiktoken:"):
        return {"name": path, "sha256": hashlib.sha256(path.encode()).hexdigest()}
    digest = hashlib.sha256()
    for file in files_of(path):
        digest.update(file.read_bytes())
    return {"name": Path(path).name, "sha256": digest.hexdigest()}


def _eos_token(folder: Path) -> str | None:
    config = folder / "tokenizer_config.json"
    if not config.is_file():
        return None
    token = json.loads(config.read_text()).get("eos_token")
    return token.get("content") if isinstance(token, dict) else token


def train(texts: Iterable[str], out: str | Path, *, vocab_size: int) -> int:
    """Train a byte-level BPE and write it to a folder that transformers' AutoTokenizer loads; returns its size.

    Ids 0 and 1 are <|endoftext|> and <|pad|>, then the 256 bytes: every text can be written without unknown tokens.
    """
    if vocab_size < 258:
        raise DataError(
            f"--vocab-size is {vocab_size}: a byte-level tokenizer needs at least 258 (256 bytes and 2 marks)."
        )
    from tokenizers import Tokenizer as Inner
    from tokenizers import decoders, models, pre_tokenizers, trainers

    inner = Inner(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "bos_token": END,
        "unk_token": END,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(1e30),
    }
    folder = Path(out)
    write_atomic(folder / "tokenizer.json", inner.to_str(pretty=True).encode())
    write_atomic(folder / "tokenizer_config.json", json.dumps(config, indent=1).encode())
    return int(inner.get_vocab_size())
