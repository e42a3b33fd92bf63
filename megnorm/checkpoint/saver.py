"""Save in the background: the step loop waits for a copy in memory only, and learns of a failure at the next step."""

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megnorm.checkpoint.config import CheckpointConfig
from megnorm.checkpoint.folder import hold
from megnorm.checkpoint.format import CheckpointError, load_json
from megnorm.checkpoint.io import alone, encode_meta, save
from megnorm.checkpoint.retention import prune
from megnorm.checkpoint.shard import Shard

log = logging.getLogger(__name__)


def own_barrier(timeout_seconds: float = 1800.0) -> Callable[[], None]:
    """A barrier over all ranks on a gloo group of its own, for use in one background thread while training goes on.

    Collective: every rank calls it once, in the same order as other groups are made. The barrier names the ranks that
    did not come within the timeout. Without an initialized process group, or with one rank, it does nothing.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return alone
    timeout = timedelta(seconds=timeout_seconds)
    group = dist.new_group(backend="gloo", timeout=timeout)
    return partial(dist.monitored_barrier, group=group, timeout=timeout, wait_all_ranks=True)


class Saver:
    """Saves checkpoints in ``folder``, one at a time, and deletes old ones by the rules of ``config``.

    barrier: over all ranks, called from the background thread while the step loop communicates: give it a group of its
    own (``own_barrier``). A failure is kept and raised by the next ``save``, ``check`` or ``wait``; all ranks learn of
    it, but not within the same step, so a loop of several ranks should agree on ``failed`` before it acts.
    Rank 0 holds the folder until the saver is closed; raises CheckpointError if another run does, or if it cannot be made.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        folder: Path,
        rank: int = 0,
        world: int = 1,
        barrier: Callable[[], None] = alone,
    ) -> None:
        self.config = config
        self.folder = Path(folder)
        self.rank = rank
        self.world = world
        self.barrier = barrier
        self.failure: BaseException | None = None
        self._held = weakref.finalize(self, os.close, hold(self.folder)) if rank == 0 else None
        self._lock, self._writing, self._closed = threading.Lock(), False, False
        self._thread: threading.Thread | None = None
        self._copies: dict[tuple[Any, ...], Tensor] = {}

    @property
    def failed(self) -> bool:
        """Whether a save has failed and nobody has been told yet; does not wait."""
        return self.failure is not None

    def save(self, step: int, shards: Sequence[Shard], meta: Mapping[str, Any]) -> None:
        """Save ``shards``: on return they are durable, or (asynchronous) copied, and may change.

        Waits for the save before. On CUDA the copy waits for what the current stream computes.
        """
        begun = time.perf_counter()
        self.wait()
        waited = time.perf_counter() - begun
        if waited > 1.0 and self.rank == 0:
            log.warning("waited %.1f s for the checkpoint before; raise checkpoint.every or use a faster disk", waited)
        frozen = load_json(encode_meta(meta), "the checkpoint's meta")
        self._writing = True
        if not self.config.asynchronous:
            self._write(step, shards, frozen)
            self.check()
            return
        copies = self._snapshot(shards)
        # Not a daemon: a program that ends normally still finishes its last checkpoint.
        self._thread = threading.Thread(target=self._write, args=(step, copies, frozen), name="checkpoint")
        self._thread.start()

    def check(self) -> None:
        """Raise the failure of an earlier save, once; does not wait."""
        failure, self.failure = self.failure, None
        if failure is not None:
            raise CheckpointError(str(failure)) from failure

    def wait(self) -> None:
        """Wait until the save under way is durable, and raise if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def close(self) -> None:
        """Let go of the folder; a save that is still under way does so at its end."""
        with self._lock:
            self._closed = True
            if self._held is not None and not self._writing:
                self._held()

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _write(self, step: int, shards: Sequence[Shard], meta: Mapping[str, Any]) -> None:
        try:
            save(
                self.folder, step, shards, meta, rank=self.rank, world=self.world, barrier=self.barrier,
                max_file_bytes=self.config.max_file_mb * 1_000_000, threads=self.config.threads,
            )  # fmt: skip
            if self.rank == 0:
                prune(self.folder, self.config)
        except Exception as error:
            if not isinstance(error, CheckpointError):
                error = CheckpointError(f"checkpoint of step {step} not saved: {type(error).__name__}: {error}")
            log.error("%s", error)
            self.failure = error
        finally:
            with self._lock:
                self._writing = False
                if self._closed and self._held is not None:
                    self._held()

    def prepare(self, shards: Sequence[Shard]) -> None:
        """Make room for the copies in the background, before the first save: memory never touched before is slow."""
        if self.config.asynchronous:
            self._thread = threading.Thread(target=self._make_room, args=(list(shards),), name="checkpoint")
            self._thread.start()

    def _make_room(self, shards: Sequence[Shard]) -> None:
        try:
            for shard in shards:
                self._copies[_key(shard)] = _memory_for(shard.tensor).zero_()
        except (MemoryError, RuntimeError) as error:
            self.failure = CheckpointError(
                f"no memory for a second copy of the saved state ({error}); set checkpoint.asynchronous=false"
            )

    def _snapshot(self, shards: Sequence[Shard]) -> list[Shard]:
        """Copies in CPU memory, in buffers kept from one save to the next."""
        kept: dict[tuple[Any, ...], Tensor] = {}
        copies = []
        cuda = False
        for shard in shards:
            source, key = shard.tensor.detach(), _key(shard)
            target = self._copies.get(key)
            if target is None:
                target = _memory_for(source)
            target.copy_(source, non_blocking=True)
            cuda = cuda or source.device.type == "cuda"
            kept[key] = target
            copies.append(Shard(shard.name, target, shard.shape, shard.offset))
        if cuda:
            torch.cuda.synchronize()
        self._copies = kept
        return copies


def _key(shard: Shard) -> tuple[Any, ...]:
    return shard.name, shard.offset, shard.local, shard.tensor.dtype


def _memory_for(source: Tensor) -> Tensor:
    """Memory on the CPU for a copy; pinned, if the copy comes from an accelerator."""
    return torch.empty(source.shape, dtype=source.dtype, device="cpu", pin_memory=source.device.type == "cuda")
