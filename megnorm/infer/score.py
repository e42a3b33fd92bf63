"""Log-likelihoods of given tokens, in batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Row = tuple[list[int], list[int]]
"""Tokens that are given (at least one), and those behind them whose likelihood is asked."""


@dataclass(frozen=True)
class Likelihood:
    """log p of a row's second part, in nats, and whether each of its tokens was the most likely one."""

    log: float
    greedy: bool


def likelihoods(model: Any, rows: Sequence[Row], *, longest: int | None, batch: int) -> list[Likelihood]:
    """Of each row, in order. model: a causal one of transformers. longest: tokens it takes; more are cut off in front.

    Raises ValueError for a row without given tokens, or whose second part is longer than the model takes.
    """
    for given, asked in rows:
        if not given:
            raise ValueError(
                "a likelihood needs a token to begin from; the tokenizer has no end-of-document token to take"
            )
        if longest is not None and len(asked) > longest:
            raise ValueError(
                f"{len(asked)} tokens are to be scored at once and the model takes {longest}; cut them in windows"
            )
    found: dict[int, Likelihood] = {i: Likelihood(0.0, True) for i, (_, asked) in enumerate(rows) if not asked}
    order = sorted((i for i in range(len(rows)) if i not in found), key=lambda i: -len(rows[i][0]) - len(rows[i][1]))
    for first in range(0, len(order), batch):
        some = order[first : first + batch]
        found |= dict(zip(some, _batch(model, [rows[i] for i in some], longest), strict=True))
    return [found[i] for i in range(len(rows))]


@torch.no_grad()
def _batch(model: Any, rows: Sequence[Row], longest: int | None) -> Iterator[Likelihood]:
    cut = [(given + asked)[-(longest + 1) if longest is not None else 0 :] for given, asked in rows]
    width = max(map(len, cut)) - 1
    # Filled up behind: a causal model does not look there.
    ids = torch.tensor([row[:-1] + [0] * (width + 1 - len(row)) for row in cut], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits
    for line, row, (_, asked) in zip(logits, cut, rows, strict=True):
        yield _of(line[len(row) - 1 - len(asked) : len(row) - 1], torch.tensor(asked, device=line.device))


def _of(logits: Tensor, asked: Tensor) -> Likelihood:
    """logits [n, v] of the places before the tokens asked [n]."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log = wide.log_softmax(-1).gather(-1, asked[:, None])
    return Likelihood(float(log.sum(dtype=torch.float64)), bool((logits.argmax(-1) == asked).all()))


def windows(tokens: Sequence[int], before: int, longest: int | None) -> list[Row]:
    """A long text as rows in which each token is asked once; before: the token in front of the text.

    As lm-eval cuts: whole windows one behind the other, each after the last token of the one before; the last reaches as far
    back as the model takes.
    """
    size, text = longest or max(len(tokens), 1), [before, *tokens]
    rows: list[Row] = []
    for first in range(0, len(tokens), size):
        last = min(first + size, len(tokens))
        begin = max(last - size, 0)
        rows.append((text[begin : first + 1], text[first + 1 : last + 1]))
    return rows
