"""Options of data: which token files, how they are split, ordered and mixed."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class DataConfig:
    """Token files written by ``megnorm preprocess`` (or by Megatron) and the order of samples.

    path: prefix, or several, of ``PREFIX.bin`` and ``PREFIX.idx``.
    weights: share of each path in the training mixture, any positive scale; empty: in proportion to tokens.
    epochs: instead of weights, how often each path is read relative to the others (1, 1, 2: the third twice as often).
    split: fractions of the documents' tokens for train, valid and test, cut at document ends, in file order.
    valid, test: prefixes of their own for these splits; ``split`` is then not used and ``path`` is all train.
    tokenizer: the tokenizer.json, or the folder that holds one, with which the files were written.
    order: "default" needs no index and reads each sample in one piece; "megatron" repeats Megatron's GPT order.
    separate_documents: rows are packed documents that do not attend to each other (``Batch.cu_seqlens``).
    reset_positions: positions start again at every document; always so with separate_documents.
    fim_rate: share of document pieces rearranged for fill-in-the-middle; fim_tokens: ids of the marks before prefix,
    middle and suffix; fim_spm: share of them in the order suffix, prefix, middle.
    mask_end: no loss for what follows an end-of-document token; eod: its id, None: as recorded by ``preprocess``.
    cache: folder on a local disk for the index of order "megatron", built once per node; None: each rank builds it.
    verify: compare every file with its recorded checksums before the first batch.
    """

    path: str | tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    epochs: tuple[float, ...] = ()
    split: tuple[float, float, float] = (0.98, 0.01, 0.01)
    valid: str | tuple[str, ...] = ()
    test: str | tuple[str, ...] = ()
    tokenizer: str | None = None
    order: Literal["default", "megatron"] = "default"
    separate_documents: bool = False
    reset_positions: bool = False
    mask_end: bool = False
    eod: int | None = None
    fim_rate: float = 0.0
    fim_tokens: tuple[int, ...] = ()
    fim_spm: float = 0.5
    cache: str | None = None
    verify: bool = False

    def paths(self, split: str) -> tuple[str, ...]:
        """The prefixes that serve a split."""
        own = {"train": (), "valid": self.valid, "test": self.test}[split] or self.path
        return (own,) if isinstance(own, str) else tuple(own)

    def fractions(self, split: str) -> tuple[float, float]:
        """Where a split begins and ends in its files, as fractions of their tokens."""
        if self.valid or self.test:
            own = {"train": True, "valid": bool(self.valid), "test": bool(self.test)}[split]
            return (0.0, 1.0) if own else (0.0, 0.0)
        total = sum(self.split)
        if len(self.split) != 3 or min(self.split) < 0 or total <= 0:
            raise ValueError(f"data.split is {self.split}: give three fractions >= 0, as in [0.98, 0.01, 0.01].")
        ends = [0.0]
        for part in self.split:  # added up in Megatron's way, so that rounding falls alike
            ends.append(ends[-1] + part / total)
        place = ("train", "valid", "test").index(split)
        if not any(self.split[place + 1 :]):
            ends[place + 1] = 1.0
        return ends[place], ends[place + 1]
