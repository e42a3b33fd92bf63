"""The folder of checkpoints: names, the ``latest`` record, durable writes, and what a broken save leaves behind.

step-00000100/        complete, or it would not have this name
.tmp-step-00000200/   being written; left over after a kill
.old-step-00000200/   an earlier checkpoint of the same step, between the two renames that replace it
.trash-step-.../      being deleted
latest                SHA-256 and path of the newest checkpoint's manifest, in the format of ``sha256sum``
"""

import errno
import fcntl
import hashlib
import logging
import os
import re
import shutil
import stat
from pathlib import Path

from megnorm.checkpoint.format import (
    COMPLETE,
    MANIFEST,
    MAX_JSON_BYTES,
    META,
    CheckpointError,
    Manifest,
    parse,
)

log = logging.getLogger(__name__)

LATEST = "latest"
_STEP = re.compile(r"step-(\d{8,15})")
_OLD = re.compile(r"\.old-step-(\d{8,15})")
_RECORD = re.compile(r"([0-9a-f]{64})  (step-\d{8,15})/manifest\.json\n")
_LEFTOVER = re.compile(r"\.(tmp|trash)-(step-\d{8,15}|latest)")


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(path: Path) -> int | None:
    """The step in a checkpoint folder's name."""
    match = _STEP.fullmatch(path.name) or _OLD.fullmatch(path.name)
    return int(match[1]) if match else None


def steps(folder: Path) -> list[Path]:
    """The checkpoint folders, oldest first; complete as far as the name tells."""
    found = (path for path in folder.glob("step-*") if _STEP.fullmatch(path.name) and path.is_dir())
    return sorted(found, key=lambda path: step_of(path) or 0)


# Durable writes -----------------------------------------------------------------------------------------------------


def write_file(path: Path, data: bytes) -> None:
    """Create or overwrite a small file and flush it to the disk."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        os.fsync(fd)
    finally:
        os.close(fd)


def hold(folder: Path) -> int:
    """Make the folder and hold it until the returned descriptor is closed, at the latest when the process ends.

    Two runs that write to one folder would each take the other's files for leftovers of a kill. Raises CheckpointError.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be made: {error.strerror}; {advice(error)}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise CheckpointError(
            f"another run writes its checkpoints to {folder}; end it, or set train.out to another folder"
        ) from None
    except OSError as error:  # some network file systems
        log.warning("%s cannot be locked (%s); see that no other run has this train.out", folder, error.strerror)
    return fd


def advice(error: OSError) -> str:
    """What to do about an error of the disk."""
    elsewhere = "set train.out to a folder that can be written"
    return {
        errno.ENOSPC: "free space on this disk or lower checkpoint.keep_last",
        errno.EDQUOT: "raise the quota or lower checkpoint.keep_last",
        errno.EROFS: elsewhere,
        errno.EACCES: elsewhere,
        errno.EPERM: elsewhere,
        errno.EIO: "the disk fails; set train.out to another one",
    }.get(error.errno or 0, "see that train.out can be written")


def sync_folder(path: Path) -> None:
    """Flush the names in a folder to the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_latest(folder: Path, name: str, manifest: bytes) -> None:
    """Replace the ``latest`` record in one atomic step."""
    temporary = folder / f".tmp-{LATEST}"
    write_file(temporary, f"{hashlib.sha256(manifest).hexdigest()}  {name}/{MANIFEST}\n".encode())
    os.replace(temporary, folder / LATEST)
    sync_folder(folder)


def complete_text(manifest: bytes) -> bytes:
    return f"{hashlib.sha256(manifest).hexdigest()}  {MANIFEST}\n".encode()


def install(temporary: Path, final: Path) -> None:
    """Give a finished temporary folder its name; an earlier checkpoint of that name stays whole until then."""
    old = final.with_name(f".old-{final.name}")
    if final.exists():
        os.rename(final, old)
    os.rename(temporary, final)
    sync_folder(final.parent)


def clean(folder: Path) -> None:
    """Remove what broken saves and deletions left, and put back an earlier checkpoint whose replacement never came."""
    for path in sorted(folder.iterdir()):
        if _LEFTOVER.fullmatch(path.name):
            remove(path)
        elif _OLD.fullmatch(path.name):
            final = path.with_name(path.name.removeprefix(".old-"))
            if is_complete(final):
                remove(path)
            else:
                remove(final)
                os.rename(path, final)


def discard(path: Path) -> None:
    """Delete a checkpoint; a kill on the way leaves no half of one under a valid name."""
    trash = path.with_name(f".trash-{path.name}")
    os.rename(path, trash)
    remove(trash)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# Reading ------------------------------------------------------------------------------------------------------------


def open_file(path: Path, expected: int | None = None) -> int:
    """A descriptor of a regular file, of ``expected`` bytes; neither links nor pipes nor devices are followed."""
    advice = "restore it from a copy, or load another checkpoint"
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; {advice}") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be opened ({error.strerror}); {advice}") from error
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode) or (expected is not None and info.st_size != expected):
        os.close(fd)
        if not stat.S_ISREG(info.st_mode):
            raise CheckpointError(f"{path} is not a regular file; {advice}")
        raise CheckpointError(f"{path} has {info.st_size} bytes instead of {expected}: it is torn; {advice}")
    return fd


def read_file(path: Path, limit: int = MAX_JSON_BYTES) -> bytes:
    """A small file's bytes, at most ``limit``."""
    fd = open_file(path)
    with os.fdopen(fd, "rb") as file:
        if os.fstat(fd).st_size > limit:
            raise CheckpointError(f"{path} is larger than {limit} bytes; this is no file of megnorm's")
        try:
            return file.read(limit)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error.strerror}); load another checkpoint") from error


def read_manifest(path: Path) -> tuple[Manifest, bytes]:
    """The manifest of a checkpoint, compared with ``complete``, and its bytes."""
    if not (path / COMPLETE).exists():
        raise CheckpointError(f"{path} is not a complete checkpoint (it has no file {COMPLETE}); load another one")
    data = read_file(path / MANIFEST)
    if read_file(path / COMPLETE, 1024) != complete_text(data):
        raise CheckpointError(
            f"{path / MANIFEST} does not have the checksum in {path / COMPLETE}; load another checkpoint"
        )
    manifest = parse(data, str(path / MANIFEST))
    named = step_of(path)
    if named is not None and named != manifest.step:
        raise CheckpointError(f"{path / MANIFEST} belongs to step {manifest.step}; load another checkpoint")
    return manifest, data


def read_meta_bytes(path: Path, manifest: Manifest) -> bytes:
    data = read_file(path / META)
    if len(data) != manifest.meta_bytes or hashlib.sha256(data).hexdigest() != manifest.meta_sha256:
        raise CheckpointError(f"{path / META} does not have the checksum in {path / MANIFEST}; load another checkpoint")
    return data


def check_whole(path: Path) -> Manifest:
    """Raise unless everything but the tensors' bytes is right: manifest, meta, and every file there in its length."""
    manifest, _ = read_manifest(path)
    read_meta_bytes(path, manifest)
    for name, file in manifest.files.items():
        os.close(open_file(path / name, file.bytes))
    return manifest


def is_complete(path: Path) -> bool:
    try:
        check_whole(path)
    except CheckpointError:
        return False
    return True


def recorded(folder: Path) -> str | None:
    """The folder name in the ``latest`` record; None, with a warning, where it is damaged or missing."""
    if not (folder / LATEST).exists():
        if steps(folder):
            log.warning("%s is missing; taking the newest complete checkpoint instead", folder / LATEST)
        return None
    try:
        match = _RECORD.fullmatch(read_file(folder / LATEST, 1024).decode())
    except ValueError:
        match = None
    if match is not None:
        digest, named = match[1], folder / match[2]
        if not named.is_dir():
            return _lost(folder, named, digest)
        # A whole checkpoint under another checksum means that the record is wrong, not the checkpoint.
        if not is_complete(named) or _digest(named) == digest:
            return named.name
    log.warning("%s is damaged; taking the newest complete checkpoint instead", folder / LATEST)
    return None


def _lost(folder: Path, named: Path, digest: str) -> str:
    """The name to go by where the recorded folder is not there: it was being replaced, deleted, or is misspelt."""
    if not named.with_name(f".old-{named.name}").is_dir():
        log.warning("%s names %s, which is not there", folder / LATEST, named.name)
    same = (path.name for path in steps(folder) if is_complete(path) and _digest(path) == digest)
    return next(same, named.name)


def _digest(path: Path) -> str:
    return hashlib.sha256(read_file(path / MANIFEST)).hexdigest()


def history(folder: Path) -> list[Path]:
    """Checkpoint folders in the order to try: the one ``latest`` names, earlier ones newest first, then later ones.

    Later ones exist after a kill between a save and its record, or when a run went back to an earlier checkpoint.
    """
    if not folder.is_dir():
        return []
    found = steps(folder)
    found += [path for path in folder.glob(".old-step-*") if _OLD.fullmatch(path.name) and path.is_dir()]
    name = recorded(folder)
    newest = step_of(Path(name)) if name is not None else None

    def order(path: Path) -> tuple[bool, bool, int]:
        step = step_of(path) or 0
        return newest is not None and step > newest, path.name != name, -step

    return sorted(found, key=order)


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint in ``folder``, or None; each one passed over is logged as a warning.

    Complete means: the record, manifest, meta and lengths of all files are right; ``load`` checks the tensors' bytes.
    """
    for path in history(folder):
        try:
            check_whole(path)
        except CheckpointError as error:
            log.warning("passing over checkpoint %s: %s", path.name, error)
            continue
        return path
    return None
