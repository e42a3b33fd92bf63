"""Save and load checkpoints that reshard: every rank passes the shards it owns, any layout loads any other.

This file holds ``save`` and ``resume``; reading lies in read.py, folders in folder.py, the format in format.py.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megnorm.checkpoint.folder import (
    advice,
    clean,
    complete_text,
    history,
    install,
    latest,
    remove,
    step_name,
    sync_folder,
    write_file,
    write_latest,
)
from megnorm.checkpoint.format import (
    CHUNK_BYTES,
    COMPLETE,
    MANIFEST,
    META,
    CheckpointError,
    Manifest,
    dump,
    load_json,
    merge,
    parse_part,
    part_json,
)
from megnorm.checkpoint.read import available, load, read_full, read_meta, verify
from megnorm.checkpoint.shard import Shard
from megnorm.checkpoint.write import write_shards

__all__ = [
    "CheckpointError", "Resumed", "Shard", "available", "latest", "load", "read_full", "read_meta", "resume", "save", "verify",
]  # fmt: skip

log = logging.getLogger(__name__)


def alone() -> None:
    """The barrier of a run of one rank."""


def save(
    folder: Path,
    step: int,
    shards: Sequence[Shard],
    meta: Mapping[str, Any],
    *,
    rank: int = 0,
    world: int = 1,
    barrier: Callable[[], None] = alone,
    max_file_bytes: int = 512 << 20,
    chunk_bytes: int = CHUNK_BYTES,
    threads: int = 4,
) -> Path:
    """Write the checkpoint ``folder``/step-..., durable on return, and point ``latest`` at it; its path.

    Every rank calls it with the shards it owns (no slice twice) and a ``barrier`` over all ranks, which is called four
    times whatever happens; ``folder`` must be on a filesystem that all ranks share. meta: JSON values, rank 0's.
    max_file_bytes: where a rank begins its next file. chunk_bytes: what one checksum covers, and the unit of reading.
    On an error every rank raises CheckpointError, temporary files are gone and earlier checkpoints are as they were.
    """
    assert world > 1 or rank == 0
    folder = Path(folder)
    if rank == 0:
        log.info("checkpoint of step %d requested", step)
    begun = time.perf_counter()
    task = _Save(folder, step, rank, world, chunk_bytes)
    if rank == 0:
        task.attempt(lambda: task.begin(meta))
    barrier()
    task.attempt(lambda: task.write(shards, max_file_bytes, threads))
    if task.failure is not None:
        task.report()
    barrier()
    if rank == 0:
        task.attempt(task.commit)
        if task.failure is not None:
            task.withdraw()
    barrier()
    if rank != 0:
        task.attempt(task.outcome)
    barrier()
    if task.failure is not None:
        if rank == 0:
            task.forget()
        raise CheckpointError(task.sentence()) from task.failure
    if rank == 0:
        seconds = time.perf_counter() - begun
        log.info("checkpoint of step %d durable after %.1f s, %.1f MB: %s", step, seconds, task.bytes / 1e6, task.final)
    return task.final


class _Save:
    """The stages of one save on one rank; after the first failure ``attempt`` does nothing."""

    def __init__(self, folder: Path, step: int, rank: int, world: int, chunk_bytes: int) -> None:
        self.folder = folder
        self.step = step
        self.rank = rank
        self.world = world
        self.chunk_bytes = chunk_bytes
        self.final = folder / step_name(step)
        self.temporary = folder / f".tmp-{step_name(step)}"
        self.failure: Exception | None = None
        self.meta = b""
        self.bytes = 0

    def attempt(self, action: Callable[[], None]) -> None:
        if self.failure is None:
            try:
                action()
            except Exception as error:
                self.failure = error

    def begin(self, meta: Mapping[str, Any]) -> None:
        self.meta = encode_meta(meta)
        self.folder.mkdir(parents=True, exist_ok=True)
        clean(self.folder)
        self.temporary.mkdir()

    def write(self, shards: Sequence[Shard], max_file_bytes: int, threads: int) -> None:
        if not self.temporary.is_dir():
            raise CheckpointError(
                f"rank {self.rank} does not see {self.temporary}; checkpoints need a folder that all ranks share"
            )
        part = write_shards(
            self.temporary, shards, rank=self.rank, step=self.step, chunk_bytes=self.chunk_bytes,
            max_file_bytes=max_file_bytes, threads=threads,
        )  # fmt: skip
        write_file(self._part(self.rank), json.dumps(part_json(*part)).encode())

    def _part(self, rank: int) -> Path:
        return self.temporary / f"part-{rank:05d}.json"

    def report(self) -> None:
        """Make room and leave the reason for rank 0; if even that fails, rank 0 sees that the part is missing."""
        try:
            for path in self.temporary.glob(f"rank-{self.rank:05d}-*"):
                remove(path)
            write_file(self.temporary / f"failed-{self.rank:05d}", self.sentence().encode())
        except OSError:
            log.warning("rank %d cannot leave the reason of its failure in %s", self.rank, self.temporary)

    def commit(self) -> None:
        """Merge what the ranks wrote, give the folder its name, move ``latest``."""
        for rank in range(self.world):
            reason = self.temporary / f"failed-{rank:05d}"
            if reason.exists():
                raise CheckpointError(reason.read_text())
            if not self._part(rank).exists():
                raise CheckpointError(
                    f"rank {rank} wrote nothing to {self.temporary}; checkpoints need a folder that all ranks share"
                )
        parts = []
        for rank in range(self.world):
            path = self._part(rank)
            parts.append(parse_part(load_json(path.read_bytes(), str(path)), self.chunk_bytes, str(path)))
        files, tensors = merge(parts, f"checkpoint of step {self.step}")
        self.bytes = sum(file.bytes for file in files.values())
        digest = hashlib.sha256(self.meta).hexdigest()
        manifest = dump(Manifest(self.step, self.world, self.chunk_bytes, len(self.meta), digest, files, tensors))
        for rank in range(self.world):
            remove(self._part(rank))
        write_file(self.temporary / META, self.meta)
        write_file(self.temporary / MANIFEST, manifest)
        write_file(self.temporary / COMPLETE, complete_text(manifest))
        sync_folder(self.temporary)
        install(self.temporary, self.final)
        write_latest(self.folder, self.final.name, manifest)
        try:
            clean(self.folder)
        except OSError as error:
            log.warning("cannot clean %s (%s); the next save will", self.folder, error.strerror)

    def withdraw(self) -> None:
        """Delete what was written, but keep the folder, with the reason, until the other ranks have seen it."""
        try:
            if self.world > 1:
                self.temporary.mkdir(exist_ok=True)
            if self.temporary.is_dir():
                for path in self.temporary.iterdir():
                    remove(path)
                if self.world > 1:
                    write_file(self.temporary / "failed", self.sentence().encode())
        except OSError as error:
            log.warning("cannot clean %s (%s); the next save will", self.temporary, error.strerror)

    def outcome(self) -> None:
        """Learn whether rank 0 has committed: then the temporary folder is gone."""
        if self.temporary.is_dir():
            reason = self.temporary / "failed"
            raise CheckpointError(reason.read_text() if reason.exists() else "rank 0 could not finish the checkpoint")

    def forget(self) -> None:
        try:
            remove(self.temporary)
            remove(self.folder / ".tmp-latest")
        except OSError as error:
            log.warning("cannot remove %s (%s); the next save will", self.temporary, error.strerror)

    def sentence(self) -> str:
        """What went wrong and what to do, in one sentence."""
        error = self.failure
        prefix = f"checkpoint of step {self.step} in {self.folder} not saved"
        if isinstance(error, CheckpointError):
            text = str(error)
            return text if text.startswith(prefix) else f"{prefix}: {text}"
        if not isinstance(error, OSError):
            return f"{prefix}: rank {self.rank}: {type(error).__name__}: {error}"
        reason = error.strerror or str(error)
        return f"{prefix}: {reason} (rank {self.rank}); {advice(error)}; earlier checkpoints are intact"


def encode_meta(meta: Mapping[str, Any]) -> bytes:
    """meta.json; raises for what JSON cannot hold."""
    try:
        return json.dumps(dict(meta), indent=1, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"the checkpoint's meta is not JSON ({error}); keep to strings, finite numbers, lists and dictionaries"
        ) from error


@dataclass(frozen=True)
class Resumed:
    """What ``resume`` has loaded: the checkpoint, its meta, and how many tensors and bytes of it this rank holds now.

    verified: whether their checksums were compared.
    """

    path: Path
    meta: dict[str, Any]
    tensors: int
    bytes: int
    verified: bool


def resume(
    folder: Path,
    wanted: Sequence[Shard],
    *,
    agree: Callable[[bool], bool] = lambda ok: ok,
    verify: bool = True,
    threads: int = 4,
) -> Resumed | None:
    """Load the newest whole checkpoint in ``folder``, passing over damaged ones with a warning; None if there are none.

    agree: true if true on all ranks (a logical-and all-reduce), so that all ranks load the same one; each rank calls it
    once per checkpoint tried. Raises CheckpointError, with the newest one's reason, if none of them can be loaded.
    """
    first: CheckpointError | None = None
    for path in history(Path(folder)):
        failure: CheckpointError | None = None
        meta: dict[str, Any] = {}
        try:
            meta = load(path, wanted, verify=verify, threads=threads, untouched=False)
        except CheckpointError as error:
            failure = error
        if agree(failure is None):
            names = {shard.name for shard in wanted}
            return Resumed(path, meta, len(names), sum(shard.bytes for shard in wanted), verify)
        failure = failure or CheckpointError(f"{path}: another rank cannot load it")
        log.warning("passing over checkpoint %s: %s", path.name, failure)
        first = first or failure
    if first is not None:
        raise first
    return None
