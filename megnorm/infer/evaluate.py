"""What a trained model is judged by: perplexity of texts by token, byte and word; tasks of lm-eval."""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megnorm.data.documents import Lines, Tally, documents, find_inputs, plan_units
from megnorm.hf.families.rope import longest_input
from megnorm.infer.generate import Generator
from megnorm.infer.score import likelihoods, windows

RESULTS = "eval.jsonl"
LONGEST_LINE = 1 << 28  # bytes


@dataclass(frozen=True)
class TextLoss:
    """-log p of texts in nats, and what it is shared among. words: as lm-eval counts, split at white space."""

    nats: float
    tokens: int
    bytes: int
    words: int

    def values(self) -> dict[str, float]:
        """Raises ValueError where there is nothing to share among."""
        if not self.tokens:
            raise ValueError("the texts hold no token; give others")
        return {
            "loss": self.nats / self.tokens,
            "token_perplexity": _exp(self.nats / self.tokens),
            "byte_perplexity": _exp(self.nats / self.bytes),
            "word_perplexity": _exp(self.nats / self.words),
            "bits_per_byte": self.nats / self.bytes / math.log(2.0),
        }


def _exp(x: float) -> float:
    return math.exp(x) if x < 700.0 else math.inf


def text_loss(generator: Generator, texts: Sequence[str], *, batch: int) -> TextLoss:
    """Each text from its beginning, behind an end-of-document token as in training."""
    tokenizer = tokenizer_of(generator)
    longest, before = longest_input(generator.model.config), begin_of(generator)
    nats, tokens = 0.0, 0
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        nats -= sum(
            one.log for one in likelihoods(generator.model, windows(ids, before, longest), longest=longest, batch=batch)
        )
        tokens += len(ids)
    return TextLoss(
        nats, tokens, sum(len(text.encode()) for text in texts), sum(len(re.split(r"\s+", text)) for text in texts)
    )


def tokenizer_of(generator: Generator) -> Any:
    if generator.tokenizer is None:
        raise ValueError(f"{generator.source} has no tokenizer; give --tokenizer")
    return generator.tokenizer


def begin_of(generator: Generator) -> int:
    """The token that stands before a text. Raises ValueError where the tokenizer marks no end or begin of documents."""
    tokenizer = tokenizer_of(generator)
    for token in (tokenizer.eos_token_id, tokenizer.bos_token_id):
        if token is not None:
            return int(token)
    raise ValueError(f"{generator.source}: the tokenizer has no end-of-document token, behind which a text could begin")


def read_texts(patterns: Sequence[str], key: str, limit: int | None) -> list[str]:
    """Texts of JSONL (packed too), TSV or Parquet files; a bad line is an error."""
    found: list[str] = []
    for text in _texts(patterns, key):
        if limit is not None and len(found) >= limit:
            break
        found.append(text)
    return found


def _texts(patterns: Sequence[str], key: str) -> Iterator[str]:
    for unit in plan_units(find_inputs(patterns), 1 << 62):
        for _, (text,) in documents(Lines(unit, LONGEST_LINE), [key], Tally(strict=True)):
            yield text


def table(results: Mapping[str, Mapping[str, float]]) -> str:
    """Lines of task, metric, value and its standard error."""
    lines = []
    for task, values in results.items():
        for name, value in values.items():
            if not name.endswith("_stderr"):
                error = values.get(f"{name}_stderr")
                lines.append(
                    f"{task:<24} {name:<20} {value:>12.4f}" + (f" +- {error:.4f}" if error is not None else "")
                )
    return "\n".join(lines)


@dataclass(frozen=True)
class Report:
    """One line of ``eval.jsonl``. step: of the checkpoint; None: an exported folder. signatures: of scores that have them.
    asked: names of the files and tasks that it was judged by, of which one may have several results."""

    source: str
    step: int | None
    results: Mapping[str, Mapping[str, float]]
    signatures: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    asked: Sequence[str] = ()

    def append(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        record = {name: value for name, value in asdict(self).items() if value or name not in ("signatures", "asked")}
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def done_steps(path: Path, asked: Sequence[str]) -> set[int]:
    """Steps that a file of reports holds, judged by all that is asked for."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    found: dict[int | None, set[str]] = {}
    for line in map(json.loads, lines):
        found.setdefault(line["step"], set()).update(line.get("asked") or line["results"])
    return {step for step, names in found.items() if step is not None and names >= set(asked)}
