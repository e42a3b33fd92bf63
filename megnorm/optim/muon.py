"""Muon: momentum whose matrices are orthogonalized before they are applied (K. Jordan 2024; arXiv:2502.16982).

It updates logical matrices whole: q, k, v, gate and up each on its own, although they lie in one tensor, and never a
slice. A rank has some elements of a matrix, those that it updates: a slice over tp, and with ZeRO-1 a range of that,
which may begin and end inside a row. Momentum lies with them. The matrices of a stage are dealt to its dp x tp ranks, so
that each is computed once: one all-to-all brings every rank its matrices, one takes the results back. In both a rank
sends and receives about what it holds, in the dtype of the iteration, however many ranks there are.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megnorm.optim.config import MuonConfig, OptimConfig
from megnorm.parallel.collectives import gather_objects, start_all_to_all, wait_for
from megnorm.parallel.layout import Matrix, Piece, boxes_of
from megnorm.parallel.mesh import Mesh, stage_axis

ROLES = ("q", "k", "v", "o", "up", "gate", "down")
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # K. Jordan's: a steep start, after which singular values only come near 1
EPS = 1e-7
ROUND = 1 << 26  # elements of matrices that a rank holds at a time, about

Message = tuple[Tensor, dist.Work | None]


def takes(matrix: Matrix) -> bool:
    """Whether Muon updates it: the matrices of attention and feed-forward. AdamW has all else."""
    return matrix.role in ROLES and len(matrix.shape) == 2


def orthogonalize(x: Tensor, steps: int) -> Tensor:
    """[n, rows, columns], rows <= columns -> about U V^T of each U S V^T, by Newton-Schulz iteration in x's dtype."""
    a, b, c = COEFFICIENTS
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp_min(EPS)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def update_scale(rule: str, shape: tuple[int, ...]) -> float:
    """What an orthogonalized matrix is multiplied by; ``MuonConfig.scale`` says what the rules are for."""
    rows, columns = shape
    return 0.2 * math.sqrt(max(rows, columns)) if rule == "rms" else math.sqrt(max(1.0, rows / columns))


def iteration_dtype(config: MuonConfig, master: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which matrices travel and are orthogonalized."""
    lowered = config.precision == "bf16" or (config.precision == "auto" and device.type != "cpu")
    return torch.bfloat16 if lowered else master


@dataclass(frozen=True)
class Part:
    """What a rank has of a matrix of ``shape``: elements [first, last) of its slice, which is ``local`` at ``offset``.

    owner: of the ranks of a model's copy that hold the slice, the one that speaks for it. dtype: of the master. replicas:
    see Matrix.
    """

    name: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    local: tuple[int, ...]
    first: int
    last: int
    owner: bool
    dtype: torch.dtype
    replicas: str

    @staticmethod
    def of(piece: Piece) -> "Part":
        name, m = piece.named.name, piece.named.matrix
        return Part(name, m.shape, m.offset, m.local, piece.first, piece.last, m.owner, piece.master.dtype, m.replicas)

    @property
    def size(self) -> int:
        return self.last - self.first

    def boxes(self, whole: Tensor) -> Iterator[Tensor]:
        """Views of the whole matrix that make up this part, in the order of its elements."""
        for (top, left), (rows, columns), _ in boxes_of(self.first, self.last, self.local):
            yield whole.narrow(0, self.offset[0] + top, rows).narrow(1, self.offset[1] + left, columns)


def deal(shapes: Mapping[str, tuple[int, ...]], ranks: int, limit: int) -> list[dict[str, int]]:
    """Rounds of {matrix: the rank that computes it}: FLOPs spread evenly, about ``limit`` elements a rank and round."""
    rounds: list[dict[str, int]] = []
    loads, elements = [0] * ranks, 0
    # The most expensive first, each to the rank with the least to do; matrices of equal shape follow each other.
    for name in sorted(shapes, key=lambda name: (-flops(shapes[name]), sorted(shapes[name]), name)):
        if not rounds or elements >= limit * ranks:
            rounds.append({})
            elements = 0
        rounds[-1][name] = rank = loads.index(min(loads))
        loads[rank] += flops(shapes[name])
        elements += math.prod(shapes[name])
    return rounds


def flops(shape: tuple[int, ...]) -> int:
    """FLOPs of one iteration on a matrix."""
    low, high = sorted(shape)
    return 4 * low * low * high + 2 * low**3


@dataclass(frozen=True)
class Leg:
    """One side of an all-to-all: the parts that a rank sends or receives, by the other rank, and their elements."""

    parts: list[Part]
    counts: list[int]

    @staticmethod
    def of(by_rank: Sequence[Sequence[Part]]) -> "Leg":
        counts = [sum(part.size for part in parts) for parts in by_rank]
        return Leg([part for parts in by_rank for part in parts], counts)

    @property
    def sizes(self) -> list[int]:
        return [part.size for part in self.parts]


@dataclass(frozen=True)
class Route:
    """What a rank exchanges in one round.

    sent: of its own parts, to where their matrices are computed; taken: parts of the matrices that it computes. due: the
    results that it owes to all who hold a part of those; back: results for its own parts.
    """

    sent: Leg
    taken: Leg
    due: Leg
    back: Leg

    @staticmethod
    def of(
        dealt: Mapping[str, int], held: Sequence[Sequence[Part]], copies: Mapping[str, Sequence[int]], rank: int
    ) -> "Route":
        """held: by rank its parts; copies: by rank the copy of the model that it is of, for each kind of replicas.
        Senders and workers are of one copy."""

        def between(holder: int, worker: int) -> list[Part]:
            return [part for part in held[holder] if dealt.get(part.name) == worker]

        def spoken(holder: int, worker: int) -> list[Part]:
            own = {kind for kind, copy in copies.items() if copy[holder] == copy[worker]}
            return [part for part in between(holder, worker) if part.owner and part.replicas in own]

        ranks = range(len(held))
        route = Route(
            Leg.of([spoken(rank, other) for other in ranks]),
            Leg.of([spoken(other, rank) for other in ranks]),
            Leg.of([between(other, rank) for other in ranks]),
            Leg.of([between(rank, other) for other in ranks]),
        )
        missing = {name: math.prod(shape) for name, shape in route.shapes.items()}
        for part in route.taken.parts:
            missing[part.name] -= part.size
        assert not any(missing.values()), "every element of a matrix arrives once"
        return route

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The matrices that this rank computes."""
        return {part.name: part.shape for part in self.due.parts}


class Muon:
    """Muon on ``pieces``, which hold nothing but what it ``takes``. sharded: pieces of the dp axis differ (ZeRO-1).

    Every rank of the mesh must build one. limit: see ROUND.
    """

    def __init__(
        self, pieces: Sequence[Piece], config: OptimConfig, mesh: Mesh, *, sharded: bool, limit: int = ROUND
    ) -> None:
        self.config, self.axis = config, stage_axis(mesh)
        own = [Part.of(piece) for piece in pieces]
        self.pieces = {part.name: piece for part, piece in zip(own, pieces, strict=True)}
        self.momentum = {name: torch.zeros_like(piece.master) for name, piece in self.pieces.items()}
        held = gather_objects(own, self.axis)
        everything = [part for parts in held for part in parts]
        master = everything[0].dtype if everything else torch.float32  # without any, there are no rounds either
        self.dtype, self.device = iteration_dtype(config.muon, master, mesh.device), mesh.device
        tp, ep, ranks = mesh.tp.size, mesh.ep.size, range(self.axis.size)
        copies = {
            kind: [0 if sharded else rank // width for rank in ranks] for kind, width in (("dp", tp), ("edp", tp * ep))
        }
        rounds = deal({part.name: part.shape for part in everything}, self.axis.size, limit)
        self.routes = [Route.of(dealt, held, copies, self.axis.rank) for dealt in rounds]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update of the masters with learning rate ``lr``; the messages of a round travel while others are computed."""
        coming = [self._collect(route) for route in self.routes[:1]]
        going: list[tuple[Route, Message]] = []
        for i, route in enumerate(self.routes):
            arrived = _wait(coming.pop())
            coming += [self._collect(ahead) for ahead in self.routes[i + 1 : i + 2]]
            going.append((route, self._compute(route, arrived)))
            if i > 0:
                self._apply(*going.pop(0), lr)
        for last in going:
            self._apply(*last, lr)

    def _collect(self, route: Route) -> Message:
        """Update the momentum of a round, and send what is to be orthogonalized to where that is done."""
        c, names = self.config.muon, [part.name for part in route.back.parts]
        grads, momenta = [self.pieces[name].grad for name in names], [self.momentum[name] for name in names]
        if names:
            torch._foreach_lerp_(momenta, grads, 1.0 - c.momentum)
        found = torch._foreach_lerp(grads, momenta, c.momentum) if c.nesterov and names else momenta
        ahead = dict(zip(names, found, strict=True))
        values = self._join([ahead[part.name] for part in route.sent.parts])
        return start_all_to_all(values, route.sent.counts, route.taken.counts, self.axis)

    def _compute(self, route: Route, arrived: Tensor) -> Message:
        """Put the matrices of this rank together, orthogonalize those of one shape at once, and send the results."""
        whole: dict[str, Tensor] = {}
        stacks: dict[tuple[int, ...], list[str]] = {}
        for name, shape in route.shapes.items():
            stacks.setdefault(tuple(sorted(shape)), []).append(name)
        filled = []
        for shape, names in stacks.items():
            filled.append(arrived.new_empty(len(names), *shape))
            for name, slot in zip(names, filled[-1], strict=True):
                # Tall ones lie on their side: iterations then multiply by the smaller of the two square matrices.
                whole[name] = slot if slot.shape == route.shapes[name] else slot.t()
        for part, values in zip(route.taken.parts, arrived.split(route.taken.sizes), strict=True):
            boxes = list(part.boxes(whole[part.name]))
            for box, inside in zip(boxes, values.split([box.numel() for box in boxes]), strict=True):
                box.copy_(inside.view(box.shape))
        for stack in filled:
            stack.copy_(orthogonalize(stack, self.config.muon.ns_steps))
        values = self._join([box.reshape(-1) for part in route.due.parts for box in part.boxes(whole[part.name])])
        return start_all_to_all(values, route.due.counts, route.back.counts, self.axis)

    def _apply(self, route: Route, message: Message, lr: float) -> None:
        """Decoupled weight decay, then the update (as torch.optim.Muon)."""
        config, results = self.config, _wait(message)
        for part, update in zip(route.back.parts, results.split(route.back.sizes), strict=True):
            piece, role = self.pieces[part.name], self.pieces[part.name].named.matrix.role
            rate = lr * config.muon.rate * config.rate.get(role, 1.0)
            piece.master.mul_(1.0 - rate * config.decay_of(role))
            piece.master.add_(update, alpha=-rate * update_scale(config.muon.scale, part.shape))

    def _join(self, values: Sequence[Tensor]) -> Tensor:
        """One vector in the dtype of the iteration; empty for none."""
        empty = torch.empty(0, dtype=self.dtype, device=self.device)
        return torch.cat([empty, *(value.to(self.dtype) for value in values)])


def _wait(message: Message) -> Tensor:
    tensor, work = message
    if work is not None:
        wait_for(work, "all_to_all of matrices", "stage", tensor.nbytes)
    return tensor
