"""The mesh of ranks: axes pp, dp, tp, and kv (ranks of a tp group that hold the same key/value heads).

A mesh is passed as an argument; there is no global state. An axis of size 1 has no group and costs nothing.
"""

import functools
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass(frozen=True)
class Axis:
    """One axis of the mesh as this rank sees it. group is None at size 1."""

    name: str
    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None


@dataclass(frozen=True)
class Mesh:
    """This rank's place. tp ranks are neighbours; kv splits tp: ranks that differ only in kv hold the same kv heads."""

    pp: Axis = Axis("pp")
    dp: Axis = Axis("dp")
    tp: Axis = Axis("tp")
    kv: Axis = Axis("kv")
    device: torch.device = torch.device("cpu")
    sequence_parallel: bool = False
    keep_gathered: bool = False

    @property
    def rank(self) -> int:
        return (self.pp.rank * self.dp.size + self.dp.rank) * self.tp.size + self.tp.rank

    @property
    def size(self) -> int:
        return self.pp.size * self.dp.size * self.tp.size

    @property
    def sp(self) -> Axis:
        """The axis over which the residual stream's first dimension is split: tp with sequence parallelism."""
        return self.tp if self.sequence_parallel else Axis("sp")

    def axis(self, name: str) -> Axis:
        return cast(Axis, getattr(self, name))


def build_mesh(
    *,
    tp: int,
    pp: int,
    dp: int,
    kv_heads: int,
    device: torch.device,
    sequence_parallel: bool = False,
    keep_gathered: bool = False,
) -> Mesh:
    """The mesh over all ranks of the default process group, which must be pp * dp * tp (``plan`` has checked that)."""
    if tp * pp * dp == 1:
        return Mesh(device=device)
    axes = _axes(dist.group.WORLD, tp, pp, dp, max(1, tp // kv_heads), device.type)
    return Mesh(*axes, device, sequence_parallel and tp > 1, keep_gathered)


@functools.cache
def _axes(
    everyone: dist.ProcessGroup | None, tp: int, pp: int, dp: int, replicas: int, device_type: str
) -> tuple[Axis, Axis, Axis, Axis]:
    """The axes pp, dp, tp, kv over the ranks of ``everyone``. Groups cost threads: the same layout is made once."""
    names = ("pp", "dp", "head", "kv")
    mesh = init_device_mesh(device_type, (pp, dp, tp // replicas, replicas), mesh_dim_names=names)
    flat = mesh["head", "kv"]._flatten("tp")

    def axis(name: str, source: DeviceMesh) -> Axis:
        group = source.get_group()
        size = dist.get_world_size(group)
        return Axis(name, size, dist.get_rank(group), group if size > 1 else None)

    return axis("pp", mesh["pp"]), axis("dp", mesh["dp"]), axis("tp", flat), axis("kv", mesh["kv"])
