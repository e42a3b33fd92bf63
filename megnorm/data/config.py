"""Options of data: which token files, for which task, how they are split, ordered and mixed."""

from dataclasses import dataclass, field
from typing import Literal

MULTIPLE = 8  # padded lengths of pairs are multiples of it


def padded_length(length: int) -> int:
    """The length to which a batch is padded whose longest row is so long."""
    return -(-length // MULTIPLE) * MULTIPLE


Task = Literal["causal", "masked", "spans", "pairs", "classes"]


@dataclass(frozen=True)
class MaskConfig:
    """Masked language modelling. probability: share of tokens to predict.

    unit: what is chosen at once: a token, a whole word, or a span of whole words (geometric lengths of mean_span, at most
    longest_span). keep, swap: shares of the chosen tokens that stay or become random; the others become the mask token.
    token: name of the mask token, None: [MASK] or <mask>. begin, end: names of tokens that frame every row, as [CLS] and
    [SEP]; None: rows are a piece of the token stream and nothing else.
    """

    probability: float = 0.15
    unit: Literal["token", "word", "span"] = "token"
    keep: float = 0.1
    swap: float = 0.1
    mean_span: float = 3.0
    longest_span: int = 10
    token: str | None = None
    begin: str | None = None
    end: str | None = None

    def __post_init__(self) -> None:
        for name, good, wanted in (
            ("probability", 0.0 < self.probability <= 1.0, "above 0 and at most 1"),
            ("keep", 0.0 <= self.keep <= 1.0, "from 0 to 1"),
            ("swap", self.swap >= 0.0 and self.keep + self.swap <= 1.0 + 1e-9, "from 0 to 1 - data.mask.keep"),
            ("mean_span", self.mean_span >= 1.0, "at least 1"),
            ("longest_span", self.longest_span >= 1, "at least 1"),
        ):
            if not good:
                raise ValueError(f"data.mask.{name}={getattr(self, name)} must be {wanted}")


@dataclass(frozen=True)
class SpanConfig:
    """T5's span corruption. density: share of tokens taken out, in spans of mean_span tokens on average.

    sentinels: first and last id of the marks that stand for spans (T5's run downwards); None: <extra_id_0>,
    <extra_id_1>, ... of data.tokenizer. Rows of train.sequence_length tokens become a shorter source and a target.
    """

    density: float = 0.15
    mean_span: float = 3.0
    sentinels: tuple[int, int] | None = None

    def lengths(self, row: int) -> tuple[int, int]:
        """Source and target of a row of so many tokens, with enough sentinels; each ends with an end-of-document token."""
        noise = min(max(round(row * self.density), 1), row - 1)
        spans = min(max(round(noise / self.mean_span), 1), row - noise)
        return row - noise + spans + 1, noise + spans + 2


@dataclass(frozen=True)
class PairConfig:
    """Translation pairs, bucketed by length. sides: what stands behind a prefix of data.path for source and target.

    tokens_per_batch: most padded tokens of a bucket, on its longer side; a sample of this task is one bucket, so
    train.global_batch counts buckets. longest: pairs with a longer side (its tag included) are left out and counted.

    data.path may have several prefixes. languages: source and target of each, as in [[en, de], [en, fr]]; then ``tag``, with
    the target's name in the place of {}, names a token that stands before the source, or with which the decoder begins
    (tag_on: target). both_ways: every prefix is read backwards too.
    temperature: T of the share (n_i / sum n)^(1 / T) that a direction of n_i pairs has of an epoch; 1: what it has.
    """

    sides: tuple[str, str] = ("_0", "_1")
    tokens_per_batch: int = 4096
    longest: int = 512
    languages: tuple[tuple[str, str], ...] = ()
    both_ways: bool = False
    tag: str = "<2{}>"
    tag_on: Literal["source", "target"] = "source"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 1.0 <= self.temperature < float("inf"):
            raise ValueError(f"data.pairs.temperature is {self.temperature}; give a number from 1 (no change) up")
        if self.both_ways and not self.languages:
            raise ValueError("data.pairs.both_ways needs tags that tell the target; name data.pairs.languages")
        if "{}" not in self.tag:
            raise ValueError(f"data.pairs.tag is {self.tag}; write {{}} where the language stands, as in <2{{}}>")
        if self.tag_on == "target" and not self.languages:
            raise ValueError("data.pairs.tag_on says where tags stand, and there are none; name data.pairs.languages")


@dataclass(frozen=True)
class ClassConfig:
    """Classification. data.path and data.valid name TSV (with a header) or JSONL files.

    texts, label: columns; by default all but the last, and the last. names: the classes in order; by default those of
    the training file, sorted. begin, end: names of the tokens before the first text and behind each. regression: the label
    is a number.
    """

    texts: tuple[str, ...] = ()
    label: str | None = None
    names: tuple[str, ...] = ()
    begin: str = "[CLS]"
    end: str = "[SEP]"
    regression: bool = False


@dataclass(frozen=True)
class DataConfig:
    """Token files written by ``megnorm preprocess`` (or by Megatron) and the order of samples.

    path: prefix, or several, of ``PREFIX.bin`` and ``PREFIX.idx``; also in an object store (s3://bucket/prefix).
    task: what is made of them: causal, masked, spans (T5), pairs (translation) or classes; options of a task lie in the
    section of its name (mask for masked).
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
    pad: id that fills up short rows of spans, pairs and classes; start: first token of a decoder, None: pad.
    cache: folder on a local disk for what is made once per node: the index of order "megatron", and .idx files of object
    stores; None: each rank makes its own.
    verify: compare every file with its recorded checksums before the first batch.
    """

    path: str | tuple[str, ...] = ()
    task: Task = "causal"
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
    pad: int = 0
    start: int | None = None
    fim_rate: float = 0.0
    fim_tokens: tuple[int, ...] = ()
    fim_spm: float = 0.5
    cache: str | None = None
    verify: bool = False
    mask: MaskConfig = field(default_factory=MaskConfig)
    spans: SpanConfig = field(default_factory=SpanConfig)
    pairs: PairConfig = field(default_factory=PairConfig)
    classes: ClassConfig = field(default_factory=ClassConfig)

    def paths(self, split: str) -> tuple[str, ...]:
        """The prefixes that serve a split."""
        own = {"train": (), "valid": self.valid, "test": self.test}[split] or self.path
        return (own,) if isinstance(own, str) else tuple(own)

    def longest_pair(self, row: int) -> tuple[int, int]:
        """Tokens of the longest source and target that a batch of task pairs or spans may have. row: of the token stream."""
        pair = self.spans.lengths(row) if self.task == "spans" else (self.pairs.longest, self.pairs.longest)
        return padded_length(pair[0]), padded_length(pair[1])

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
