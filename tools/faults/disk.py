"""A process that dies at one of its calls into the file system, by itself or with the power of the whole machine.

``Disk.watch`` wraps the functions of ``os`` that change files. At the call numbered ``at`` the process ends, before it,
after it, or in the middle of a write. With ``power`` gone as well, nothing is left that was not flushed: files lose their
unflushed bytes, and renames that their folder has not recorded may be undone.
"""

import os
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DIED = 86  # exit code
WRITES = ("write", "pwrite", "writev", "pwritev")
RENAMES = ("rename", "replace")
OTHERS = (
    "fsync",
    "fdatasync",
    "open",
    "mkdir",
    "unlink",
    "remove",
    "rmdir",
    "truncate",
    "ftruncate",
    "link",
    "symlink",
)
BEFORE, TORN, AFTER = "before", "in the middle of", "after"


@dataclass
class Disk:
    """Counts calls; ``counts`` by function, so that a rehearsal tells where one can die."""

    at: int = 0  # 1-based; 0: never
    when: str = BEFORE
    power: bool = False
    dice: random.Random = field(default_factory=random.Random)
    calls: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.real = {name: getattr(os, name) for name in (*WRITES, *RENAMES, *OTHERS)}
        self.unflushed: set[str] = set()
        self.lock = threading.Lock()
        self.renamed: list[tuple[str, Callable[[], None]]] = []  # (folder, how to undo it), oldest first

    def watch(self) -> None:
        """From here on."""
        for name, function in self.real.items():
            setattr(os, name, self._wrap(name, function))

    def stop(self) -> None:
        """Up to here."""
        for name, function in self.real.items():
            setattr(os, name, function)

    def _wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if name == "open" and not args[1] & (os.O_CREAT | os.O_TRUNC):
                return function(*args, **kwargs)
            with self.lock:
                self.calls.append(name)
                last = len(self.calls) == self.at
            if last and self.when == TORN and name in ("write", "pwrite"):
                self._note(name, args)
                function(args[0], memoryview(args[1])[: self.dice.randrange(len(args[1]) + 1)], *args[2:])
                self._die()
            if last and self.when != AFTER:
                self._die()
            self._note(name, args)
            try:
                return function(*args, **kwargs)
            finally:
                if last:
                    self._die()

        return call

    def _note(self, name: str, args: tuple[Any, ...]) -> None:
        """Remember what a loss of power would take, before the call is made."""
        if name in WRITES:
            path = os.readlink(f"/proc/self/fd/{args[0]}")
            self.unflushed.add(path)
        elif name in ("fsync", "fdatasync"):
            path = os.readlink(f"/proc/self/fd/{args[0]}")
            self.unflushed.discard(path)
            self.renamed = [(folder, undo) for folder, undo in self.renamed if folder != path]
        elif name in RENAMES:
            source, target = os.path.realpath(args[0]), os.path.realpath(args[1])
            self.renamed.append((os.path.dirname(target), self._undo(source, target)))
            moved = {path for path in self.unflushed if path == source or path.startswith(f"{source}/")}
            self.unflushed = (self.unflushed - moved) | {path.replace(source, target, 1) for path in moved}

    def _undo(self, source: str, target: str) -> Callable[[], None]:
        before = Path(target).read_bytes() if os.path.isfile(target) else None

        def undo() -> None:
            if os.path.lexists(target):
                self.real["rename"](target, source)
                if before is not None:
                    Path(target).write_bytes(before)

        return undo

    def _die(self) -> None:
        if self.power:
            for path in self.unflushed:
                if os.path.isfile(path):
                    self._lose(path)
            # a file system records names in their order: what is lost is the end of the list
            kept = self.dice.randrange(len(self.renamed) + 1)
            for _, undo in reversed(self.renamed[kept:]):
                undo()
        os._exit(DIED)

    def _lose(self, path: str) -> None:
        """Unflushed bytes are missing, or zeros where the length was recorded and the content was not."""
        size = os.path.getsize(path)
        self.real["truncate"](path, self.dice.randrange(size + 1))
        if self.dice.random() < 0.5:
            self.real["truncate"](path, size)
