"""Backward of a column-parallel layer: collectives are under way while it multiplies, and the numbers are those without."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megnorm.layers import linear
from megnorm.parallel import collectives
from megnorm.parallel.collectives import Started, all_gather, all_reduce, reduce_scatter
from megnorm.parallel.mesh import Axis, build_mesh


def plain(x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor, axis: Axis, spread: bool) -> list[Tensor]:
    """One step after the other."""
    full = all_gather(x, axis) if spread else x
    whole, rows = grad @ weight, grad.flatten(0, -2)
    dx = reduce_scatter(whole, axis) if spread else all_reduce(whole.clone(), axis)
    return [F.linear(full, weight, bias), dx, rows.t() @ full.flatten(0, -2), rows.sum(0)]


def body(rank: int, world: int) -> list[tuple[bool, list[str]]]:
    axis = build_mesh(tp=world, pp=1, dp=1, kv_heads=world, device=torch.device("cpu")).tp
    g = torch.Generator().manual_seed(rank)
    same = torch.Generator().manual_seed(9)
    found = []
    for spread, keep in ((True, False), (True, True), (False, False)):
        x = torch.randn(3, 2, 5, generator=g if spread else same).requires_grad_()
        w, b = torch.randn(7, 5, generator=g).requires_grad_(), torch.randn(7, generator=g).requires_grad_()
        y = linear._GatherLinear.apply(x, w, b, axis, keep) if spread else linear._CopyLinear.apply(x, w, b, axis)
        grad = torch.randn(y.shape, generator=g)
        steps = observed(y, grad)
        wanted = plain(x.detach(), w.detach(), b.detach(), grad, axis, spread)
        equal = all(torch.equal(a, e) for a, e in zip((y, x.grad, w.grad, b.grad), wanted, strict=True))
        found.append((equal, steps))
    return found


def observed(y: Tensor, grad: Tensor) -> list[str]:
    """What happens in backward, in order: starts, products, ends."""
    steps: list[str] = []
    wait = Started.wait

    def noting(name: str) -> Any:
        begin = getattr(collectives, name)

        def begun(x: Tensor, axis: Axis) -> Started:
            steps.append(name)
            started: Started = begin(x, axis)
            return started

        return begun

    def waited(self: Started) -> Tensor:
        steps.append(f"wait {self.what}")
        return wait(self)

    names = [name for name in vars(linear) if name.startswith("begin_")]
    before = {name: getattr(linear, name) for name in names}
    try:
        for name in names:
            setattr(linear, name, noting(name))
        Started.wait = waited  # type: ignore[method-assign]
        with Products(steps):
            y.backward(grad)
    finally:
        Started.wait = wait  # type: ignore[method-assign]
        for name, value in before.items():
            setattr(linear, name, value)
    return steps


class Products(TorchDispatchMode):
    def __init__(self, steps: list[str]) -> None:
        super().__init__()
        self.steps = steps

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in ("aten::mm", "aten::bmm"):
            self.steps.append("product")
        return func(*args, **(kwargs or {}))


def test_collectives_travel_while_it_multiplies(ranks: Any) -> None:
    again, kept, summed = ranks(2).run(body)[0]
    scatter = ["begin_reduce_scatter", "product", "wait reduce_scatter"]
    assert again == (True, ["begin_all_gather", "product", "wait all_gather", *scatter])
    assert kept == (True, ["product", *scatter])
    assert summed == (True, ["product", "begin_all_reduce", "product", "wait all_reduce"])
