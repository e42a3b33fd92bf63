"""Lines of text through a trained encoder-decoder, and BLEU and chrF of what comes out."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megnorm import config as configs
from megnorm.checkpoint import io
from megnorm.data.config import padded_length
from megnorm.data.tokenizer import Tokenizer
from megnorm.data.tokenizer import load as load_tokenizer
from megnorm.hf.native import checkpoint_of
from megnorm.infer.beam import Beam, beam_search
from megnorm.layers.env import Env
from megnorm.models.encdec import EncoderDecoder
from megnorm.norms.resolve import from_json
from megnorm.parallel.layout import named_matrices
from megnorm.parallel.mesh import Mesh


@dataclass(frozen=True)
class Translator:
    """A run's model and tokenizer. start, end, pad: ids as the run was trained with."""

    model: EncoderDecoder
    tokenizer: Tokenizer
    start: int
    end: int
    pad: int


def load(source: Path, *, device: str = "cpu", tokenizer: str | None = None, end: str | None = None) -> Translator:
    """From a run folder or a checkpoint. end: name of the token that ends both sides; None: the tokenizer's own.

    Raises ValueError where the run is no encoder-decoder, or names no tokenizer.
    """
    path = checkpoint_of(source)
    record = io.read_meta(path)
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
        m, from_json(record["resolved"]), m.vocab_size, Env(Mesh(device=torch.device(device)))
    ).eval()
    state = io.read_full(path, [n.name for n in named_matrices(model)])
    with torch.no_grad():
        for n in named_matrices(model):
            n.view().copy_(state[n.name])
    return Translator(model, words, data.pad if data.start is None else data.start, words.eod, data.pad)


def translate(one: Translator, lines: Sequence[str], beam: Beam, *, tokens: int = 4096) -> list[str]:
    """A line for each line. tokens: padded ones of the source that are worked on at a time.

    Raises ValueError for a line that is longer than the model takes.
    """
    ids, sizes = one.tokenizer.encode_batch(list(lines))
    rows = [[*part, one.end] for part in _split(ids.tolist(), sizes.tolist())]
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


def quality(said: Sequence[str], references: Sequence[str], *, target: str = "") -> list[str]:
    """BLEU with its signature, and chrF, a line each. target: its language, which sacrebleu cuts words by."""
    try:
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError:
        raise ValueError("BLEU needs sacrebleu: pip install megnorm[eval]") from None
    if len(said) != len(references):
        raise ValueError(f"there are {len(said)} translations and {len(references)} references; give one for each line")
    metrics = (BLEU(trg_lang=target), CHRF())
    return [f"{metric.corpus_score(list(said), [list(references)])}  {metric.get_signature()}" for metric in metrics]
