"""Loaders that corrupt rows of the token stream: masked language models and T5. Masks are new in every epoch."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megnorm.data.batch import Batch, PairBatch
from megnorm.data.config import DataConfig
from megnorm.data.errors import DataError
from megnorm.data.loader import Loader
from megnorm.data.pairs import collate
from megnorm.data.samples import key
from megnorm.data.tasks import MaskConfig, corrupt_spans, mask
from megnorm.data.tokenizer import HuggingFace, load

SPECIAL = (
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "<pad>",
    "<unk>",
    "<s>",
    "</s>",
    "<mask>",
    "<|endoftext|>",
    "<|pad|>",
)


def word_table(tokenizer: HuggingFace, size: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """(special [size], begins a word [size]) of every id, by the marks of WordPiece, byte-level BPE or SentencePiece."""
    names = [tokenizer.inner.id_to_token(number) or "" for number in range(size)]
    special = np.array([name == "" or name in SPECIAL for name in names])
    if any(name.startswith("##") for name in names):
        return special, np.array([not name.startswith("##") for name in names])
    begins = np.array([name.startswith(("\u0120", "\u010a", "\u2581")) for name in names])
    if not begins.any():
        raise DataError("the tokenizer does not tell where words begin: use data.mask.unit=token.")
    return special, begins


class MaskedLoader(Loader):
    """Rows of L tokens, some of them corrupted; labels are the true tokens, loss_mask is 1 where one is to be predicted."""

    def __init__(
        self, config: DataConfig, split: str, mask_config: MaskConfig, *, mask_token: str = "[MASK]", **rest: Any
    ):
        super().__init__(config, split, **rest)
        if config.tokenizer is None:
            raise DataError("data.tokenizer is needed for masked language models: it tells the mask token and words.")
        tokenizer = load(config.tokenizer)
        if not isinstance(tokenizer, HuggingFace) or tokenizer.inner.token_to_id(mask_token) is None:
            raise DataError(f"{config.tokenizer}: has no token {mask_token}: use a tokenizer that has one.")
        self.mask_config, self.mask_id = mask_config, int(tokenizer.inner.token_to_id(mask_token))
        self.special, self.begins = np.ones(self.vocab_size, np.bool_), None
        names = min(tokenizer.vocab_size, self.vocab_size)
        if mask_config.unit == "token":
            listed = [tokenizer.inner.id_to_token(number) or "" for number in range(names)]
            self.special[:names] = [name == "" or name in SPECIAL for name in listed]
        else:
            self.begins = np.zeros(self.vocab_size, np.bool_)
            self.special[:names], self.begins[:names] = word_table(tokenizer, names)
        self.special[self.mask_id] = True

    def batch(self, first_sample: int, count: int, dp_rank: int = 0, dp_size: int = 1) -> Batch:
        """As in ``Loader``; every sample id has its own mask."""
        plain = super().batch(first_sample, count, dp_rank, dp_size)
        rows, first = count // dp_size, first_sample + dp_rank * (count // dp_size)
        tokens = plain.tokens.numpy().T
        inputs, wanted = np.empty_like(tokens), np.empty(tokens.shape, np.float32)
        for row in range(rows):
            random = np.random.RandomState(key(self.seed, "mask", first + row) % 2**32)
            inputs[row], wanted[row] = mask(
                tokens[row],
                random,
                self.mask_config,
                mask_id=self.mask_id,
                vocab_size=self.vocab_size,
                special=self.special,
                begins_word=self.begins,
            )
        return Batch(torch.from_numpy(inputs).t(), plain.tokens, torch.from_numpy(wanted).t(), plain.positions)


class SpanLoader(Loader):
    """T5: rows of L tokens as pairs of corrupted source and the spans taken out of it."""

    def __init__(
        self,
        config: DataConfig,
        split: str,
        *,
        sentinels: Sequence[int],
        eos: int,
        density: float = 0.15,
        mean_span: float = 3.0,
        **rest: Any,
    ) -> None:
        super().__init__(config, split, **rest)
        if len(sentinels) < 2 or not 0 < density < 1 or mean_span < 1:
            raise DataError("span corruption needs two sentinels or more, 0 < density < 1 and mean_span >= 1.")
        self.sentinels, self.eos, self.density, self.mean_span = list(sentinels), eos, density, mean_span

    def pairs(self, first_sample: int, count: int, dp_rank: int = 0, dp_size: int = 1) -> PairBatch:
        """Source and target of the rows that ``Loader.batch`` would give."""
        plain = self.batch(first_sample, count, dp_rank, dp_size)
        first, found = first_sample + dp_rank * (count // dp_size), []
        for row, tokens in enumerate(plain.tokens.numpy().T):
            random = np.random.RandomState(key(self.seed, "spans", first + row) % 2**32)
            found.append(
                corrupt_spans(
                    tokens,
                    random,
                    density=self.density,
                    mean_span=self.mean_span,
                    sentinels=self.sentinels,
                    eos=self.eos,
                )
            )
        return collate([pair[0] for pair in found], [pair[1] for pair in found], start=0, pad=0)

    def state(self, consumed_samples: int) -> dict[str, Any]:
        """As in ``Loader``, with the task."""
        state: Mapping[str, Any] = super().state(consumed_samples)
        return {**state, "task": "spans"}
