"""The remedy when memory has run out."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megnorm.train.config import TrainConfig

# What torch's allocators say; on the CPU it is a plain RuntimeError.
WORDS = re.compile(r"out of memory|can't allocate memory|not enough memory|DefaultCPUAllocator", re.IGNORECASE)
ASKED = re.compile(r"[Tt]r(?:ied|ying) to allocate ([\d.]+ ?[KMGT]?i?B|\d+ bytes)")


def out_of_memory(error: BaseException, train: TrainConfig) -> str | None:
    """The sentence for an error that means that memory has run out, else None."""
    text = str(error)
    cuda = isinstance(error, torch.OutOfMemoryError)
    if not (cuda or isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and WORDS.search(text))):
        return None
    asked = ASKED.search(text)
    more = f" ({asked[1]} more were asked for)" if asked else ""
    remedies = [f"lower train.micro_batch (now {train.micro_batch})"] if train.micro_batch > 1 else []
    remedies += ["set train.recompute=[block]"] if "block" not in train.recompute else []
    remedies += ["split the model with a larger parallel.tp or parallel.pp"]
    return f"out of {'accelerator' if cuda else 'main'} memory{more}: {', or '.join(remedies)}; the run then goes on"


class MemoryEndedError(RuntimeError):
    """Memory has run out; the message says what to change."""


@contextmanager
def remedied(train: TrainConfig) -> Iterator[None]:
    """Turns errors of memory that has run out into a MemoryEndedError."""
    try:
        yield
    except Exception as error:
        sentence = out_of_memory(error, train)
        if sentence is None:
            raise
        raise MemoryEndedError(sentence) from error
