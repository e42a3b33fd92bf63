"""AdamW on the pieces of logical matrices that a rank updates: what a step does to weights, and the state it keeps."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megnorm.optim.config import OptimConfig
from megnorm.parallel.layout import Piece


@dataclass(frozen=True)
class State:
    """One tensor of optimizer state ("exp_avg", "exp_avg_sq"), a vector like the piece it belongs to."""

    kind: str
    piece: Piece
    tensor: Tensor


class Optimizer:
    """torch.optim.AdamW over the masters of ``pieces``; groups share weight decay and a factor on the rate."""

    def __init__(self, pieces: Sequence[Piece], config: OptimConfig) -> None:
        self.pieces, self.config = list(pieces), config
        groups: dict[tuple[float, float], list[Tensor]] = {}
        for piece in self.pieces:
            role = piece.named.matrix.role
            groups.setdefault((config.decay_of(role), config.rate.get(role, 1.0)), []).append(piece.master)
        self.adamw = torch.optim.AdamW(
            # A rank of a very small model may have nothing to update; torch asks for a tensor all the same.
            [{"params": ps, "weight_decay": wd, "rate": rate} for (wd, rate), ps in groups.items()]
            or [{"params": [torch.zeros(0)], "rate": 1.0}],
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            fused=True,
        )
        for piece in self.pieces:
            self.adamw.state[piece.master] = {
                "step": torch.zeros((), dtype=torch.float32, device=piece.master.device),
                "exp_avg": torch.zeros_like(piece.master),
                "exp_avg_sq": torch.zeros_like(piece.master),
            }

    def step(self, lr: float) -> None:
        """One update of the masters with learning rate ``lr``; weights follow when they are published."""
        for piece in self.pieces:
            piece.master.grad = piece.grad
        for group in self.adamw.param_groups:
            group["lr"] = lr * group["rate"]
        self.adamw.step()
        for piece in self.pieces:
            piece.master.grad = None

    def states(self) -> Iterator[State]:
        """The moments of every piece; with the masters and the number of updates, all that continues exactly."""
        for piece in self.pieces:
            for kind in ("exp_avg", "exp_avg_sq"):
                yield State(kind, piece, self.adamw.state[piece.master][kind])

    def set_updates(self, count: int) -> None:
        """Tell AdamW how many updates its moments have seen (bias correction), after a load."""
        for piece in self.pieces:
            self.adamw.state[piece.master]["step"].fill_(float(count))
