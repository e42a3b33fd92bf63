"""What a step does to the pieces of logical matrices that a rank updates, and the state it keeps: AdamW, or Muon and AdamW."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megnorm.optim.config import OptimConfig
from megnorm.optim.muon import Muon, takes
from megnorm.parallel.layout import Piece
from megnorm.parallel.mesh import Mesh


@dataclass(frozen=True)
class State:
    """One tensor of optimizer state ("exp_avg", "exp_avg_sq", "momentum"), a vector like the piece it belongs to."""

    kind: str
    piece: Piece
    tensor: Tensor


class Optimizer:
    """AdamW over the masters of ``pieces``; groups share weight decay and a factor on the rate.

    With ``optim.name=muon`` the matrices that Muon takes are its own. sharded: the pieces of the ranks of the dp axis
    differ (ZeRO-1). adamw: makes the optimizer (groups, lr, betas, eps), torch's or a library's of its form. Every rank of
    the mesh must build one.
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        config: OptimConfig,
        mesh: Mesh,
        *,
        sharded: bool,
        adamw: Callable[..., Any],
    ) -> None:
        self.muon: Muon | None = None
        if config.name == "muon":
            matrices = [piece for piece in pieces if takes(piece.named.matrix)]
            self.muon = Muon(matrices, config, mesh, sharded=sharded)
            pieces = [piece for piece in pieces if not takes(piece.named.matrix)]
        self.pieces = list(pieces)  # AdamW's
        groups: dict[tuple[float, float], list[Tensor]] = {}
        for piece in self.pieces:
            role = piece.named.matrix.role
            groups.setdefault((config.decay_of(role), config.rate.get(role, 1.0)), []).append(piece.master)
        self.adamw = adamw(
            # A rank of a very small model may have nothing to update; torch asks for a tensor all the same.
            [{"params": ps, "weight_decay": wd, "rate": rate} for (wd, rate), ps in groups.items()]
            or [{"params": [torch.zeros(0)], "rate": 1.0}],
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
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
        if self.muon is not None:
            self.muon.step(lr)

    def states(self) -> Iterator[State]:
        """The moments of every piece; with the masters and the number of updates, all that continues exactly."""
        for piece in self.pieces:
            for kind in ("exp_avg", "exp_avg_sq"):
                yield State(kind, piece, self.adamw.state[piece.master][kind])
        if self.muon is not None:
            for name, tensor in self.muon.momentum.items():
                yield State("momentum", self.muon.pieces[name], tensor)

    def set_updates(self, count: int) -> None:
        """Tell AdamW how many updates its moments have seen (bias correction), after a load."""
        for piece in self.pieces:
            self.adamw.state[piece.master]["step"].fill_(float(count))
        for group in self.adamw.param_groups:  # where a library counts
            group["step"] = count
