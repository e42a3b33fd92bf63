"""Data parallelism: flat weights and gradients, summed bucket by bucket while backward still runs.

A rank's parameters lie one behind the other in one flat tensor, in the order in which backward reaches them, and so do
their gradients, in the dtype of accumulation. A bucket is a contiguous range of both. During the last backward of a step
a bucket is summed over the data-parallel ranks as soon as its gradients are complete.

With ZeRO-1 every rank of the dp axis updates an equal contiguous range of each bucket, and keeps fp32 masters and
moments of that range alone: sums are reduce-scattered, and updated weights gathered bucket by bucket, in the order of the
forward pass, which waits for a bucket where it is first used (arXiv:1910.02054, stage 1).

What belongs to experts lies in buckets of its own, behind all others: with expert parallelism its replicas are those of the
edp axis, and all that is said here of dp holds for them with that axis.
"""

import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megnorm.parallel.collectives import start_all_gather, start_all_reduce, start_reduce_scatter, wait_for
from megnorm.parallel.layout import Named, Piece, layout_of, named_matrices, reduce_replicated_grads
from megnorm.parallel.mesh import Axis, Mesh
from megnorm.parallel.messages import Pending

ALIGN = 64  # elements: where a parameter may begin; a multiple of what any GEMM kernel asks for


@dataclass(frozen=True)
class Range:
    """Where a bucket lies in flat storage, and which parameters (indices in storage order) lie in it."""

    start: int
    stop: int
    members: tuple[int, ...]


def pack(sizes: Sequence[int], bucket: int, shards: int) -> tuple[list[int], list[Range]]:
    """Offsets of tensors of ``sizes`` elements, and their buckets: each filled to about ``bucket`` elements.

    A bucket's length is a multiple of shards * ALIGN, so that all ranks get equal, aligned ranges of it.
    """
    offsets: list[int] = []
    ranges: list[Range] = []
    at = begin = 0
    members: list[int] = []
    for i, size in enumerate(sizes):
        offsets.append(at)
        members.append(i)
        at = _up(at + size, ALIGN)
        if at - begin >= bucket or i == len(sizes) - 1:
            at = begin + _up(at - begin, shards * ALIGN)
            ranges.append(Range(begin, at, tuple(members)))
            begin, members = at, []
    return offsets, ranges


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


@dataclass
class Bucket:
    """A range [start, stop) of the flat tensors. own: the range in it that this rank updates.

    axis: over which it is summed. stage: whose backward fills it. deferred: summed after all backward, since its sum needs
    other stages. waiting: parameters without their last gradient. work, gathering: the collectives under way.
    """

    start: int
    stop: int
    own: tuple[int, int]
    axis: Axis
    stage: int
    params: list[nn.Parameter]
    deferred: bool
    waiting: set[int] = field(default_factory=set)
    expected: bool = False
    work: Pending | None = None
    gathering: Pending | None = None


class DataParallel:
    """Flat storage of the parameters of this rank's stages, and their way over the dp axis.

    stages: by global index. compute: dtype that weights are lowered to; what they were built in stays in the masters.
    accumulate: dtype of gradients. shard: ZeRO-1. After ``finish`` the gradients of ``pieces`` are the sums over all
    ranks; elements outside of them are not (``gather_grads`` brings them).
    """

    def __init__(
        self,
        stages: Mapping[int, nn.Module],
        mesh: Mesh,
        *,
        compute: torch.dtype,
        accumulate: torch.dtype,
        shard: bool = False,
        bucket_bytes: float = 40e6,
    ) -> None:
        self.mesh, self.shard = mesh, shard and mesh.dp.size > 1
        params, stage_of = self._order(stages)
        self.params = params
        offsets: list[int] = []
        self.buckets: list[Bucket] = []
        # A bucket lies in one stage, and holds what is summed during backward or what is deferred, not both.
        for run in _runs([(stage_of[id(p)], _tie(p), _replicas(p)) for p in params]):
            axis = mesh.axis(_replicas(params[run.start]))
            parts = axis.size if self.shard else 1
            limit = int(bucket_bytes / accumulate.itemsize) if axis.size > 1 else 1 << 62
            base = self.buckets[-1].stop if self.buckets else 0
            starts, ranges = pack([p.numel() for p in params[run.start : run.stop]], limit, parts)
            offsets += [base + start for start in starts]
            for found in ranges:
                held = [params[run.start + i] for i in found.members]
                start, stop = base + found.start, base + found.stop
                length = (stop - start) // parts
                first = start + (axis.rank * length if self.shard else 0)
                stage, deferred = stage_of[id(held[0])], bool(_tie(held[0]))
                self.buckets.append(Bucket(start, stop, (first, first + length), axis, stage, held, deferred))
        # One line of buckets for each axis: in each, all ranks must start the same collectives in the same order.
        lines = {name: [b for b in self.buckets if b.axis.name == name] for name in ("dp", "edp")}
        self._lines = {name: line for name, line in lines.items() if line}
        place = {key: i for i, key in enumerate(stage_of)}  # as backward reaches them
        self._ahead = sorted(self.buckets, key=lambda b: max(place[id(p)] for p in b.params), reverse=True)
        self._bucket_of = {id(p): bucket for bucket in self.buckets for p in bucket.params}
        self._fill(dict(zip(map(id, params), offsets, strict=True)), compute, accumulate)
        self.pieces = list(self._pieces(named_matrices(*stages.values()), offsets))
        self._next = dict.fromkeys(self._lines, 0)
        if self.shard:
            for module in stages.values():
                self._watch(module)

    @staticmethod
    def _order(stages: Mapping[int, nn.Module]) -> tuple[list[nn.Parameter], dict[int, int]]:
        """Parameters as backward reaches them: last stage first, each from its end; deferred ones behind all, in an order
        that is the same on all ranks that sum them; then experts'. And the stage of each by id, in the plain order of
        backward."""
        found: dict[int, tuple[int, nn.Parameter]] = {}
        for index in sorted(stages, reverse=True):
            for param in reversed(list(stages[index].parameters())):
                found.setdefault(id(param), (index, param))
        order = sorted(found.values(), key=lambda item: (_replicas(item[1]), _tie(item[1])))
        return [param for _, param in order], {key: index for key, (index, _) in found.items()}

    def _fill(self, offsets: Mapping[int, int], compute: torch.dtype, accumulate: torch.dtype) -> None:
        """Make the flat tensors, and the parameters views of them."""
        total = self.buckets[-1].stop
        device, built = self.params[0].device, self.params[0].dtype
        self.weights = torch.zeros(total, dtype=compute, device=device)
        self.grads = torch.zeros(total, dtype=accumulate, device=device)
        self._masters: list[Tensor] = []  # by bucket, of its own range
        on_grad = weakref.WeakMethod(self._on_grad)  # python cannot see, and free, a cycle through a tensor's hooks

        def hook(param: Tensor) -> None:
            method = on_grad()
            assert method is not None, "parameters are used without the storage that holds them"
            method(param)

        for bucket in self.buckets:
            wide = torch.zeros(bucket.stop - bucket.start, dtype=built, device=device)
            for param in bucket.params:
                at = offsets[id(param)]
                wide[at - bucket.start :][: param.numel()] = param.detach().flatten()
                place = slice(at, at + param.numel())
                param.data = self.weights[place].view_as(param)
                param.main_grad = self.grads[place].view_as(param)  # type: ignore[attr-defined]
                if compute == accumulate:
                    param.grad = param.main_grad  # type: ignore[attr-defined]
                param.register_post_accumulate_grad_hook(hook)
            self.weights[bucket.start : bucket.stop] = wide
            first, last = bucket.own
            own = wide[first - bucket.start : last - bucket.start].clone()
            self._masters.append(self.weights[first:last] if compute == built else own)

    def _pieces(self, named: Iterator[Named], offsets: Sequence[int]) -> Iterator[Piece]:
        start_of = dict(zip(map(id, self.params), offsets, strict=True))
        for n in named:
            bucket = self._bucket_of[id(n.param)]
            master = self._masters[self.buckets.index(bucket)]
            view = n.view()
            assert view.is_contiguous(), "a logical matrix lies in whole rows of its storage"
            begin = start_of[id(n.param)] + int(view.storage_offset()) - int(n.param.storage_offset())
            first, last = max(begin, bucket.own[0]), min(begin + view.numel(), bucket.own[1])
            if first < last:
                yield Piece(
                    n,
                    first - begin,
                    last - begin,
                    self.weights[first:last],
                    master[first - bucket.own[0] : last - bucket.own[0]],
                    self.grads[first:last],
                )

    # Gradients

    def zero(self) -> None:
        """Begin a step."""
        self.grads.zero_()
        self._next = dict.fromkeys(self._lines, 0)

    def expect(self, stage: int) -> None:
        """The next backward of ``stage`` is its last of this step: sum its buckets as they fill."""
        for bucket in self.buckets:
            if bucket.stage == stage and not bucket.deferred:
                bucket.waiting, bucket.expected = {id(param) for param in bucket.params}, True

    def _on_grad(self, param: Tensor) -> None:
        if param.dtype != self.grads.dtype:
            assert param.grad is not None
            param.main_grad.add_(param.grad)  # type: ignore[attr-defined]
            param.grad = None
        bucket = self._bucket_of[id(param)]
        if bucket.expected:
            bucket.waiting.discard(id(param))
            # In order of storage, whatever fills first.
            name = bucket.axis.name
            line = self._lines[name]
            while self._next[name] < len(line) and self._full(line[self._next[name]]):
                self._reduce(line[self._next[name]])
                self._next[name] += 1

    @staticmethod
    def _full(bucket: Bucket) -> bool:
        return bucket.expected and not bucket.waiting

    def _reduce(self, bucket: Bucket) -> None:
        reduce_replicated_grads(bucket.params, self.mesh)
        grads = self.grads[bucket.start : bucket.stop]
        if self.shard and bucket.axis.size > 1:
            bucket.work = start_reduce_scatter(grads, self.grads[slice(*bucket.own)], bucket.axis)
        else:
            bucket.work = start_all_reduce(grads, bucket.axis)

    def finish(self) -> None:
        """Sum what backward has not, and wait for all sums."""
        for name, line in self._lines.items():
            for bucket in line[self._next[name] :]:
                self._reduce(bucket)
            self._next[name] = len(line)
        for bucket in self.buckets:
            bucket.expected = False
            if bucket.work is not None:
                size = (bucket.stop - bucket.start) * self.grads.itemsize
                wait_for(bucket.work, "gradient sum", bucket.axis.name, size)
            bucket.work = None

    def scale_grads(self, factor: float) -> None:
        """Multiply the gradients that this rank updates with."""
        for bucket in self.buckets:
            self.grads[slice(*bucket.own)].mul_(factor)

    def gather_grads(self) -> None:
        """After ``finish``: the sums of all elements on every rank, for those who look at whole gradients."""
        for bucket in self._shared():
            whole = self.grads[bucket.start : bucket.stop]
            work = start_all_gather(whole, bucket.axis)
            wait_for(work, "gradient gather", bucket.axis.name, whole.nbytes)

    def _shared(self) -> list[Bucket]:
        """The buckets of which this rank updates a part, in the order of the forward pass."""
        return [bucket for bucket in self._ahead if self.shard and bucket.axis.size > 1]

    # Weights

    def publish(self) -> None:
        """After the masters have changed: lower them and start gathering what other ranks have updated.

        Whoever changes masters otherwise than by the step that forward passes lie between calls ``wait_weights`` before:
        a gather under way writes this rank's range too.
        """
        self.wait_weights()
        with torch.no_grad():
            for bucket, master in zip(self.buckets, self._masters, strict=True):
                own = self.weights[slice(*bucket.own)]
                if own.data_ptr() != master.data_ptr():
                    own.copy_(master)
        for bucket in self._shared():
            whole = self.weights[bucket.start : bucket.stop]
            bucket.gathering = start_all_gather(whole, bucket.axis)

    def wait_weights(self) -> None:
        """Wait for all weights; forward waits by itself, whoever reads parameters otherwise calls this."""
        for bucket in reversed(self.buckets):
            self._wait(bucket)

    def _wait(self, bucket: Bucket) -> None:
        if bucket.gathering is not None:
            size = (bucket.stop - bucket.start) * self.weights.itemsize
            wait_for(bucket.gathering, "weight gather", bucket.axis.name, size)
            bucket.gathering = None

    def _wait_for(self, buckets: list[Bucket], module: nn.Module, inputs: Any) -> None:
        for bucket in buckets:
            self._wait(bucket)

    def _watch(self, stage: Any) -> None:
        for unit in stage.units():
            buckets = list({id(b): b for b in (self._bucket_of[id(p)] for p in unit.parameters())}.values())
            if buckets:
                unit.register_forward_pre_hook(partial(self._wait_for, buckets))


def _tie(param: nn.Parameter) -> str:
    """The axis of pipeline stages over which a parameter's gradient is summed, or "" for none."""
    axes = {matrix.grad_sum for matrix in layout_of(param).matrices} - {None, "tp", "kv"}
    return min(filter(None, axes), default="")


def _replicas(param: nn.Parameter) -> str:
    """The axis of the ranks that hold the same parameter for other tokens: "dp" or "edp"."""
    return layout_of(param).matrices[0].replicas


def _runs(keys: Sequence[Any]) -> list[slice]:
    """Maximal runs of equal neighbours."""
    cuts = [i for i in range(len(keys)) if i == 0 or keys[i] != keys[i - 1]]
    return [slice(a, b) for a, b in zip(cuts, [*cuts[1:], len(keys)], strict=True)]
