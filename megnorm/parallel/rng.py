"""Seeds by name, and dropout's masks as a function of place.

Every random number is a function of (seed, what for): a resumed run, another layout, another order of construction or a
unit that is computed a second time draws the same ones.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


def derive(seed: int, *names: object) -> int:
    """A 63-bit seed for the purpose ``names``, the same on every machine."""
    text = "\x1f".join(str(name) for name in (seed, *names))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


@dataclass(frozen=True)
class Place:
    """What draws, beside the unit's name. No pipeline rank: masks are the same however the layers are spread."""

    seed: int = 0
    step: int = 0
    micro_batch: int = 0
    dp_rank: int = 0
    tp_rank: int = 0


class DropoutRng:
    """Dropout's random numbers: those of a unit begin anew from (place, name) whenever it enters.

    Nothing is carried from one unit to the next, so nothing needs to be saved for a resume, and what is computed again in
    backward draws its masks again. Shared numbers are equal on all ranks of a tp group, local ones differ by rank.
    """

    def __init__(self, device: torch.device) -> None:
        self.place = Place()
        self._generator = torch.Generator(device)

    def begin(self, seed: int, step: int, micro_batch: int, dp_rank: int, tp_rank: int) -> None:
        """Fix the place for the micro-batch whose forward pass comes now."""
        self.place = Place(seed, step, micro_batch, dp_rank, tp_rank)

    @contextmanager
    def at(self, place: Place) -> Iterator[None]:
        """Return to the place of a micro-batch for what is computed again (others may have begun since)."""
        now, self.place = self.place, place
        try:
            yield
        finally:
            self.place = now

    def enter(self, name: str, *, local: bool) -> torch.Generator:
        """The generator at the beginning of a unit's numbers; the next ``enter`` takes it away."""
        return self._generator.manual_seed(self._seed(name, local))

    @contextmanager
    def as_default(self, name: str, *, local: bool) -> Iterator[None]:
        """Enter with torch's default generator, for kernels that draw by themselves (attention dropout)."""
        device = self._generator.device
        cuda = device.type == "cuda"
        default = torch.cuda.default_generators[device.index or 0] if cuda else torch.default_generator
        before = default.get_state()
        default.manual_seed(self._seed(name, local))
        try:
            yield
        finally:
            default.set_state(before)

    def _seed(self, name: str, local: bool) -> int:
        p = self.place
        rank = ("tp", p.tp_rank) if local else ()
        return derive(p.seed, "dropout", p.step, p.micro_batch, p.dp_rank, name, *rank)
