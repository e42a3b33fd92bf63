"""The global gradient norm, each logical element counted once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megnorm.parallel.collectives import all_reduce
from megnorm.parallel.layout import Named
from megnorm.parallel.mesh import Mesh


def global_norm(named: Sequence[Named], mesh: Mesh) -> Tensor:
    """sqrt of the sum of squares of ``main_grad`` over the whole model, a scalar on every rank.

    A slice held by several ranks is counted by its owner; storage that belongs to no matrix is not counted.
    """
    grads = [n.view(n.param.main_grad) for n in named if n.matrix.owner]  # type: ignore[attr-defined]
    norms = torch._foreach_norm([grad for grad in grads if grad.numel()])
    total = (
        torch.stack([norm.double() for norm in norms]).square().sum() if norms else torch.zeros((), dtype=torch.double)
    )
    for axis in (mesh.tp, mesh.pp):
        all_reduce(total, axis)
    return total.sqrt()


def clip_factor(norm: Tensor, largest: float) -> float:
    """What to multiply gradients by so that their norm is at most ``largest``; 1 for largest = 0 (no clipping)."""
    return 1.0 if largest == 0.0 else min(1.0, largest / (float(norm) + 1e-6))
