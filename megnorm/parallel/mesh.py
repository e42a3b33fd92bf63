"""The mesh of ranks: axes pp, dp, tp, kv (ranks of a tp group that hold the same key/value heads) and ends (the first and
the last stage, which share a tied embedding). Ties are further sets of stages that share a parameter. dp is edp x ep: ep
ranks share the experts of sparse layers, and edp ranks hold the same ones.

A mesh is passed as an argument; there is no global state. An axis of size 1 has no group and costs nothing.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from types import MappingProxyType
from typing import cast

import torch
import torch.distributed as dist

from megnorm.parallel import nccl


@dataclass(frozen=True)
class Axis:
    """One axis of the mesh as this rank sees it. group is None at size 1."""

    name: str
    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None


@dataclass(frozen=True)
class Mesh:
    """This rank's place. tp ranks are neighbours; kv splits tp: ranks that differ only in kv hold the same kv heads. ep and
    edp split dp, of which ep ranks are neighbours.

    ends: of the ranks that differ in pp alone the first and the last; size 1 between them. ties: the like by name, of other
    sets of such ranks; size 1 on ranks outside of a set.
    lanes: groups over pp for messages of each kind ("F", "B") from senders of each parity; empty: pp's own group.
    timeout: seconds, of every collective of these groups; None: torch's.
    """

    pp: Axis = Axis("pp")
    dp: Axis = Axis("dp")
    tp: Axis = Axis("tp")
    kv: Axis = Axis("kv")
    ep: Axis = Axis("ep")
    edp: Axis = Axis("edp")
    ends: Axis = Axis("ends")
    ties: Mapping[str, Axis] = field(default_factory=dict)
    lanes: Mapping[tuple[str, int], dist.ProcessGroup] = field(default_factory=dict)
    device: torch.device = torch.device("cpu")
    sequence_parallel: bool = False
    keep_gathered: bool = False
    timeout: float | None = None

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
        return self.ties[name] if name in self.ties else cast(Axis, getattr(self, name))


def build_mesh(
    *,
    tp: int,
    pp: int,
    dp: int,
    ep: int = 1,
    kv_heads: int,
    device: torch.device,
    sequence_parallel: bool = False,
    keep_gathered: bool = False,
    ties: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
    timeout: float | None = None,
) -> Mesh:
    """The mesh over all ranks of the default process group, which must be pp * dp * tp (``plan`` has checked that).

    ep: divides dp. ties: by name, the pp ranks that share something. timeout: seconds, of every collective; None: torch's.
    """
    if tp * pp * dp == 1:
        return Mesh(device=device)
    how = How(dist.group.WORLD, device.type, timeout)
    axes = _axes(how, tp, pp, dp, ep, max(1, tp // kv_heads))
    lines = _pipelines(pp, dp * tp)
    ends = _tie(how, lines, "ends", (0, pp - 1)) if pp > 1 else Axis("ends")
    lanes = _lanes(how, lines) if device.type == "cuda" and pp > 1 else {}
    tied = {name: _tie(how, lines, name, ranks) for name, ranks in sorted(ties.items())}
    return Mesh(*axes, ends, tied, lanes, device, sequence_parallel and tp > 1, keep_gathered, timeout)


@dataclass(frozen=True)
class How:
    """How groups are made. everyone: the default group, of whose life they are."""

    everyone: dist.ProcessGroup | None
    device_type: str = "cpu"
    timeout: float | None = None

    def own_group(self, members: Sequence[Sequence[int]], name: str) -> dist.ProcessGroup | None:
        """Make all these groups of the axis ``name``, which every rank must do; the one that this rank is in."""
        own, limit = None, None if self.timeout is None else timedelta(seconds=self.timeout)
        for ranks in members:
            options = nccl.options(name, self.device_type, limit)
            group = dist.new_group(list(ranks), timeout=limit, pg_options=options, group_desc=f"megnorm {name}")
            if dist.get_rank() in ranks:
                own = group
        return own


def _pipelines(pp: int, width: int) -> tuple[tuple[int, ...], ...]:
    """The ranks of every pipeline, in order of stages."""
    return tuple(tuple(stage * width + i for stage in range(pp)) for i in range(width))


@functools.cache
def _tie(how: How, lines: tuple[tuple[int, ...], ...], name: str, places: tuple[int, ...]) -> Axis:
    """The ranks at these places of this rank's pipeline, if it is one of them."""
    if len(places) == 1:
        return Axis(name)
    group = how.own_group([[line[place] for place in places] for line in lines], name)
    return Axis(name) if group is None else Axis(name, len(places), dist.get_rank(group), group)


@functools.cache
def _lanes(how: How, lines: tuple[tuple[int, ...], ...]) -> dict[tuple[str, int], dist.ProcessGroup]:
    """NCCL queues all messages of a pair of ranks and a group one behind the other, whatever their direction.

    A receive that is posted ahead would hold up a send that the other side waits for. In a lane every pair has messages
    in one direction only, and those are received in the order in which they are sent.
    """
    made = {(kind, parity): how.own_group(lines, "pp") for kind in "FB" for parity in (0, 1)}
    return {key: group for key, group in made.items() if group is not None}


@functools.cache
def _axes(how: How, tp: int, pp: int, dp: int, ep: int, replicas: int) -> tuple[Axis, Axis, Axis, Axis, Axis, Axis]:
    """The axes pp, dp, tp, kv, ep, edp. Groups cost threads: a layout is made once, and no group for a single rank."""
    ranks = torch.arange(pp * dp * tp).view(pp, dp // ep, ep, tp // replicas, replicas)

    def axis(name: str, *dims: int) -> Axis:
        members = ranks.movedim(dims, tuple(range(-len(dims), 0))).flatten(-len(dims)).flatten(0, -2).tolist()
        if len(members[0]) == 1:
            return Axis(name)
        group = how.own_group(members, name)
        return Axis(name, len(members[0]), dist.get_rank(group), group)

    every = axis("dp", 1, 2)
    edp = axis("edp", 1) if ep > 1 else replace(every, name="edp")
    return axis("pp", 0), every, axis("tp", 3, 4), axis("kv", 4), axis("ep", 2), edp


def stage_axis(mesh: Mesh) -> Axis:
    """All ranks of this rank's stage: dp x tp, dp first. Every rank of the mesh must call it, since it may make groups."""
    dp, tp = mesh.dp, mesh.tp
    width = dp.size * tp.size
    if dp.size == 1 or tp.size == 1:
        group = tp.group if dp.size == 1 else dp.group
    else:
        group = _stage_group(How(dist.group.WORLD, mesh.device.type, mesh.timeout), mesh.pp.size, width)
    return Axis("stage", width, dp.rank * tp.size + tp.rank, group)


@functools.cache
def _stage_group(how: How, pp: int, width: int) -> dist.ProcessGroup | None:
    stages = [list(range(stage * width, (stage + 1) * width)) for stage in range(pp)]
    return how.everyone if pp == 1 else how.own_group(stages, "stage")
