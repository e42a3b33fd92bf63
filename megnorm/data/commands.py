"""Verbs of the command line: preprocess, data and tokenizer. ``VERBS`` maps each to (help, add_arguments, main)."""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

import numpy as np

from megnorm.data import preprocess, tokenizer
from megnorm.data.config import DataConfig, Task
from megnorm.data.documents import Lines, Tally, documents, find_inputs, plan_units
from megnorm.data.errors import DataError
from megnorm.data.indexed import IndexedDataset, IndexedWriter, strip_suffix
from megnorm.data.ranks import Ranks
from megnorm.data.sidecar import read_sidecar, sum_files, verify, write_sidecar

LIMIT = 64 << 20
LARGEST_ID = 1 << 31  # the vocabulary where samples are only looked at, and marks may lie beyond the tokenizer


def add_preprocess_arguments(parser: argparse.ArgumentParser) -> None:
    """megnorm preprocess"""
    parser.add_argument(
        "--input", nargs="+", required=True, help="JSONL files or quoted globs; .gz .bz2 .xz .zst as they are"
    )
    parser.add_argument("--output", required=True, help="prefix: PREFIX.bin and PREFIX.idx are written")
    parser.add_argument(
        "--tokenizer", required=True, help='tokenizer.json, its folder, a .model file, "tiktoken:NAME" or "bytes"'
    )
    parser.add_argument(
        "--keys",
        nargs="+",
        default=["text"],
        help="JSON keys, or column numbers of .tsv; with several, PREFIX_KEY.bin and .idx each",
    )
    parser.add_argument("--eod-token", help="name of the end-of-document token (default: the tokenizer's own)")
    parser.add_argument("--no-append-eod", action="store_true", help="do not end documents with that token")
    parser.add_argument("--split-sentences", action="store_true", help="one sequence for each sentence")
    parser.add_argument(
        "--strict", action="store_true", help="stop at the first bad line (default: skip, count and tell)"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes (one uses the tokenizer's own threads)")
    parser.add_argument(
        "--max-line-bytes", type=int, default=LIMIT, help="longer lines are bad lines (default: 64 MiB)"
    )
    parser.add_argument("--unit-bytes", type=int, help="size of the units in which input is shared and resumed")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run_preprocess(args: argparse.Namespace) -> int:
    """Write PREFIX.bin and PREFIX.idx."""
    return run_job(
        preprocess.Job(
            inputs=tuple(args.input),
            output=strip_suffix(args.output),
            tokenizer=args.tokenizer,
            keys=tuple(args.keys),
            append_eod=not args.no_append_eod,
            eod_token=args.eod_token,
            sentences=args.split_sentences,
            strict=args.strict,
            workers=args.workers,
            unit_bytes=args.unit_bytes,
            max_line_bytes=args.max_line_bytes,
            progress=not args.quiet,
        )
    )


def run_job(job: preprocess.Job) -> int:
    """Run a job and tell what was done; a failing rank ends all ranks."""
    ranks = Ranks.find()
    if ranks.size > 1 and ranks.rank == 0:  # said before, because a launcher kills all ranks when one dies
        print(
            f"{ranks.size} ranks; should one be killed, {job.output} is not written, and the same command goes on where it "
            "stopped.",
            file=sys.stderr,
            flush=True,
        )
    try:
        report = preprocess.run(job)
    except BaseException as error:
        if ranks.size > 1:
            print(f"rank {ranks.rank}: {error}", file=sys.stderr, flush=True)
            ranks.abort()
        raise
    if ranks.rank == 0:
        files = ", ".join(f"{job.prefix(key)}.bin/.idx" for key in job.keys)
        rate = report.bytes / max(report.seconds, 1e-9) / 1e6
        print(
            f"{report.documents:,} documents ({report.empty:,} empty), {report.tokens:,} tokens, "
            f"{report.bytes / 1e6:,.1f} MB of JSON in {report.seconds:.1f} s ({rate:.2f} MB/s) -> {files}"
        )
        if report.resumed:
            print(f"{report.resumed} units of input had been done by an earlier run.")
        if report.bad:
            print(f"{report.bad:,} lines were left out:", *report.first, sep="\n  ", file=sys.stderr)
    return 0


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """megnorm data inspect | verify | merge | split | index"""
    verbs = parser.add_subparsers(dest="action", required=True)

    def verb(name: str, text: str, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=text)
        sub.set_defaults(data_action=run)
        sub.add_argument("--multimodal", action="store_true", help="the .idx ends with modes")
        return sub

    sub = verb(
        "inspect", "Print sizes, and documents or the samples of a task, as text where there is a tokenizer.", _inspect
    )
    sub.add_argument("prefix", help="PREFIX of .bin/.idx; for the task classes a TSV or JSONL file")
    sub.add_argument("--tokenizer", help="decode with this tokenizer")
    sub.add_argument("--task", choices=get_args(Task), help="print samples of this task instead of documents")
    sub.add_argument("--count", "--documents", type=int, default=3, help="how many documents or samples to print")
    sub.add_argument("--first", type=int, default=0, help="the first of them")
    sub.add_argument("--tokens", type=int, default=100, help="tokens of each document to print")
    sub.add_argument("--sequence-length", type=int, default=128, help="train.sequence_length of the samples")
    sub.add_argument("--seed", type=int, default=1234, help="train.seed of the samples")
    sub.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="key=value",
        help="options of data for the samples, as in mask.unit=word",
    )
    sub = verb("verify", "Check .idx and, by checksums, every byte.", _verify)
    sub.add_argument("prefix", nargs="+")
    sub.add_argument(
        "--write", action="store_true", help="record checksums of the files as they are (data of other tools)"
    )
    sub = verb("merge", "Join data sets in the order given.", _merge)
    sub.add_argument("prefix", nargs="+")
    sub.add_argument("--output", required=True)
    sub = verb("split", "Cut a data set at document ends into PREFIX_0, PREFIX_1, ...", _split)
    sub.add_argument("prefix")
    sub.add_argument("--output", required=True)
    sub.add_argument("--fractions", nargs="+", type=float, required=True, help="of the documents, as in 0.98 0.01 0.01")
    sub = verb("index", 'Build the index of order "megatron" ahead, in a cache folder.', _index)
    sub.add_argument("prefix", nargs="+")
    sub.add_argument("--cache", required=True)
    sub.add_argument("--sequence-length", type=int, required=True)
    sub.add_argument("--seed", type=int, required=True)
    sub.add_argument("--samples", type=int, help="of the whole run (steps x global batch); default: one epoch")
    sub.add_argument("--split", nargs=3, type=float, default=[0.98, 0.01, 0.01])
    sub.add_argument("--which", default="train", choices=["train", "valid", "test"])
    sub.add_argument("--weights", nargs="*", type=float, default=[])


def run_data(args: argparse.Namespace) -> int:
    """The action of megnorm data."""
    action: Callable[[argparse.Namespace], int] = args.data_action
    return action(args)


def _inspect(args: argparse.Namespace) -> int:
    if args.task is not None:
        return _inspect_samples(args)
    if args.set:
        raise DataError(f"--set {args.set[0]}: needs --task, which prints samples instead of documents.")
    data = IndexedDataset(args.prefix, multimodal=args.multimodal)
    record = read_sidecar(data.prefix) or {}
    print(
        f"{data.prefix}: {data.document_count:,} documents, {len(data):,} sequences, "
        f"{data.total:,} tokens, {data.dtype.name}"
    )
    if len(data):
        quantiles = np.quantile(data.lengths[:10_000_000], [0, 0.5, 0.9, 1]).astype(int)
        print("tokens in a sequence: least {:,}, median {:,}, 90% {:,}, most {:,}".format(*quantiles))
    for name in ("tokenizer", "eod", "max_id"):
        if record.get(name) is not None:
            print(f"{name}: {record[name]}")
    words = tokenizer.load(args.tokenizer) if args.tokenizer else None
    for index in range(args.first, min(args.first + args.count, data.document_count)):
        parts = data.document(index)
        count = sum(len(part) for part in parts)
        ids = [int(number) for part in parts for number in part[: args.tokens]][: args.tokens]
        print(f"--- document {index}: {len(parts)} sequences, {count:,} tokens")
        print(words.decode(ids) if words else " ".join(map(str, ids)), "..." if count > args.tokens else "")
    return 0


def _inspect_samples(args: argparse.Namespace) -> int:
    """As a training run would get them, of a split that is all of the data unless options say otherwise."""
    from megnorm.data.choose import open_split  # they need torch, which the other verbs start faster without
    from megnorm.data.show import read_options, show

    base = {"path": args.prefix, "task": args.task, "tokenizer": args.tokenizer, "split": (1, 0, 0)}
    config = read_options(base, args.set)
    words = tokenizer.load(config.tokenizer) if config.tokenizer else None
    loader = open_split(
        config,
        "train",
        sequence_length=args.sequence_length,
        seed=args.seed,
        vocab_size=words.vocab_size if words is not None and args.task == "masked" else LARGEST_ID,
        samples=args.first + args.count,
    )
    print(f"{args.prefix}: task {args.task}, {loader.samples():,} samples in an epoch")
    for text in show(loader, words, args.first, args.count):
        print(text)
    return 0


def _verify(args: argparse.Namespace) -> int:
    for name in args.prefix:
        data = IndexedDataset(name, multimodal=args.multimodal)
        if args.write:
            largest = None
            if data.dtype.kind in "iu":
                largest = data.largest()
            write_sidecar(data.prefix, sum_files(data.prefix), {"max_id": largest})
            print(f"{data.prefix}: checksums written")
        else:
            chunks = verify(data.prefix)
            print(f"{data.prefix}: index sound, {chunks} chunks equal their checksums")
    return 0


def _merge(args: argparse.Namespace) -> int:
    parts = [IndexedDataset(name, multimodal=args.multimodal) for name in args.prefix]
    with IndexedWriter(args.output, parts[0].dtype, multimodal=args.multimodal) as writer:
        for part in parts:
            writer.add_dataset(part)
        known = [read_sidecar(part.prefix) or {} for part in parts]
        for name in ("tokenizer", "eod"):
            values = [record.get(name) for record in known]
            if all(value == values[0] for value in values) and values[0] is not None:
                writer.notes[name] = values[0]
    print(f"{writer.prefix}: {writer.sequences:,} sequences, {writer.elements:,} tokens out of {len(parts)} data sets")
    return 0


def _split(args: argparse.Namespace) -> int:
    data = IndexedDataset(args.prefix, multimodal=args.multimodal)
    if min(args.fractions) < 0 or sum(args.fractions) <= 0:
        raise DataError(f"--fractions {args.fractions}: give numbers >= 0, as in 0.98 0.01 0.01.")
    ends = np.rint(np.cumsum([0.0, *args.fractions]) / sum(args.fractions) * data.document_count).astype(int)
    record = read_sidecar(data.prefix) or {}
    for place, (first, last) in enumerate(zip(ends[:-1], ends[1:], strict=True)):
        with IndexedWriter(f"{strip_suffix(args.output)}_{place}", data.dtype, multimodal=args.multimodal) as writer:
            writer.notes = {name: record[name] for name in ("tokenizer", "eod") if name in record}
            for index in range(first, last):
                low, high = int(data.documents[index]), int(data.documents[index + 1])
                start = data.document_start(index)
                tokens = data.read(start, data.document_start(index + 1) - start)
                writer.add_document(
                    tokens, data.lengths[low:high].tolist(), () if data.modes is None else data.modes[low:high]
                )
        print(f"{writer.prefix}: documents {first} to {last}, {writer.elements:,} tokens")
    return 0


def _index(args: argparse.Namespace) -> int:
    from megnorm.data.megatron_order import MegatronOrder

    config = DataConfig(
        path=tuple(args.prefix),
        weights=tuple(args.weights),
        split=tuple(args.split),
        order="megatron",
        cache=args.cache,
    )
    data = [IndexedDataset(name, multimodal=args.multimodal) for name in args.prefix]
    order = MegatronOrder(config, args.which, data, args.sequence_length, args.seed, args.samples)
    print(f"{args.cache}: index of {order.samples:,} samples is there")
    return 0


def add_tokenizer_arguments(parser: argparse.ArgumentParser) -> None:
    """megnorm tokenizer train"""
    verbs = parser.add_subparsers(dest="action", required=True)
    sub = verbs.add_parser(
        "train", help="train a byte-level BPE", description="Train a byte-level BPE tokenizer on text (JSONL, TSV)."
    )
    sub.add_argument(
        "--input", nargs="+", required=True, help="JSONL or TSV files or quoted globs; .gz .bz2 .xz .zst as they are"
    )
    sub.add_argument("--output", required=True, help="folder for tokenizer.json and tokenizer_config.json")
    sub.add_argument("--vocab-size", type=int, required=True)
    sub.add_argument("--keys", "--key", nargs="+", default=["text"], help="JSON keys, or columns of TSV from 0 on")
    sub.add_argument("--strict", action="store_true", help="stop at the first bad line")


def run_tokenizer(args: argparse.Namespace) -> int:
    """Train a tokenizer."""
    tally = Tally(args.strict)

    def texts() -> Iterator[str]:
        for unit in plan_units(find_inputs(args.input), 1 << 62):
            for _, found in documents(Lines(unit, LIMIT), args.keys, tally):
                yield from found

    size = tokenizer.train(texts(), args.output, vocab_size=args.vocab_size)
    print(f"{Path(args.output) / 'tokenizer.json'}: byte-level BPE with {size:,} tokens")
    if tally.count:
        print(f"{tally.count:,} lines were left out:", *tally.first, sep="\n  ", file=sys.stderr)
    return 0


VERBS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int]]] = {
    "preprocess": ("text to tokens: JSONL to .bin/.idx", add_preprocess_arguments, run_preprocess),
    "data": ("inspect, verify, merge, split and index token files", add_data_arguments, run_data),
    "tokenizer": ("train a small tokenizer", add_tokenizer_arguments, run_tokenizer),
}
