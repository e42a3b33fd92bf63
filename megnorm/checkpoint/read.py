"""Read tensors out of a checkpoint: any slices, written in any layout; no byte is used before its checksum is right."""

import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megnorm.checkpoint.chunks import Plan, missing, plan_all, plan_wanted
from megnorm.checkpoint.fetch import fetch, stranger
from megnorm.checkpoint.folder import open_file, read_manifest, read_meta_bytes
from megnorm.checkpoint.format import CheckpointError, Manifest, check_cover, checksum, load_json
from megnorm.checkpoint.shard import Shard

THREADS = 4


def load(
    path: Path, wanted: Sequence[Shard], *, verify: bool = True, convert: bool = False, threads: int = THREADS,
    untouched: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Fill each wanted shard's tensor in place from whichever saved slices meet it; the checkpoint's meta.

    convert: allow another dtype than the saved one. verify: compare checksums of all that is read.
    untouched: check everything first, and only then change the first tensor (reads twice, the second time from the page
    cache). Otherwise each chunk is read to where it belongs and wiped again if it is not right: still no unchecked byte
    stays in a tensor, but after an error some are filled and others are not, so the caller must load another
    checkpoint or stop.

    Raises CheckpointError, naming file and tensor, for a damaged, torn or missing file, a missing tensor, other shapes
    or dtypes.
    """
    path = Path(path)
    manifest, _ = read_manifest(path)
    meta = _meta(path, manifest)
    plan = plan_wanted(path, manifest, wanted, convert)
    _check_files(path, manifest, plan, verify)
    if verify and untouched:
        fetch(path, manifest, plan, threads, check=True, copy=False)
        fetch(path, manifest, plan, threads, check=False, copy=True)
    else:
        fetch(path, manifest, plan, threads, check=verify, copy=True)
    return meta


def read_meta(path: Path) -> dict[str, Any]:
    """The caller's record of a checkpoint, its checksum compared."""
    path = Path(path)
    return _meta(path, read_manifest(path)[0])


def _meta(path: Path, manifest: Manifest) -> dict[str, Any]:
    meta = load_json(read_meta_bytes(path, manifest), str(path / "meta.json"))
    if not isinstance(meta, dict):
        raise CheckpointError(f"{path / 'meta.json'} must hold an object; load another checkpoint")
    return meta


def available(path: Path) -> dict[str, tuple[int, ...]]:
    """Logical tensor name -> global shape."""
    return {name: record.shape for name, record in read_manifest(Path(path))[0].tensors.items()}


def read_full(path: Path, names: Iterable[str], *, verify: bool = True) -> dict[str, Tensor]:
    """Whole logical tensors, on the CPU in their saved dtypes."""
    tensors = read_manifest(Path(path))[0].tensors
    full = {}
    for name in names:
        if name not in tensors:
            raise missing(Path(path), name)
        full[name] = torch.empty(tensors[name].shape, dtype=getattr(torch, tensors[name].dtype))
    load(path, [Shard.whole(name, tensor) for name, tensor in full.items()], verify=verify, untouched=False)
    return full


def verify(path: Path, *, threads: int = THREADS) -> list[str]:
    """Check every byte of a checkpoint; the problems found, one sentence each (none: it is whole)."""
    path = Path(path)
    try:
        manifest, _ = read_manifest(path)
        _meta(path, manifest)
    except CheckpointError as error:
        return [str(error)]
    problems: list[str] = []
    for name, record in manifest.tensors.items():
        _note(problems, partial(check_cover, name, record, str(path / "manifest.json")))
    good: Plan = {}
    plan = plan_all(manifest)
    for name in manifest.files:
        if _note(problems, partial(_check_header, path, name, manifest)):
            good[name] = plan.get(name, [])
    return problems + fetch(path, manifest, good, threads, check=True, copy=False, collect=True)


def _note(problems: list[str], check: Callable[[], None]) -> bool:
    try:
        check()
    except CheckpointError as error:
        problems.append(str(error))
        return False
    return True


def _check_header(path: Path, name: str, manifest: Manifest) -> None:
    file = manifest.files[name]
    fd = open_file(path / name, file.bytes)
    with os.fdopen(fd, "rb") as stream:
        if checksum(stream.read(file.header_bytes)) != file.header_sum:
            raise CheckpointError(f"{path / name}: the header is damaged{stranger(path / name, manifest.step)}")


def _check_files(path: Path, manifest: Manifest, plan: Plan, verify: bool) -> None:
    """Missing and torn files are found before anything is read, and damaged headers, though nothing here needs them."""
    for file, chunks in plan.items():
        try:
            if verify:
                _check_header(path, file, manifest)
            else:
                os.close(open_file(path / file, manifest.files[file].bytes))
        except CheckpointError as error:
            raise CheckpointError(f"{error} (it holds tensor {chunks[0].name})") from error
