"""Speed of the data code: preprocessing, indices, random reads, blending; a line for each, with the figure to beat.

Figures to beat were measured with Megatron-LM d98e8a6 on two quiet cores. With PEERS_SRC naming a checkout of it, its own
preprocess_data.py also runs here, on the same text with the same tokenizer, and the files are compared byte for byte.
Figures are medians; compare them with others only at a like load of the machine, which is printed.
Needs --text (JSONL) and --tokenizer for the preprocessing lines; the others make their own data.
"""

import argparse
import filecmp
import gzip
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from megnorm.data import blending, megatron_order
from megnorm.data.config import DataConfig
from megnorm.data.indexed import IndexedDataset, IndexedWriter
from megnorm.data.loader import Loader
from megnorm.data.samples import DefaultOrder, Mixture, shares

LENGTH = 1024
ROOT = Path(__file__).resolve().parent.parent.parent


def line(what: str, found: str, goal: str = "") -> None:
    """Print one result."""
    print(f"{what:<58} {found:>30}  {goal}", flush=True)


def timed(work: Callable[[], object], repeat: int = 7) -> float:
    """Median seconds of some runs."""
    return statistics.median(clock(work) for _ in range(repeat))


def clock(work: Callable[[], object]) -> float:
    """Seconds of one run."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def synthetic(prefix: Path, documents: int, mean: int) -> str:
    """Random tokens in documents of mean tokens on average."""
    random = np.random.default_rng(0)
    with IndexedWriter(prefix, np.uint16) as writer:
        for first in range(0, documents, 1 << 20):
            count = min(1 << 20, documents - first)
            lengths = random.integers(1, 2 * mean, count)
            writer.add(random.integers(0, 50000, int(lengths.sum()), dtype=np.uint16), lengths, np.arange(1, count + 1))
    return str(prefix)


def indices(work: Path) -> None:
    """Sample orders over 50M tokens, read ten times, at length 1024."""
    path = synthetic(work / "fifty", 100_000, 500)
    data = IndexedDataset(path)
    samples = data.total * 10 // LENGTH - 1
    line("check of the .idx at open, 100k documents", f"{timed(lambda: IndexedDataset(path)) * 1e3:.2f} ms")
    config = DataConfig(path=path, split=(1, 0, 0))

    def default() -> Loader:
        return Loader(config, "train", sequence_length=LENGTH, seed=1, vocab_size=50000)

    line("order default: loader ready", f"{timed(default) * 1e3:.2f} ms", "<= 16.6 ms (a fifth of 83 ms)")
    loader = default()
    assert isinstance(loader.order, DefaultOrder)
    places = loader.order.places
    every = np.arange(samples)
    line(f"order default: place of each of {samples:,} samples", f"{timed(lambda: places(every)):.3f} s")

    def megatron() -> object:
        return megatron_order.gpt_indices(data.lengths, 0, len(data), length=LENGTH, seed=1, samples=samples)

    line(f"order megatron: index of {samples:,} samples", f"{timed(megatron):.3f} s", "<= 0.083 s")

    def shuffles() -> None:
        random = np.random.RandomState(1)
        for count in (10 * len(data), samples):
            random.shuffle(np.arange(count))

    line("the two shuffles alone that this order prescribes", f"{timed(shuffles):.3f} s")
    ids = np.random.default_rng(1).permutation(loader.samples())[: 64 * 200]
    reads = timed(lambda: [loader.order.rows(ids[i : i + 64]) for i in range(0, len(ids), 64)])
    line("random samples of 1024 tokens, order default", f"{len(ids) / reads:,.0f} /s", ">= 42,000 /s")
    batches = timed(lambda: [loader.batch(i, 64) for i in range(0, 64 * 200, 64)])
    line("the same as batches of 64, with labels and masks", f"{len(ids) / batches:,.0f} /s", ">= 42,000 /s")
    theirs = Loader(
        DataConfig(path=path, split=(1, 0, 0), order="megatron"),
        "train",
        sequence_length=LENGTH,
        seed=1,
        vocab_size=50000,
    )
    ids = ids[ids < theirs.samples()]
    reads = timed(lambda: [theirs.order.rows(ids[i : i + 64]) for i in range(0, len(ids), 64)])
    line("random samples of 1024 tokens, order megatron", f"{len(ids) / reads:,.0f} /s", ">= 42,000 /s")


def blends() -> None:
    """1000 data sets to a million samples."""
    weights = np.random.default_rng(2).random(1000) + 0.1
    names = [str(i) for i in range(1000)]
    every = np.arange(1_000_000)
    seconds = timed(lambda: Mixture(shares(weights.tolist(), names)).locate(every), 3)
    line("blend 1000 data sets to 1M samples, order default", f"{seconds:.2f} s", "<= 5 s")
    seconds = timed(lambda: blending.blend_indices(weights.tolist(), 1_000_000), 3)
    line("the same, order megatron", f"{seconds:.2f} s", "<= 5 s")
    seconds = timed(lambda: blending.blend_indices([1.0] * 10, 1_000_000), 3)
    line("blend 10 data sets to 1M samples, order megatron", f"{seconds:.2f} s")


def many_documents(work: Path, count: int) -> None:
    """Open and index very many documents, each order in a process of its own, so that its memory can be told."""
    path = synthetic(work / "many", count, 4)
    for order in ("default", "megatron"):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            seconds, before, peak = pool.submit(first_batch, path, order).result()
        found = f"{seconds:.2f} s, {peak / 1e6:.2f} GB (+{(peak - before) / 1e6:.2f})"
        line(f"{count / 1e6:.0f}M documents, order {order}: first batch", found, "<= 60 s, 4 GB")


def first_batch(path: str, order: Literal["default", "megatron"]) -> tuple[float, int, int]:
    """(seconds, memory before and at most, in kB) from nothing to the first batch."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun = time.perf_counter()
    config = DataConfig(path=path, split=(1, 0, 0), order=order)
    Loader(config, "train", sequence_length=LENGTH, seed=1, vocab_size=50000).batch(0, 8)
    return time.perf_counter() - begun, before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def preprocessing(work: Path, text: Path, tokenizer: str, rounds: int) -> None:
    """MB of JSON a second in steady state, ours, the bare library's and, with PEERS_SRC, Megatron's; in turns.

    Steady: the whole text against its first documents, so that start-up counts for nothing. No text is read twice in a run.
    """
    from tokenizers import Tokenizer

    content = gzip.decompress(text.read_bytes()) if text.suffix == ".gz" else text.read_bytes()
    inputs = {"whole": content, "start": b"".join(content.splitlines(keepends=True)[:20])}
    for name, part in inputs.items():
        (work / f"{name}.jsonl").write_bytes(part)
    documents = [json.loads(one)["text"] for one in content.splitlines()]
    bare = Tokenizer.from_file(str(Path(tokenizer) / "tokenizer.json"))

    def library(name: str) -> None:
        texts = documents if name == "whole" else documents[:20]
        for i in range(0, len(texts), 100):
            bare.encode_batch(texts[i : i + 100])

    def ours(name: str, workers: int) -> None:
        words = [sys.executable, "tools/preprocess_data.py", "--input", str(work / f"{name}.jsonl"), "--quiet"]
        words += ["--tokenizer-model", tokenizer, "--append-eod", "--workers", str(workers)]
        words += ["--output-prefix", str(work / f"w{workers}-{name}"), "--unit-bytes", str(1 << 20)]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)

    def theirs(name: str) -> None:
        tool = Path(os.environ["PEERS_SRC"]) / "tools/preprocess_data.py"
        words = [sys.executable, str(tool), "--input", str(work / f"{name}.jsonl"), "--workers", "2", "--append-eod"]
        words += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer]
        subprocess.run([*words, "--output-prefix", str(work / f"peer-{name}")], check=True, stdout=subprocess.DEVNULL)

    runs: dict[str, Callable[[str], None]] = {
        "bare encode_batch, all threads": library,
        "preprocess, one process": lambda name: ours(name, 1),
        "preprocess, 2 workers": lambda name: ours(name, 2),
    }
    if "PEERS_SRC" in os.environ:
        runs["Megatron's tool, 2 workers"] = theirs
    spent: dict[str, list[float]] = {what: [] for what in runs}
    for turn in range(rounds):
        for what, work_on in list(runs.items())[:: -1 if turn % 2 else 1]:
            begin = clock(lambda work_on=work_on: work_on("start"))  # type: ignore[misc]
            spent[what].append(clock(lambda work_on=work_on: work_on("whole")) - begin)  # type: ignore[misc]
    size = len(content) - len(inputs["start"])
    rates = {what: size / statistics.median(times) / 1e6 for what, times in spent.items()}
    for what, rate in rates.items():
        line(what, f"{rate:.2f} MB/s", f"{rate / rates['bare encode_batch, all threads']:.2f} of bare")
    if "PEERS_SRC" in os.environ:
        for suffix in (".bin", ".idx"):
            same = filecmp.cmp(
                work / f"w2-whole_text_document{suffix}", work / f"peer-whole_text_document{suffix}", shallow=False
            )
            line(f"{suffix} equal to Megatron's", "yes" if same else "NO")
    else:
        line("Megatron's tool, 2 workers, steady (recorded)", "2.67 MB/s", "set PEERS_SRC to run it here")


def main() -> int:
    """Run the chosen benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, help="JSONL with the key text, or .gz of it")
    parser.add_argument("--tokenizer", help="folder with tokenizer.json")
    parser.add_argument("--rounds", type=int, default=3, help="how often each way of preprocessing is run, in turns")
    parser.add_argument("--folder", help="where to write (default: the temporary folder)")
    parser.add_argument("--documents", type=int, default=0, help="also open this many documents, as in 100000000")
    args = parser.parse_args()
    line("load of the machine before", " ".join(f"{one:.1f}" for one in os.getloadavg()), f"{os.cpu_count()} cores")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        work = Path(folder)
        indices(work)
        blends()
        if args.documents:
            many_documents(work, args.documents)
        if args.text and args.tokenizer:
            preprocessing(work, args.text, args.tokenizer, args.rounds)
    line("load of the machine after", " ".join(f"{one:.1f}" for one in os.getloadavg()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
