"""Check megnorm's data code against a folder that Megatron-LM's own code wrote.

The folder holds .bin/.idx files, truth.json (what they contain and how samples are drawn), indices.npz (the sample
orders), docs.jsonl and tokenizer.json. A line for each check, then "N passed, M failed"; exit code 1 on a failure.
"""

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megnorm.data import blending
from megnorm.data import megatron_order as order
from megnorm.data.config import DataConfig
from megnorm.data.indexed import IndexedDataset, IndexedWriter
from megnorm.data.loader import Loader
from megnorm.data.preprocess import Job, run

Check = tuple[str, Callable[..., None], tuple[Any, ...]]


class Different(Exception):
    """What was found is not what the folder says."""


def equal(what: str, found: Any, wanted: Any) -> None:
    """Raise unless found and wanted are equal, naming the first difference."""
    left, right = np.asarray(found), np.asarray(wanted)
    if left.shape != right.shape:
        raise Different(f"{what}: shape {left.shape}, expected {right.shape}")
    if not np.array_equal(left, right):
        place = tuple(int(i[0]) for i in np.nonzero(np.atleast_1d(left != right)))
        raise Different(
            f"{what}: first difference at {place}: {np.atleast_1d(left)[place]}, expected {np.atleast_1d(right)[place]}"
        )


def same_bytes(written: Path, wanted: Path) -> None:
    """Raise unless two files are equal."""
    left, right = written.read_bytes(), wanted.read_bytes()
    if left != right:
        place = next(
            (i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right))
        )
        raise Different(
            f"{wanted.name}: {len(left)} bytes written, {len(right)} expected, different from byte {place} on"
        )


class Folder:
    """The checks of one folder."""

    def __init__(self, root: Path, work: Path) -> None:
        self.root, self.work = root, work
        self.truth = json.loads((root / "truth.json").read_text())
        self.arrays = dict(np.load(root / "indices.npz", allow_pickle=False))

    def open(self, name: str, *, mapped: bool = True) -> IndexedDataset:
        multimodal = bool(self.truth["files"].get(name, {}).get("multimodal", False))
        return IndexedDataset(self.root / name, multimodal=multimodal, mapped=mapped)

    def checks(self) -> Iterator[Check]:
        for name in sorted(self.truth.get("sha256", {})):
            yield f"sha256 {name}", self.sha256, (name,)
        for name, what in self.contents():
            for mapped in (True, False):
                way = "mapped" if mapped else "plain"
                yield f"read {name} ({way})", self.read, (name, what, mapped)
            yield f"write {name}", self.write, (name, what)
        if "merged" in self.truth["files"]:
            yield "write merged by joining", self.merge, ()
        if "text_document" in self.truth["files"]:
            yield "preprocess docs.jsonl", self.preprocess, ()
            yield "preprocess docs.jsonl in small units", self.preprocess, (4096,)
        for case in self.truth.get("gpt_cases", []):
            label = f"{case['name']}.{case['split_name']}"
            yield f"gpt index {label}", self.gpt_index, (case,)
            yield f"gpt samples {label}", self.gpt_samples, (case,)
            if not case.get("options"):
                yield f"gpt loader {label}", self.gpt_loader, (case,)
        for case in self.truth.get("blend_cases", []):
            yield f"blend {case['split_name']}", self.blend, (case,)
            yield f"blend loader {case['split_name']}", self.blend_loader, (case,)
        if "blend_exhaustive" in self.truth:
            yield "blend until used up", self.exhaustive, ()

    # files

    def sha256(self, name: str) -> None:
        equal(name, hashlib.sha256((self.root / name).read_bytes()).hexdigest(), self.truth["sha256"][name])

    def contents(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(file, {documents: lists of sequences, dtype, modes}) of all files."""
        files = self.truth["files"]
        for name, entry in files.items():
            if name == "dtypes":
                for dtype, sequences in entry.items():
                    yield f"dt_{dtype}", {"documents": [[s] for s in sequences], "dtype": dtype}
            elif name == "merged":
                second = files["dtypes"][entry["dtype"]]
                documents = files["sentences"]["documents_as_sequences"] + [[s] for s in second]
                yield name, {"documents": documents, "dtype": entry["dtype"]}
            elif "documents" in entry:
                yield name, {"documents": [[d] if d else [] for d in entry["documents"]], "dtype": entry["dtype"]}
            elif "documents_as_sequences" in entry:
                yield name, {"documents": entry["documents_as_sequences"], "dtype": entry["dtype"], **_ends(entry)}
            else:
                ends = entry["document_indices"]
                documents = [entry["sequences"][a:b] for a, b in zip(ends[:-1], ends[1:], strict=True)]
                yield name, {"documents": documents, "dtype": entry["dtype"], "modes": entry["modes"], **_ends(entry)}

    def read(self, name: str, what: dict[str, Any], mapped: bool) -> None:
        data = self.open(name, mapped=mapped)
        equal("dtype", data.dtype.name, what["dtype"])
        equal("documents", data.document_count, len(what["documents"]))
        if "ends" in what:
            equal("document indices", data.documents, what["ends"])
        for index, wanted in enumerate(what["documents"]):
            found = data.document(index)
            equal(f"sequences of document {index}", [len(s) for s in found], [len(s) for s in wanted])
            for place, (left, right) in enumerate(zip(found, wanted, strict=True)):
                equal(f"document {index}, sequence {place}", left, right)
        if "modes" in what:
            equal("modes", data.modes, what["modes"])

    def write(self, name: str, what: dict[str, Any]) -> None:
        place, used = self.work / name, 0
        with IndexedWriter(place, what["dtype"], multimodal="modes" in what) as writer:
            for document in what["documents"]:
                parts = [np.asarray(s, dtype=what["dtype"]) for s in document]
                tokens = np.concatenate(parts) if parts else np.zeros(0, what["dtype"])
                modes = what["modes"][used : used + len(document)] if "modes" in what else ()
                writer.add_document(tokens, [len(s) for s in document], modes)
                used += len(document)
        self.same(place, name)

    def same(self, place: Path, name: str) -> None:
        for suffix in (".bin", ".idx"):
            same_bytes(Path(f"{place}{suffix}"), self.root / f"{name}{suffix}")

    def merge(self) -> None:
        place = self.work / "merged_by_joining"
        parts = [self.open(name) for name in ("sentences", f"dt_{self.truth['files']['merged']['dtype']}")]
        with IndexedWriter(place, parts[0].dtype) as writer:
            for part in parts:
                writer.add_dataset(part)
        self.same(place, "merged")

    def preprocess(self, unit_bytes: int = 64 << 20) -> None:
        run(
            Job(
                inputs=(str(self.root / "docs.jsonl"),),
                output=str(self.work / f"docs{unit_bytes}"),
                tokenizer=str(self.root / "tokenizer.json"),
                names="megatron",
                unit_bytes=unit_bytes,
                progress=False,
            )
        )
        self.same(self.work / f"docs{unit_bytes}_text_document", "text_document")

    # samples

    def indices(self, case: dict[str, Any]) -> tuple[IndexedDataset, order.Indices, int]:
        data, options = self.open(case["prefix"]), case.get("options") or {}
        extra = int(options.get("add_extra_token_to_sequence", True))
        first, last = order.split_sequences(data, _fractions(case["split"], case["split_name"]))
        drop = case["split_name"] != "valid" or options.get("drop_last_partial_validation_sequence", True)
        indices = order.gpt_indices(
            data.lengths,
            first,
            last,
            length=case["sequence_length"],
            seed=case["seed"],
            samples=case["num_samples"],
            drop_last=drop,
            extra=extra,
        )
        return data, indices, extra

    def gpt_index(self, case: dict[str, Any]) -> None:
        data, indices, _ = self.indices(case)
        equal(
            "split", order.split_sequences(data, _fractions(case["split"], case["split_name"])), case["indexed_indices"]
        )
        equal("samples", len(indices["shuffle_index"]), case["len"])
        label = f"{case['name']}.{case['split_name']}"
        for (name, found), dtype in zip(indices.items(), case["dtypes"], strict=True):
            wanted = self.arrays[f"{label}.{name}"]
            equal(f"dtype of {name}", found.dtype.name, dtype)
            equal(name, found, wanted)

    def gpt_samples(self, case: dict[str, Any]) -> None:
        data, indices, extra = self.indices(case)
        samples = order.GPTSamples(data, indices, case["sequence_length"], extra=extra, pad=self.truth.get("pad", -1))
        everything = np.stack([samples[i] for i in range(len(samples))])
        for place, wanted in enumerate(case["first_samples"]):
            equal(f"sample {place}", everything[place], wanted)
        equal("last sample", everything[-1], case["last_sample"])
        equal("all samples (sha256)", _digest(everything), case["sha256_all_samples_le_int64"])

    def gpt_loader(self, case: dict[str, Any]) -> None:
        config = DataConfig(
            path=str(self.root / case["prefix"]),
            split=_three(case["split"]),
            order="megatron",
            cache=str(self.work / "cache"),
        )
        vocab = int(self.open(case["prefix"]).tokens.max()) + 1
        loader = Loader(
            config,
            case["split_name"],
            sequence_length=case["sequence_length"],
            seed=case["seed"],
            vocab_size=vocab,
            samples=case["num_samples"],
        )
        equal("samples", loader.samples(), case["len"])
        batch = loader.batch(0, len(case["first_samples"]))
        wanted = np.asarray(case["first_samples"]).T
        equal("tokens", batch.tokens.numpy(), wanted[:-1])
        equal("labels", batch.labels.numpy(), wanted[1:])

    # blends

    def blend_parts(self, case: dict[str, Any]) -> tuple[order.Indices, list[order.GPTSamples], list[int]]:
        asked = blending.blend_sizes(case["weights"], case["size"])
        parts = []
        for prefix, count in zip(case["prefixes"], asked, strict=True):
            data, indices, _ = self.indices({**case, "prefix": prefix, "num_samples": count})
            parts.append(order.GPTSamples(data, indices, case["sequence_length"]))
        return blending.blend_indices(case["weights"], case["size"]), parts, asked

    def blend(self, case: dict[str, Any]) -> None:
        blend, parts, asked = self.blend_parts(case)
        label = f"blend.{case['split_name']}"
        equal("samples asked of each", asked, case["per_dataset_num_samples"])
        equal("samples of each", [len(part) for part in parts], case["per_dataset_len"])
        for name, found in blend.items():
            equal(name, found, self.arrays[f"{label}.{name}"])
            equal(f"dtype of {name}", found.dtype.name, self.arrays[f"{label}.{name}"].dtype.name)
        for place, part in enumerate(parts):
            equal(f"shuffle index of {place}", part.shuffle, self.arrays[f"{label}.{place}.shuffle_index"])
        pairs = zip(blend["dataset_index"], blend["dataset_sample_index"], strict=True)
        tokens = np.stack([parts[a][int(b)] for a, b in pairs])[:, :-1]
        equal("first tokens", tokens[0], case["first_tokens"])
        equal("all tokens (sha256)", _digest(tokens), case["sha256_all_tokens_le_int64"])

    def blend_loader(self, case: dict[str, Any]) -> None:
        config = DataConfig(
            path=tuple(str(self.root / p) for p in case["prefixes"]),
            weights=tuple(case["weights"]),
            split=_three(case["split"]),
            order="megatron",
        )
        vocab = max(int(self.open(p).tokens.max()) for p in case["prefixes"]) + 1
        sizes = {"sequence_length": case["sequence_length"], "seed": case["seed"], "samples": case["size"]}
        loader = Loader(config, case["split_name"], vocab_size=vocab, **sizes)
        batches = [loader.batch(i, 1).tokens.numpy().T for i in range(loader.samples())]
        equal("all tokens (sha256)", _digest(np.concatenate(batches)), case["sha256_all_tokens_le_int64"])

    def exhaustive(self) -> None:
        found = blending.blend_exhaustive(self.truth["blend_exhaustive"]["sizes"])
        for name, array in found.items():
            equal(name, array, self.arrays[f"blend_exhaustive.train.{name}"])


def _ends(entry: dict[str, Any]) -> dict[str, Any]:
    return {"ends": entry["document_indices"]} if "document_indices" in entry else {}


def _three(split: str) -> tuple[float, float, float]:
    parts = [float(part) for part in split.split(",")] + [0.0, 0.0]
    return parts[0], parts[1], parts[2]


def _fractions(split: str, name: str) -> tuple[float, float]:
    return DataConfig(split=_three(split)).fractions(name)


def _digest(array: NDArray[Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(array, dtype="<i8").tobytes()).hexdigest()


def main(argv: list[str] | None = None) -> int:
    """Run all checks of a folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    args = parser.parse_args(argv)
    passed = failed = 0
    with tempfile.TemporaryDirectory() as work:
        for name, check, what in Folder(args.folder, Path(work)).checks():
            try:
                check(*what)
            except Exception as error:  # whatever goes wrong is a failed check, and the rest still runs
                failed += 1
                print(f"FAIL {name}: {type(error).__name__}: {error}")
            else:
                passed += 1
                print(f"ok   {name}")
    print(f"{passed} passed, {failed} failed")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
