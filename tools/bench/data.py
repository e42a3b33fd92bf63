"""Speed of the data code: preprocessing, indices, random reads, blending; a line for each, with the figure to beat.

Figures to beat were measured with Megatron-LM d98e8a6 on two quiet cores. With PEERS_SRC naming a checkout of it, its own
preprocess_data.py also runs here, on the same text with the same tokenizer, and the files are compared byte for byte.
Needs --text (JSONL) and --tokenizer for the preprocessing lines; the others make their own data.
"""

import argparse
import filecmp
import gzip
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from megnorm.data import blending, megatron_order
from megnorm.data.config import DataConfig
from megnorm.data.indexed import IndexedDataset, IndexedWriter
from megnorm.data.loader import Loader
from megnorm.data.preprocess import Job, run
from megnorm.data.samples import DefaultOrder, Mixture, shares

LENGTH = 1024


def line(what: str, found: str, goal: str = "") -> None:
    """Print one result."""
    print(f"{what:<58} {found:>24}  {goal}", flush=True)


def timed(work: Callable[[], object], repeat: int = 3) -> float:
    """Least seconds of some runs."""
    best = float("inf")
    for _ in range(repeat):
        begun = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - begun)
    return best


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
    seconds = timed(lambda: Mixture(shares(weights.tolist(), names)).locate(every), 1)
    line("blend 1000 data sets to 1M samples, order default", f"{seconds:.2f} s", "<= 5 s")
    seconds = timed(lambda: blending.blend_indices(weights.tolist(), 1_000_000), 1)
    line("the same, order megatron", f"{seconds:.2f} s", "<= 5 s")
    seconds = timed(lambda: blending.blend_indices([1.0] * 10, 1_000_000), 1)
    line("blend 10 data sets to 1M samples, order megatron", f"{seconds:.2f} s")


def many_documents(work: Path, count: int) -> None:
    """Open and index very many documents."""
    path = synthetic(work / "many", count, 4)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun = time.perf_counter()
    config = DataConfig(path=path, split=(1, 0, 0))
    loader = Loader(config, "train", sequence_length=LENGTH, seed=1, vocab_size=50000)
    loader.batch(0, 8)
    seconds = time.perf_counter() - begun
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    line(
        f"{count / 1e6:.0f}M documents, order default: first batch",
        f"{seconds:.2f} s, +{(memory - before) / 1e6:.2f} GB",
        "<= 60 s",
    )
    begun = time.perf_counter()
    data = IndexedDataset(path)
    megatron_order.gpt_indices(data.lengths, 0, len(data), length=LENGTH, seed=1, samples=None)
    seconds = time.perf_counter() - begun
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    line(
        f"{count / 1e6:.0f}M documents, order megatron: index",
        f"{seconds:.2f} s, peak {memory / 1e6:.2f} GB",
        "<= 60 s, 4 GB",
    )


def preprocessing(work: Path, text: Path, tokenizer: str, megabytes: int) -> None:
    """MB of JSON a second, against the bare library and, with PEERS_SRC, Megatron's tool."""
    from tokenizers import Tokenizer

    content = gzip.decompress(text.read_bytes()) if text.suffix == ".gz" else text.read_bytes()
    source = work / "text.jsonl"
    source.write_bytes(content * max(1, megabytes * 1_000_000 // len(content)))
    size = source.stat().st_size
    documents = [json.loads(one)["text"] for one in content.splitlines()]
    bare = Tokenizer.from_file(str(Path(tokenizer) / "tokenizer.json"))
    pieces = [documents[i : i + 100] for i in range(0, len(documents), 100)]
    rate = len(content) / timed(lambda: [bare.encode_batch(piece) for piece in pieces], 2)
    line("bare encode_batch, all threads", f"{rate / 1e6:.2f} MB/s")
    for workers in (1, 2):
        job = Job(
            (str(source),), str(work / f"w{workers}"), tokenizer, names="megatron", progress=False, workers=workers
        )
        report = run(job)
        found = report.bytes / report.seconds
        line(
            f"preprocess, {workers} processes, {size / 1e6:.0f} MB",
            f"{found / 1e6:.2f} MB/s",
            f"{found / rate:.2f} of bare",
        )
    if peer := os.environ.get("PEERS_SRC"):
        words = [sys.executable, str(Path(peer) / "tools/preprocess_data.py"), "--input", str(source), "--workers", "2"]
        words += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer, "--append-eod"]
        begun = time.perf_counter()
        subprocess.run([*words, "--output-prefix", str(work / "peer")], check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - begun
        line("Megatron's tool, 2 workers, start-up included", f"{size / seconds / 1e6:.2f} MB/s")
        for suffix in (".bin", ".idx"):
            same = filecmp.cmp(work / f"w2_text_document{suffix}", work / f"peer_text_document{suffix}", shallow=False)
            line(f"{suffix} equal to Megatron's", "yes" if same else "NO")
    else:
        line("Megatron's tool, 2 workers, steady (recorded)", "2.67 MB/s", "set PEERS_SRC to run it here")


def main() -> int:
    """Run the chosen benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, help="JSONL with the key text, or .gz of it")
    parser.add_argument("--tokenizer", help="folder with tokenizer.json")
    parser.add_argument("--megabytes", type=int, default=100, help="how much text to preprocess")
    parser.add_argument("--documents", type=int, default=0, help="also open this many documents, as in 100000000")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        indices(work)
        blends()
        if args.documents:
            many_documents(work, args.documents)
        if args.text and args.tokenizer:
            preprocessing(work, args.text, args.tokenizer, args.megabytes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
