"""A damaged checkpoint: found before the first step, with file and tensor, and the checkpoint before it is used."""

import os
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megnorm.checkpoint import io
from megnorm.checkpoint.folder import LATEST
from megnorm.checkpoint.format import COMPLETE, MANIFEST, META
from megnorm.train.signals import EXIT_STOPPED
from tools.faults.job import Failed, Tally, check_same, train, warm, write_config, write_text

PAGE = 4096
STEPS, EVERY = 12, 4
EARLIER, NEWEST = "step-00000004", "step-00000008"
LARGER = {"width": 96, "ffn": 192}  # several files of one megabyte


@dataclass(frozen=True)
class Damaged:
    """What must be named in the warning, and where the run must go on from."""

    file: str
    tensor: bool
    goes_on: str = EARLIER


Damage = Callable[[Path, random.Random], Damaged]


def _shard(folder: Path, dice: random.Random) -> tuple[Path, int]:
    """A file of tensors, and where its header ends."""
    path = dice.choice(sorted((folder / NEWEST).glob("*.safetensors")))
    with path.open("rb") as stream:
        return path, 8 + int.from_bytes(stream.read(8), "little")


def _flip(path: Path, place: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


def bit_in_shard(folder: Path, dice: random.Random) -> Damaged:
    path, header = _shard(folder, dice)
    _flip(path, dice.randrange(header, path.stat().st_size), dice.randrange(8))
    return Damaged(path.name, True)


def bit_in_header(folder: Path, dice: random.Random) -> Damaged:
    path, header = _shard(folder, dice)
    _flip(path, dice.randrange(header), dice.randrange(8))
    return Damaged(path.name, True)


def zeroed_page(folder: Path, dice: random.Random) -> Damaged:
    path, header = _shard(folder, dice)
    data = path.read_bytes()
    pages = range(-(-header // PAGE), len(data) // PAGE)
    page = dice.choice([page for page in pages if any(data[page * PAGE : (page + 1) * PAGE])])
    path.write_bytes(data[: page * PAGE] + bytes(PAGE) + data[(page + 1) * PAGE :])
    return Damaged(path.name, True)


def cut_shard(folder: Path, dice: random.Random) -> Damaged:
    path, _ = _shard(folder, dice)
    os.truncate(path, dice.randrange(path.stat().st_size))
    return Damaged(path.name, True)


def missing_shard(folder: Path, dice: random.Random) -> Damaged:
    path, _ = _shard(folder, dice)
    path.unlink()
    return Damaged(path.name, True)


def shard_of_another_step(folder: Path, dice: random.Random) -> Damaged:
    path, _ = _shard(folder, dice)
    shutil.copy(folder / EARLIER / path.name, path)
    return Damaged(path.name, True)


def _record(name: str, named: str | None = None) -> dict[str, Damage]:
    """Ways to damage a small file of a checkpoint. named: what the warning names, where it is not the file itself."""
    damaged = Damaged(named or name, False)

    def flip(folder: Path, dice: random.Random) -> Damaged:
        path = folder / NEWEST / name
        _flip(path, dice.randrange(path.stat().st_size), dice.randrange(8))
        return damaged

    def cut(folder: Path, dice: random.Random) -> Damaged:
        path = folder / NEWEST / name
        os.truncate(path, dice.randrange(path.stat().st_size))
        return damaged

    def lose(folder: Path, dice: random.Random) -> Damaged:
        (folder / NEWEST / name).unlink()
        return damaged

    def swap(folder: Path, dice: random.Random) -> Damaged:
        shutil.copy(folder / EARLIER / name, folder / NEWEST / name)
        return damaged

    return {f"bit in {name}": flip, f"cut {name}": cut, f"missing {name}": lose, f"{name} of another step": swap}


def bit_in_latest(folder: Path, dice: random.Random) -> Damaged:
    _flip(folder / LATEST, dice.randrange((folder / LATEST).stat().st_size), dice.randrange(8))
    return Damaged(LATEST, False, NEWEST)


def empty_latest(folder: Path, dice: random.Random) -> Damaged:
    (folder / LATEST).write_bytes(b"")
    return Damaged(LATEST, False, NEWEST)


def missing_latest(folder: Path, dice: random.Random) -> Damaged:
    (folder / LATEST).unlink()
    return Damaged(LATEST, False, NEWEST)


KINDS: dict[str, Damage] = {
    "bit in a shard": bit_in_shard,
    "zeroed page": zeroed_page,
    "cut shard": cut_shard,
    "missing shard": missing_shard,
    "shard of another step": shard_of_another_step,
    "bit in a header": bit_in_header,
    **_record(MANIFEST),
    **_record(META),
    **_record(COMPLETE),
    "bit in latest": bit_in_latest,
    "empty latest": empty_latest,
    "missing latest": missing_latest,
}


def run(folder: Path, count: int, seed: int) -> Tally:
    """Do ``count`` corruptions, of each kind as many."""
    tally, hit = Tally("corruptions"), Counter[str]()
    text = write_text(folder / "text")
    config = write_config(
        folder / "job.yaml", text, folder / "base",
        model=LARGER, train={"steps": STEPS}, checkpoint={"every": EVERY, "keep_last": 3, "max_file_mb": 1},
    )  # fmt: skip
    log = folder / "base.log"
    warm(config, folder / "calm")
    if train(config, log, "train.stop_after=8") != EXIT_STOPPED:
        raise Failed(f"the base: {log.read_text()[-1000:]}")
    names = set(io.available(folder / "base" / "checkpoints" / NEWEST))
    kinds = list(KINDS)
    for number in range(count):
        kind, dice = kinds[number % len(kinds)], random.Random(f"{seed} corruption {number}")
        out = folder / f"damaged-{number}"
        shutil.copytree(folder / "base", out)
        try:
            one(config, out, folder / "calm", KINDS[kind](out / "checkpoints", dice), names)
            tally.passed += 1
        except (Failed, ValueError) as error:
            tally.fail(f"{kind}, number {number}: {error}")
        hit[kind] += 1
        shutil.rmtree(out)
    tally.note = f"{len(hit)} kinds of damage, {min(hit.values())} to {max(hit.values())} of each"
    return tally


def one(config: Path, out: Path, calm: Path, damaged: Damaged, names: set[str]) -> None:
    """Go on with a damaged run. Raises Failed unless the damage is told, passed over, and leaves no trace."""
    log = out.with_suffix(".log")
    code = train(config, log, f"train.out={out}")
    text = log.read_text(errors="replace")
    warning, found, _ = text.partition("continuing from ")
    if code != 0 or not found:
        raise Failed(f"exit code {code}: {text[-1000:]}")
    lines = [line for line in warning.splitlines() if damaged.file in line]
    if not lines:
        raise Failed(f"{damaged.file} is not named before the first step: {text[:1000]}")
    if damaged.tensor and not names & set(re.findall(r"tensor ([\w.\-/]+)", " ".join(lines))):
        raise Failed(f"no tensor is named: {lines[0]}")
    if damaged.goes_on not in text.split("continuing from ")[1].split(":")[0]:
        raise Failed(f"it does not go on from {damaged.goes_on}: {text[:1000]}")
    check_same(out, calm)
