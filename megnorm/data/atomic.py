"""Files that exist whole or not at all."""

import os
from pathlib import Path
from typing import BinaryIO


class AtomicFile:
    """A binary file that gets its name only by ``commit``; until then it lies beside it under a temporary name."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        self.file: BinaryIO = open(self.temporary, "wb")  # noqa: SIM115

    def commit(self, *, lasting: bool = True) -> None:
        """Flush to disk, then rename. lasting False: the name stands after a power cut only if a later one does."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self.temporary, self.path)
        if lasting:
            sync_folder(self.path.parent)

    def discard(self) -> None:
        """Forget what was written."""
        self.file.close()
        self.temporary.unlink(missing_ok=True)


def write_atomic(path: str | Path, content: bytes) -> None:
    """Write a small file at once."""
    out = AtomicFile(path)
    try:
        out.file.write(content)
        out.commit()
    except BaseException:
        out.discard()
        raise


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
