"""Indices built once per node and mapped by all its ranks."""

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megnorm.data.atomic import sync_folder

Arrays = dict[str, NDArray[Any]]


def cached(folder: str | None, name: str, build: Callable[[], Arrays]) -> Arrays:
    """Arrays by name from FOLDER/NAME/, built there by whoever comes first; folder None: built in memory.

    Ranks of one node wait for the lock; nodes need not share a disk. The folder appears by one rename, so a killed
    builder leaves nothing that could be taken for a whole index.
    """
    if folder is None:
        return build()
    home = Path(folder).expanduser()
    home.mkdir(parents=True, exist_ok=True)
    final = home / name
    if not final.is_dir():
        with open(home / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not final.is_dir():
                _write(final, build())
    return {path.stem: np.load(path, mmap_mode="r", allow_pickle=False) for path in sorted(final.glob("*.npy"))}


def _write(final: Path, arrays: Arrays) -> None:
    temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    for name, array in arrays.items():
        with open(temporary / f"{name}.npy", "wb") as file:
            np.save(file, array, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
    os.replace(temporary, final)
    sync_folder(final.parent)
