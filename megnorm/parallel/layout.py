"""What lies in a parameter: the logical matrices of a physical tensor, and where each is held.

One GEMM reads one contiguous tensor (q, k and v together; gate and up together). Initialization, optimizers, probes,
checkpoints and conversion must never see that: they read the tensor through ``views`` as named logical matrices. Nobody
outside this file knows how matrices are packed.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from megnorm.parallel.collectives import all_reduce
from megnorm.parallel.mesh import Mesh


@dataclass(frozen=True)
class Matrix:
    """One logical tensor (matrix or vector) and the slice of it that this rank holds.

    name: "" if the parameter is this matrix alone (its logical name is then the module path), else the name under the
    owning module's parent: the "q" of ``blocks.0.attention.qkv.weight`` is ``blocks.0.attention.q.weight``.
    role: embed | position | q | k | v | o | up | gate | down | router | mix | head, or "norm", "bias", "scale".
    shape: global. offset, local: where this rank's slice begins in it, and the slice's shape.
    dim, start: the slice lies in the storage at ``storage.narrow(dim, start, local[dim])``.
    grad_sum: the mesh axis over which gradients of this slice are partial sums ("tp", "kv", "ends" or a tie) or None.
    owner: exactly one of the ranks of a model's copy that hold a slice owns it: it counts it in norms and writes it to
    checkpoints. (Replicas of the model, over dp, each have an owner.)
    copy: the same slice lies on another pipeline stage too, which owns it.
    replicas: the mesh axis whose ranks hold the same slice for other tokens: "dp", or "edp" for what belongs to an expert.
    """

    name: str
    role: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    local: tuple[int, ...]
    dim: int = 0
    start: int = 0
    grad_sum: str | None = None
    owner: bool = True
    copy: bool = False
    replicas: str = "dp"

    def view(self, storage: Tensor) -> Tensor:
        """The slice inside ``storage``; no copy."""
        if self.start == 0 and tuple(storage.shape) == self.local:
            return storage
        return storage.narrow(self.dim, self.start, self.local[self.dim])


@dataclass(frozen=True)
class Layout:
    """The matrices of one parameter, in storage order."""

    matrices: tuple[Matrix, ...]

    @staticmethod
    def whole(shape: tuple[int, ...], role: str, *, grad_sum: str | None = None, owner: bool = True) -> "Layout":
        """A parameter that every rank of the tensor-parallel group holds whole."""
        return Layout((Matrix("", role, shape, (0,) * len(shape), shape, grad_sum=grad_sum, owner=owner),))


def parameter(storage: Tensor, layout: Layout) -> nn.Parameter:
    """A parameter that carries its layout; ``layout_of`` reads it."""
    param = nn.Parameter(storage)
    param.megnorm_layout = layout  # type: ignore[attr-defined]
    return param


def layout_of(param: Tensor) -> Layout:
    layout = getattr(param, "megnorm_layout", None)
    assert isinstance(layout, Layout), "every parameter of a megnorm model is made by parallel.layout.parameter"
    return layout


def belong_to_experts(module: nn.Module) -> None:
    """Parameters of ``module`` are those of experts that this rank holds: their replicas are fewer."""
    for param in module.parameters():
        matrices = tuple(replace(matrix, replicas="edp") for matrix in layout_of(param).matrices)
        param.megnorm_layout = Layout(matrices)  # type: ignore[attr-defined]


def views(param: Tensor, storage: Tensor | None = None) -> list[tuple[Matrix, Tensor]]:
    """(matrix, view) for each logical matrix of ``param``, inside ``storage`` of the same shape (default: param)."""
    tensor = param.detach() if storage is None else storage
    return [(matrix, matrix.view(tensor)) for matrix in layout_of(param).matrices]


@dataclass(frozen=True)
class Named:
    """A logical matrix of a model under its global name, e.g. ``blocks.17.ffn.up.weight``."""

    name: str
    matrix: Matrix
    param: nn.Parameter

    def view(self, storage: Tensor | None = None) -> Tensor:
        return self.matrix.view(self.param.detach() if storage is None else storage)


@dataclass(frozen=True)
class Piece:
    """The elements of a logical matrix that this rank updates: [first, last) of its slice, counted row by row.

    weight: in the dtype of computation. master: the weight that is updated; the same tensor where that dtype is wide
    enough. grad: in the dtype of accumulation. All are vectors of last - first elements, views of flat storage.
    """

    named: Named
    first: int
    last: int
    weight: Tensor
    master: Tensor
    grad: Tensor

    def boxes(self, tensor: Tensor) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """(offset in the logical tensor, view of its shape) for the boxes that make up this range of ``tensor``."""
        matrix = self.named.matrix
        for corner, shape, start in boxes_of(self.first, self.last, matrix.local):
            view = tensor[start - self.first :][: math.prod(shape)].view(shape)
            yield tuple(a + b for a, b in zip(matrix.offset, corner, strict=True)), view


def boxes_of(first: int, last: int, shape: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], int]]:
    """Elements [first, last) of a row-major array as boxes: (corner, shape, first element of the box).

    A part of a row, whole rows, a part of a row: contiguous each, in order.
    """
    if len(shape) == 1:
        yield (first,), (last - first,), first
        return
    row = math.prod(shape[1:])
    top, bottom = -(-first // row), last // row
    if top > bottom:  # inside one row
        for corner, inner, start in boxes_of(first - bottom * row, last - bottom * row, shape[1:]):
            yield (bottom, *corner), (1, *inner), bottom * row + start
        return
    if first < top * row:
        for corner, inner, start in boxes_of(first - (top - 1) * row, row, shape[1:]):
            yield (top - 1, *corner), (1, *inner), (top - 1) * row + start
    if top < bottom:
        yield (top, *(0 for _ in shape[1:])), (bottom - top, *shape[1:]), top * row
    if bottom * row < last:
        for corner, inner, start in boxes_of(0, last - bottom * row, shape[1:]):
            yield (bottom, *corner), (1, *inner), bottom * row + start


def named_matrices(*models: nn.Module) -> Iterator[Named]:
    """Every logical matrix of the models (the stages that a rank holds), once, in module order."""
    seen: set[int] = set()
    for path, module in (item for model in models for item in model.named_modules()):
        for attribute, param in module.named_parameters(recurse=False):
            if id(param) in seen:
                continue
            seen.add(id(param))
            for matrix in layout_of(param).matrices:
                parent = path.rpartition(".")[0]
                parts = (parent, matrix.name, attribute) if matrix.name else (path, attribute)
                yield Named(".".join(part for part in parts if part), matrix, param)


def share_copies(stages: Iterable[nn.Module]) -> None:
    """Let the stages of a rank, in their order, hold what several of them have (a tied embedding) as one parameter."""
    first: dict[str, nn.Parameter] = {}
    for stage in stages:
        held = {id(n.param): first.setdefault(n.name, n.param) for n in named_matrices(stage)}
        for module in stage.modules():
            for attribute, param in module._parameters.items():
                if param is not None:
                    module._parameters[attribute] = held[id(param)]


def reduce_replicated_grads(params: Iterable[nn.Parameter], mesh: Mesh) -> None:
    """Sum partial gradients (``param.main_grad``) over the axes their matrices ask for, one message per axis.

    A fused parameter may hold matrices that differ: with replicated key/value heads k and v are summed, q is not.
    """
    for name in ("tp", "kv", "ends", *sorted(mesh.ties)):
        axis = mesh.axis(name)
        if axis.size == 1:
            continue
        partial = [
            matrix.view(param.main_grad)  # type: ignore[attr-defined]
            for param in params
            for matrix in layout_of(param).matrices
            if matrix.grad_sum == name
        ]
        if not partial:
            continue
        flat = torch.cat([grad.reshape(-1) for grad in partial])
        all_reduce(flat, axis)
        for grad, total in zip(partial, flat.split([grad.numel() for grad in partial]), strict=True):
            grad.copy_(total.view_as(grad))


def full_tensor(named: Named, storage: Tensor, mesh: Mesh) -> Tensor:
    """The whole logical tensor on every rank of a tp group, gathered from the slices in ``storage``."""
    matrix = named.matrix
    full = storage.new_zeros(matrix.shape)
    if matrix.owner or matrix.copy:
        box = tuple(slice(o, o + n) for o, n in zip(matrix.offset, matrix.local, strict=True))
        full[box] = matrix.view(storage)
    return all_reduce(full, mesh.tp)
