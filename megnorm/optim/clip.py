"""The global gradient norm, each logical element counted once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megnorm.parallel.collectives import all_reduce
from megnorm.parallel.layout import Piece
from megnorm.parallel.mesh import Mesh


def global_norm(pieces: Sequence[Piece], mesh: Mesh, *, sharded: bool) -> Tensor:
    """sqrt of the sum of squares of the reduced gradients over the whole model, a scalar on every rank.

    pieces: what this rank updates; slices held by several ranks are counted by their owner. sharded: pieces of the ranks
    of the dp axis differ (ZeRO-1).
    """
    totals = torch.zeros(2, dtype=torch.double, device=mesh.device)  # what every rank of a stage holds; experts
    for i, replicas in enumerate(("dp", "edp")):
        held = [piece for piece in pieces if piece.named.matrix.replicas == replicas]
        owned = [piece.grad for piece in held if piece.named.matrix.owner]
        if owned:  # a rank's range may hold nothing but slices that others own
            totals[i] += torch.stack([norm.double() for norm in torch._foreach_norm(owned)]).square().sum()
    for axis in (mesh.tp, mesh.pp, *((mesh.dp,) if sharded else ())):
        all_reduce(totals, axis)
    if not sharded:
        all_reduce(totals[1:], mesh.ep)
    return totals.sum().sqrt()


def clip_factor(norm: Tensor, largest: float) -> float:
    """What to multiply gradients by so that their norm is at most ``largest``; 1 for largest = 0 (no clipping)."""
    return 1.0 if largest == 0.0 else min(1.0, largest / (float(norm) + 1e-6))
