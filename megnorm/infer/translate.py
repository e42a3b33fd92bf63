"""Lines of text through a trained encoder-decoder, and BLEU and chrF of what comes out."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from megnorm import config as configs
from megnorm.checkpoint import io
from megnorm.data import languages
from megnorm.data.config import padded_length
from megnorm.data.tokenizer import Tokenizer
from megnorm.data.tokenizer import load as load_tokenizer
from megnorm.hf.native import checkpoint_of, read_record
from megnorm.infer.beam import Beam, beam_search
from megnorm.layers.env import Env
from megnorm.models.encdec import EncoderDecoder
from megnorm.norms.resolve import from_json, settled
from megnorm.parallel.layout import named_matrices
from megnorm.parallel.mesh import Mesh


@dataclass(frozen=True)
class Translator:
    """A run's model and tokenizer. start, end, pad: ids as the run was trained with.

    tags: of every language that it translates to; empty: it knows one direction, without a tag. tag_on: where it stands.
    """

    model: EncoderDecoder
    tokenizer: Tokenizer
    start: int
    end: int
    pad: int
    tags: Mapping[str, int] = field(default_factory=dict)
    tag_on: Literal["source", "target"] = "source"

    def target(self, language: str | None) -> str | None:
        """The language to translate to: the one that is asked for, or the only one; None: there are no tags.

        Raises ValueError where it is not known.
        """
        if language is None and len(self.tags) > 1:
            raise ValueError(f"the model translates to {', '.join(self.tags)}; choose one by --to")
        if language is not None and language not in self.tags:
            known = f"to {', '.join(self.tags)} alone" if self.tags else "without tags of languages"
            raise ValueError(f"--to {language}: the model was trained {known}")
        return language or next(iter(self.tags), None)


def load(source: Path, *, device: str = "cpu", tokenizer: str | None = None, end: str | None = None) -> Translator:
    """From a run folder or a checkpoint. end: name of the token that ends both sides; None: the tokenizer's own.

    Raises ValueError where the run is no encoder-decoder, names no tokenizer, or was not written by megnorm.
    """
    path = checkpoint_of(source)
    record = read_record(path)
    config = configs.from_dict(record["config"], f"{path / 'meta.json'}: config")
    m, data = config.model, config.data
    if m.family != "encdec":
        raise ValueError(f"{path}: model.family={m.family} cannot translate; give the run of an encoder-decoder")
    where = tokenizer or data.tokenizer
    if where is None:
        raise ValueError(f"{path}: the run names no tokenizer; give --tokenizer")
    words = load_tokenizer(where, eod=end)
    if words.eod is None:
        raise ValueError(f"{where}: the tokenizer has no end-of-document token; name the one that ends a text by --end")
    model = EncoderDecoder(
        m, settled(from_json(record["resolved"]), record["step"]), m.vocab_size, Env(Mesh(device=torch.device(device)))
    ).eval()
    state = io.read_full(path, [n.name for n in named_matrices(model)])
    with torch.no_grad():
        for n in named_matrices(model):
            n.view().copy_(state[n.name])
    start = data.pad if data.start is None else data.start
    tags = languages.tags(data.pairs, words)
    return Translator(model, words, start, words.eod, data.pad, tags, data.pairs.tag_on)


def translate(
    one: Translator, lines: Sequence[str], beam: Beam, *, to: str | None = None, tokens: int = 4096
) -> list[str]:
    """A line for each line. to: the language. tokens: padded ones of the source that are worked on at a time.

    Raises ValueError for a line that is longer than the model takes, and for a language that it does not know.
    """
    language = one.target(to)
    front: list[int] = []
    if language is not None and one.tag_on == "source":
        front = [one.tags[language]]
    elif language is not None:
        beam = replace(beam, start=one.tags[language])
    ids, sizes = one.tokenizer.encode_batch(list(lines))
    rows = [[*front, *part, one.end] for part in _split(ids.tolist(), sizes.tolist())]
    longest = one.model.cfg.source_positions
    for number, row in enumerate(rows, 1):
        if len(row) > longest:
            raise ValueError(f"line {number} has {len(row)} tokens and the model takes {longest}; shorten it")
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    found, first = [""] * len(rows), 0
    device = next(one.model.parameters()).device
    while first < len(order):
        last = first + 1
        while last < len(order) and (last + 1 - first) * len(rows[order[last]]) <= tokens:
            last += 1
        chosen = order[first:last]
        height = min(padded_length(max(len(rows[i]) for i in chosen)), longest)
        source = torch.full((height, len(chosen)), one.pad)
        for column, i in enumerate(chosen):
            source[: len(rows[i]), column] = torch.tensor(rows[i])
        lengths = torch.tensor([len(rows[i]) for i in chosen])
        real = torch.arange(height)[:, None] < lengths
        for i, out in zip(chosen, beam_search(one.model, source.to(device), real.to(device), beam), strict=True):
            found[i] = one.tokenizer.decode(out)
        first = last
    return found


def _split(ids: list[int], sizes: list[int]) -> list[list[int]]:
    rows, at = [], 0
    for size in sizes:
        rows.append(ids[at : at + size])
        at += size
    return rows


@dataclass(frozen=True)
class Quality:
    """Scores of sacrebleu on its scale of 100. spreads: half the 95% interval of each, over 1000 choices of as many sentences
    with repetition. signatures: how each was computed, by name."""

    bleu: float
    chrf: float
    spreads: Mapping[str, float]
    lines: tuple[str, ...]
    signatures: Mapping[str, str]

    def values(self) -> dict[str, float]:
        """By name; a spread goes by the name of what it belongs to."""
        spreads = {f"{name}_spread": spread for name, spread in self.spreads.items()}
        return {"bleu": self.bleu, "chrf": self.chrf, **spreads}


def scorer() -> Any:
    """sacrebleu's metrics. Raises a ValueError where it is not installed; to be asked before anything is translated."""
    try:
        from sacrebleu import metrics
    except ImportError:
        raise ValueError("BLEU needs sacrebleu: pip install megnorm[scores]") from None
    return metrics


def quality(said: Sequence[str], references: Sequence[str], *, target: str = "") -> Quality:
    """BLEU and chrF, by sacrebleu. target: the language, which it cuts words by."""
    if len(said) != len(references):
        raise ValueError(f"there are {len(said)} translations and {len(references)} references; give one for each line")
    metrics = {"bleu": scorer().BLEU(trg_lang=target), "chrf": scorer().CHRF()}
    scores = {
        name: metric.corpus_score(list(said), [list(references)], n_bootstrap=1000) for name, metric in metrics.items()
    }
    signatures = {name: str(metric.get_signature()) for name, metric in metrics.items()}
    told = {
        name: json.loads(scores[name].format(width=6, signature=signatures[name], is_json=True)) for name in metrics
    }
    spreads = {name: float(one.get("confidence_var", 0.0)) for name, one in told.items()}
    lines = tuple(f"{scores[name]}  {signatures[name]}" for name in metrics)
    return Quality(float(scores["bleu"].score), float(scores["chrf"].score), spreads, lines, signatures)


def read_pairs(path: Path, limit: int | None = None) -> tuple[list[str], list[str]]:
    """Texts and their translations: the first two columns of a TSV."""
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").split("\n") if line][:limit]
    if min(map(len, rows), default=0) < 2:
        raise ValueError(f"{path}: a line needs two columns, text and translation, with a tab between")
    return [row[0] for row in rows], [row[1] for row in rows]
