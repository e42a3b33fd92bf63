"""What the ranks tell each other outside of a step: small plain values, and yes or no."""

import json
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from megnorm.parallel.collectives import all_gather, all_reduce
from megnorm.parallel.mesh import Axis, Mesh


def world(mesh: Mesh) -> Axis:
    """All ranks as one axis."""
    return Axis("world", mesh.size, mesh.rank, dist.group.WORLD if mesh.size > 1 else None)


def agreed(mine: Sequence[bool], mesh: Mesh) -> list[bool]:
    """For each question whether any rank says yes; the same answers on every rank."""
    if mesh.size == 1:
        return list(mine)
    flags = torch.tensor(mine, dtype=torch.int32, device=mesh.device)
    all_reduce(flags, world(mesh), dist.ReduceOp.MAX)
    return [bool(flag) for flag in flags.tolist()]


def gathered(mine: Any, mesh: Mesh) -> list[Any]:
    """The JSON value of every rank, by rank."""
    text = json.dumps(mine).encode()
    if mesh.size == 1:
        return [json.loads(text)]
    sizes = all_gather(torch.tensor([len(text)], device=mesh.device), world(mesh)).tolist()
    padded = torch.zeros(max(sizes), dtype=torch.uint8)
    padded[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    table = all_gather(padded.to(mesh.device), world(mesh)).cpu().view(mesh.size, -1)
    return [json.loads(bytes(row[:size].tolist())) for row, size in zip(table, sizes, strict=True)]
