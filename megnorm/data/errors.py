"""The error that data problems raise, and what may not change in the middle of a run."""

from collections.abc import Mapping
from typing import Any

NAMES = {
    "task": "data.task",
    "order": "data.order",
    "sequence_length": "train.sequence_length",
    "seed": "train.seed",
    "row": "data.mask.begin or data.mask.end",
    "tokens_per_batch": "data.pairs.tokens_per_batch",
    "longest": "data.pairs.longest",
    "mixture": "the mixture of directions (data.pairs.temperature, tag_on, ids of tags)",
    "content": "the content of data.path",
}


class DataError(ValueError):
    """Data or options are wrong; the sentence names the file, row or field and the remedy."""


def require_same(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on where the order of samples would be another than when the checkpoint was written."""
    for name, value in now.items():
        if before.get(name) != value:
            raise DataError(
                f"{NAMES[name]} was {before.get(name)} when the checkpoint was written and is {value} now: samples would "
                "repeat or be skipped; put it back, or start a new run from the weights alone (checkpoint.init_from)."
            )
