"""JSONL to .bin/.idx: units of input are encoded on their own, each to a part file, and joined in input order.

A unit that is done stays done: after a kill the same command goes on with the rest. Parts are written by one process
that uses the tokenizer's threads, or by many ranks under MPI; the result is the same byte for byte.
"""

import glob
import hashlib
import json
import multiprocessing
import os
import queue
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from megnorm.data.atomic import write_atomic
from megnorm.data.documents import SHOWN, Lines, Tally, Unit, documents, find_inputs, plan_units
from megnorm.data.errors import DataError
from megnorm.data.indexed import IndexedDataset, IndexedWriter, smallest_dtype
from megnorm.data.ranks import Ranks
from megnorm.data.tokenizer import Tokenizer, fingerprint, load

BATCH = 1 << 21  # bytes of JSON encoded at a time
SENTENCE = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]*[^\Wa-z])|(?<=[\u3002\uff01\uff1f])|\n\s*\n")


@dataclass(frozen=True)
class Job:
    """What to preprocess. output: prefix; with several keys, or names "megatron", keys are added to it.

    workers: processes; one by itself uses all threads of the tokenizer.
    """

    inputs: tuple[str, ...]
    output: str
    tokenizer: str
    keys: tuple[str, ...] = ("text",)
    append_eod: bool = True
    eod_token: str | None = None
    sentences: bool = False
    strict: bool = False
    workers: int = 1
    names: str = "plain"
    unit_bytes: int | None = None
    max_line_bytes: int = 64 << 20
    progress: bool = True

    def prefix(self, key: str) -> str:
        """Where the tokens of a key go."""
        if self.names == "megatron":
            return f"{self.output}_{key}_{'sentence' if self.sentences else 'document'}"
        return self.output if len(self.keys) == 1 else f"{self.output}_{key}"


@dataclass
class Report:
    """What was done. empty: documents without tokens, kept as Megatron keeps them. bad, first: lines left out."""

    documents: int = 0
    empty: int = 0
    tokens: int = 0
    bytes: int = 0
    bad: int = 0
    first: list[str] = field(default_factory=list)
    seconds: float = 0.0
    resumed: int = 0

    def add(self, other: dict[str, Any]) -> None:
        for name in ("documents", "empty", "tokens", "bytes", "bad"):
            setattr(self, name, getattr(self, name) + other[name])
        self.first = (self.first + other["first"])[:SHOWN]


def run(job: Job) -> Report:
    """Preprocess; under MPI every rank takes its units and rank 0 joins them. The report is whole on rank 0."""
    ranks = Ranks.find()
    begun = time.monotonic()
    paths = find_inputs(job.inputs)
    units = plan_units(paths, job.unit_bytes or unit_size(paths))
    tokenizer = load(job.tokenizer, eod=job.eod_token)
    if job.append_eod and tokenizer.eod is None:
        raise DataError(
            f"{job.tokenizer}: has no end-of-document token: name one with --eod-token, or pass --no-append-eod."
        )
    parts = Path(f"{job.output}.parts")
    report = Report()
    if ranks.rank == 0:
        _claim(parts, job, units)
        report.resumed = sum(_done(parts, number).is_file() for number in range(len(units)))
    ranks.barrier()
    mine = list(range(ranks.rank, len(units), ranks.size))
    todo = [number for number in mine if not _done(parts, number).is_file()]
    try:
        total, left = (sum(units[i].bytes for i in numbers) for numbers in (mine, todo))
        name = f"rank 0 of {ranks.size}" if ranks.size > 1 else "preprocess"
        with Progress(total, total - left, hidden=not job.progress or ranks.rank != 0, name=name) as progress:
            if job.workers > 1 and len(todo) > 1:
                _share(job, {number: units[number] for number in todo}, parts, progress)
            else:
                for number in todo:
                    encode_unit(job, tokenizer, units[number], number, parts, progress)
    except BaseException:
        if ranks.size == 1 and not any(parts.glob("*.done")):
            shutil.rmtree(parts)  # nothing in it to go on from
        raise
    ranks.barrier()
    if ranks.rank == 0:
        _join(job, tokenizer, parts, len(units), report)
        shutil.rmtree(parts)
    ranks.barrier()
    report.seconds = time.monotonic() - begun
    return report


def unit_size(paths: Sequence[str]) -> int:
    """Input is cut in about 64 units of 1 to 64 MiB, whoever works on them: so another number of workers can go on."""
    total = sum(Path(path).stat().st_size for path in paths)
    return min(max(total // 64, 1 << 20), 64 << 20)


_TOKENIZER: Tokenizer | None = None  # of a worker process


def _start_worker(path: str, eod: str | None, threads: int) -> None:
    global _TOKENIZER
    os.environ["RAYON_NUM_THREADS"] = str(threads)  # read by the library at its first batch
    _TOKENIZER = load(path, eod=eod)


def _work(job: Job, unit: Unit, number: int, parts: Path) -> dict[str, Any]:
    assert _TOKENIZER is not None
    with Progress(unit.bytes, hidden=True) as progress:
        return asdict(encode_unit(job, _TOKENIZER, unit, number, parts, progress))


def _share(job: Job, units: Mapping[int, Unit], parts: Path, progress: "Progress") -> None:
    """Units over worker processes. A worker that dies ends the run; what is done stays done."""
    threads = max(1, (os.cpu_count() or 1) // job.workers)
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(job.workers, context, _start_worker, (job.tokenizer, job.eod_token, threads))
    try:
        futures = {pool.submit(_work, job, unit, number, parts): unit for number, unit in units.items()}
        for future in as_completed(futures):
            progress.add(Report(**future.result()), futures[future].bytes)
    except BrokenProcessPool:
        raise DataError(
            f"a worker process died (killed, or out of memory): {job.output} is not written; run the same command again "
            "to go on, with fewer --workers if memory is short."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


class Progress:
    """The progress bar: bytes of input, with documents, megabytes of JSON and tokens a second."""

    def __init__(self, total: int, done: int = 0, *, hidden: bool, name: str = "preprocess") -> None:
        self.bar: tqdm[Any] = tqdm(total=total, initial=done, unit="B", unit_scale=True, disable=hidden, desc=name)
        self.sum, self.begun = Report(), time.monotonic()

    def add(self, done: Report, moved: int) -> None:
        """What was done since the last call, and the bytes of input it took."""
        self.sum.add(asdict(done))
        spent = max(time.monotonic() - self.begun, 1e-9)
        self.bar.set_postfix_str(
            f"{self.sum.documents / spent:,.0f} documents/s, {self.sum.bytes / spent / 1e6:.2f} MB/s, "
            f"{self.sum.tokens / spent:,.0f} tokens/s",
            refresh=False,
        )
        self.bar.update(moved)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()


def _done(parts: Path, number: int) -> Path:
    return parts / f"{number:06d}.done"


def _claim(parts: Path, job: Job, units: Sequence[Unit]) -> None:
    """Take up the parts of an interrupted run of the same job; drop those of another."""
    skip = ("workers", "strict", "progress", "inputs", "unit_bytes")
    what = {name: value for name, value in asdict(job).items() if name not in skip}
    stamps = {unit.path: Path(unit.path).stat().st_mtime_ns for unit in units}
    what |= {"units": [asdict(unit) for unit in units], "stamps": stamps, "tokenizer": fingerprint(job.tokenizer)}
    mark = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
    label = parts / "job"
    if parts.is_dir() and not (label.is_file() and label.read_text() == mark):
        if not label.is_file() and any(parts.iterdir()):
            raise DataError(f"{parts}: is in the way: it is not the work folder of an earlier run; move it.")
        print(f"{parts} is of another job or other input: starting anew.", file=sys.stderr)
        shutil.rmtree(parts)
    parts.mkdir(parents=True, exist_ok=True)
    write_atomic(label, mark.encode())
    for torn in parts.glob(".*.tmp"):
        torn.unlink()


def encode_unit(job: Job, tokenizer: Tokenizer, unit: Unit, number: int, parts: Path, progress: Progress) -> Report:
    """Write the part files of one unit, then the report that says they are whole."""
    tally, report, lines = Tally(job.strict), Report(), Lines(unit, job.max_line_bytes)
    dtype = smallest_dtype(tokenizer.vocab_size)
    eod = tokenizer.eod if job.append_eod else None
    writers = [IndexedWriter(parts / f"{number:06d}.{i}", dtype) for i in range(len(job.keys))]
    shown = 0
    try:
        for size, columns in _ahead(_batches(lines, job, tally)):
            step = Report(documents=len(columns[0]), bytes=size)
            for writer, texts in zip(writers, columns, strict=True):
                tokens, lengths, ends = encode(texts, tokenizer, eod, job.sentences)
                writer.add(tokens, lengths, ends)
                step.empty += int((np.diff(ends, prepend=0) == 0).sum())
                step.tokens += len(tokens)
            report.add(asdict(step))
            progress.add(step, lines.position - shown)
            shown = lines.position
        for writer in writers:
            writer.finish()
    except BaseException:
        for writer in writers:
            writer.discard()
        raise
    progress.add(Report(), unit.bytes - shown)
    report.bad, report.first = tally.count, tally.first
    write_atomic(_done(parts, number), json.dumps(asdict(report)).encode())
    return report


def _batches(lines: Lines, job: Job, tally: Tally) -> Iterator[tuple[int, list[list[str]]]]:
    """(bytes, for each key the texts) in pieces of about BATCH bytes."""
    columns: list[list[str]] = [[] for _ in job.keys]
    size = 0
    for count, texts in documents(lines, job.keys, tally):
        for column, text in zip(columns, texts, strict=True):
            column.append(text)
        size += count
        if size >= BATCH:
            yield size, columns
            columns, size = [[] for _ in job.keys], 0
    if size:
        yield size, columns


def _ahead(items: Iterator[Any], depth: int = 2) -> Iterator[Any]:
    """The same items, made by a thread while the tokenizer (which lets go of the interpreter) works."""
    line: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
    stop = threading.Event()

    def put(kind: str, value: Any) -> None:
        while not stop.is_set():
            try:
                line.put((kind, value), timeout=0.1)
                return
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put("item", item)
                if stop.is_set():
                    return
            put("end", None)
        except BaseException as error:
            put("error", error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            kind, value = line.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        stop.set()
        thread.join()


def encode(
    texts: list[str], tokenizer: Tokenizer, eod: int | None, sentences: bool
) -> tuple[NDArray[Any], NDArray[np.int64], NDArray[np.int64]]:
    """(tokens, lengths of sequences, sequences written when each document ends), as ``IndexedWriter.add`` takes them.

    A sequence without tokens is left out; eod ends each document that has tokens.
    """
    owner = np.arange(len(texts))
    if sentences:
        pieces = [[piece for piece in SENTENCE.split(text) if piece] for text in texts]
        owner = np.repeat(owner, [len(piece) for piece in pieces])
        values, lengths = tokenizer.encode_batch([piece for one in pieces for piece in one])
    else:
        values, lengths = tokenizer.encode_batch(texts)
    sizes = lengths[lengths > 0]
    counts = np.bincount(owner[lengths > 0], minlength=len(texts))
    ends = np.cumsum(counts)
    if eod is not None:
        last = ends[counts > 0] - 1  # the last sequence of every document that has one
        values = np.insert(values.astype(np.int64), np.cumsum(sizes)[last], eod)
        sizes[last] += 1
    return values, sizes, ends


def _join(job: Job, tokenizer: Tokenizer, parts: Path, count: int, report: Report) -> None:
    """One output per key out of all parts, in order."""
    for number in range(count):
        if not _done(parts, number).is_file():
            raise DataError(f"{parts}: unit {number} is not there: put --output on a disk that all ranks share.")
        report.add(json.loads(_done(parts, number).read_text()))
    if report.documents == 0:
        told = f" ({'; '.join(report.first)})" if report.first else ""
        raise DataError(f"{', '.join(job.inputs)}: no document with {' and '.join(job.keys)} in it{told}.")
    for place, key in enumerate(job.keys):
        prefix = Path(job.prefix(key))
        for torn in prefix.parent.glob(f".{glob.escape(prefix.name)}.*.*.tmp"):
            torn.unlink()  # of a run that was killed while it joined
        with IndexedWriter(prefix, smallest_dtype(tokenizer.vocab_size)) as writer:
            for number in range(count):
                writer.add_dataset(IndexedDataset(parts / f"{number:06d}.{place}"))
            writer.notes = {
                "tokenizer": fingerprint(job.tokenizer) | {"vocab_size": tokenizer.vocab_size},
                "eod": tokenizer.eod if job.append_eod else None,
                "documents": report.documents,
                "tokens": writer.elements,
            }
