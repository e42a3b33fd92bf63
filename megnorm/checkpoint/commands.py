"""``megnorm checkpoint inspect | verify | diff``."""

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megnorm.checkpoint.folder import latest, read_manifest
from megnorm.checkpoint.format import COMPLETE, MANIFEST, CheckpointError
from megnorm.checkpoint.read import read_full, read_meta, verify


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="checkpoint_verb", required=True, metavar="inspect | verify | diff")
    path_help = "a checkpoint, a folder of checkpoints, or a run folder (then its latest checkpoint)"

    inspect = verbs.add_parser("inspect", help="print what a checkpoint holds")
    inspect.add_argument("path", type=Path, help=path_help)
    inspect.add_argument("--match", default="", help="only tensors whose name contains this")
    inspect.add_argument("--json", action="store_true", help="print one JSON object")
    inspect.set_defaults(checkpoint_run=_inspect)

    check = verbs.add_parser("verify", help="check every byte; exit code 1 if anything is damaged")
    check.add_argument("path", type=Path, help=path_help)
    check.add_argument("--threads", type=int, default=4)
    check.set_defaults(checkpoint_run=_verify)

    diff = verbs.add_parser("diff", help="compare two checkpoints, in whatever layouts; exit code 1 if they differ")
    diff.add_argument("first", type=Path, help=path_help)
    diff.add_argument("second", type=Path, help=path_help)
    diff.add_argument("--match", default="", help="only tensors whose name contains this")
    diff.add_argument("--tolerance", type=float, default=0.0, help="largest absolute difference that counts as equal")
    diff.set_defaults(checkpoint_run=_diff)


def run_checkpoint(args: argparse.Namespace) -> int:
    """Run the verb; the exit code. Raises CheckpointError for what cannot be opened."""
    code: int = args.checkpoint_run(args)
    return code


def find(path: Path) -> Path:
    """The checkpoint that a user's path means."""
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder; name a checkpoint, or the run folder it lies in")
    if (path / MANIFEST).exists() or (path / COMPLETE).exists() or path.name.startswith((".tmp-step-", "step-")):
        return path
    for folder in (path, path / "checkpoints"):
        found = latest(folder)
        if found is not None:
            return found
    raise CheckpointError(f"{path} holds no complete checkpoint")


def _inspect(args: argparse.Namespace) -> int:
    path = find(args.path)
    manifest, _ = read_manifest(path)
    meta = read_meta(path)
    chosen = {name: record for name, record in manifest.tensors.items() if args.match in name}
    if args.json:
        tensors = {
            name: {"shape": list(r.shape), "dtype": r.dtype, "slices": len(r.slices)} for name, r in chosen.items()
        }
        head = {"path": str(path), "step": manifest.step, "ranks": manifest.world, "files": len(manifest.files)}
        print(json.dumps(head | {"meta": meta, "tensors": tensors}, indent=1))
        return 0
    total = sum(file.bytes for file in manifest.files.values())
    elements = sum(math.prod(r.shape) for r in manifest.tensors.values())
    print(f"{path}: step {manifest.step}, written by {manifest.world} rank(s)")
    counts = f"{len(manifest.files)} file(s), {total / 1e6:.1f} MB, {len(manifest.tensors)} tensors"
    print(f"{counts}, {elements:,} elements")
    for key, value in flatten(meta).items():
        print(f"  {key}: {json.dumps(value)}")
    width = max(map(len, chosen), default=0)
    for name, record in chosen.items():
        print(f"{name:<{width}}  {record.dtype:<8}  {list(record.shape)}  {len(record.slices)} slice(s)")
    return 0


def _verify(args: argparse.Namespace) -> int:
    path = find(args.path)
    problems = verify(path, threads=args.threads)
    for problem in problems:
        print(problem)
    if problems:
        print(f"{path}: {len(problems)} problem(s); restore these files from a copy, or use an earlier checkpoint")
        return 1
    manifest, _ = read_manifest(path)
    total = sum(file.bytes for file in manifest.files.values())
    print(f"{path}: whole: step {manifest.step}, {len(manifest.tensors)} tensors, {total / 1e6:.1f} MB checked")
    return 0


def _diff(args: argparse.Namespace) -> int:
    first, second = find(args.first), find(args.second)
    a, b = read_manifest(first)[0].tensors, read_manifest(second)[0].tensors
    lines = []
    meta_a, meta_b = flatten(read_meta(first)), flatten(read_meta(second))
    for key in sorted(meta_a.keys() | meta_b.keys()):
        if meta_a.get(key) != meta_b.get(key):
            print(f"meta {key}: {json.dumps(meta_a.get(key))} -> {json.dumps(meta_b.get(key))}")
    for name in sorted(name for name in a.keys() | b.keys() if args.match in name):
        if name not in a or name not in b:
            lines.append(f"{name}: only in {first if name in a else second}")
        elif (a[name].shape, a[name].dtype) != (b[name].shape, b[name].dtype):
            lines.append(f"{name}: {a[name].dtype} {list(a[name].shape)} -> {b[name].dtype} {list(b[name].shape)}")
        else:
            line = _difference(read_full(first, [name])[name], read_full(second, [name])[name], args.tolerance)
            if line is not None:
                lines.append(f"{name}: {line}")
    for line in lines:
        print(line)
    print(f"{len(lines)} tensor(s) differ, of {len(a.keys() | b.keys())}")
    return 1 if lines else 0


def _difference(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> str | None:
    """How far two tensors are apart; None if equal bit for bit, or within the tolerance."""
    if torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)):
        return None
    wide_a, wide_b = a.double(), b.double()
    largest = (wide_a - wide_b).abs().max().item()
    if largest <= tolerance and tolerance > 0:
        return None
    norm = wide_a.norm().item()
    relative = (wide_a - wide_b).norm().item() / norm if norm else math.inf
    return f"largest difference {largest:.3e}, relative to the norm {relative:.3e}"


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            flat |= flatten(item, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = item
    return flat
