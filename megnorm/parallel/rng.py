"""Seeds by name, and the two random streams of dropout under tensor parallelism.

Every random number is a function of (seed, what for): a resumed run, another layout or another order of construction
draws the same ones.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derive(seed: int, *names: object) -> int:
    """A 63-bit seed for the purpose ``names``, the same on every machine."""
    text = "\x1f".join(str(name) for name in (seed, *names))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


class DropoutRng:
    """Dropout's random numbers: the shared stream is equal on all ranks of a tp group, the local one differs by rank.

    ``start`` fixes both for one micro-batch of one step; nothing needs to be saved for a resume.
    """

    def __init__(self, device: torch.device) -> None:
        self.shared = torch.Generator(device)
        self.local = torch.Generator(device)

    def start(self, seed: int, *place: object, tp_rank: int) -> None:
        """Begin the streams of a place, e.g. (step, micro-batch, dp rank, stage)."""
        self.shared.manual_seed(derive(seed, "dropout", *place))
        self.local.manual_seed(derive(seed, "dropout", *place, "tp", tp_rank))

    def stream(self, local: bool) -> torch.Generator:
        return self.local if local else self.shared

    @contextmanager
    def as_default(self, local: bool) -> Iterator[None]:
        """Lend a stream to torch's default generator, for kernels that draw by themselves (attention dropout)."""
        stream = self.stream(local)
        default = torch.cuda.default_generators[stream.device.index or 0] if stream.device.type == "cuda" else None
        target = default if default is not None else torch.default_generator
        before = target.get_state()
        target.set_state(stream.get_state())
        try:
            yield
        finally:
            stream.set_state(target.get_state())
            target.set_state(before)
