"""One norm layer for every site and kind."""

import torch
from torch import Tensor, nn

from megnorm.kernels.registry import NormForm
from megnorm.kernels.torch_ref import NormArgs
from megnorm.layers.env import Env
from megnorm.layers.linear import Share
from megnorm.norms.scheme import Norm
from megnorm.norms.sites import STREAM_SITES, placement
from megnorm.parallel.collectives import all_reduce
from megnorm.parallel.layout import Layout, Matrix, parameter
from megnorm.parallel.mesh import Axis


class _SumBoth(torch.autograd.Function):
    """Sum over an axis whose result every rank uses in its own way: the gradient is summed too."""

    @staticmethod
    def forward(ctx, x: Tensor, axis: Axis) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.axis = axis
        return all_reduce(x.contiguous().clone(), axis)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        return all_reduce(grad.contiguous().clone(), ctx.axis), None


class NormLayer(nn.Module):
    """A resolved Norm at a site (norms/sites.py): [..., units * width / ranks] -> same.

    units, width: the site's features as groups (heads of hd; d or f features of 1). A norm over "head" normalizes each
    group with one gain of ``width`` for all; one over "width" normalizes all units * width features.
    """

    def __init__(self, norm: Norm, site: str, units: int, width: int, env: Env) -> None:
        super().__init__()
        self.norm, self.place = norm, placement(site, norm.over)
        self.units, self.width = units, width
        self.held = Share(0, units, 1) if site in STREAM_SITES else Share.of(units, env.mesh)
        self.axis = env.mesh.tp if self.place.statistics == "tp" else Axis("none")
        self.heads = (self.held.count, width) if norm.over == "head" else None
        self.n = width if norm.over == "head" else units * width
        for name, form, value in parameters_of(norm):
            setattr(self, name, parameter(*self._storage(form, value, env)))
        self.recompute = env.recompute
        self.form = _form(norm, width if norm.over == "head" else self.held.count * width, env.working)
        sharded = self.axis.size > 1
        self.kernel = env.kernel("sharded_norm" if sharded else "norm", norms=(self.form,), sharded=sharded)
        share = 1.0 / self.held.replicas if self.axis.size > 1 else 1.0
        factor = float(norm.scale)  # type: ignore[arg-type]
        self.args = NormArgs(float(norm.eps or 0.0), self.n, norm.cast == "before_gain", share, self._reduce, factor)

    def _storage(self, form: str, value: float, env: Env) -> tuple[Tensor, Layout]:
        """A parameter's initial storage on this rank, and its layout. form: see ``parameters_of``."""
        tp = env.mesh.tp
        shape = {"vector": (self.n,), "scalar": (1,), "heads": (self.units, self.width)}[form]
        if form == "heads" or (form == "vector" and self.place.weight == "split"):
            per_unit = 1 if form == "heads" else self.width
            tail = shape[1:]
            matrix = Matrix(
                "",
                "norm",
                shape,
                (self.held.first * per_unit, *(0 for _ in tail)),
                (self.held.count * per_unit, *tail),
                grad_sum="kv" if self.held.replicas > 1 else None,
                owner=tp.rank % self.held.replicas == 0,
            )
            return env.full(matrix.local, value), Layout((matrix,))
        # Whole on every rank, which sees part of what it scales; a scalar of a split norm likewise.
        partial = self.place.grad_sum if self.place.weight == "whole" else "tp"
        grad_sum = "tp" if partial == "tp" or (partial == "sp" and env.mesh.sequence_parallel) else None
        return env.full(shape, value), Layout.whole(shape, "norm", grad_sum=grad_sum, owner=tp.rank == 0)

    def _reduce(self, x: Tensor) -> Tensor:
        if self.axis.size == 1:
            return x
        return _SumBoth.apply(x, self.axis)

    def forward(self, x: Tensor) -> Tensor:
        return self.recompute("norms", self._normalize, x)

    def _normalize(self, x: Tensor) -> Tensor:
        shape = x.shape
        if self.heads is not None:
            x = x.unflatten(-1, self.heads)
        y = self.kernel(x, self._params(x), self.args)
        y = y if self.norm.scale == 1.0 else y * self.norm.scale
        return y.view(shape) if self.heads is not None else y

    def given(self, x: Tensor) -> tuple[dict[str, Tensor], NormArgs]:
        """What an operation that holds this norm is told, for x [..., features]."""
        return self._params(x), self.args

    def _params(self, x: Tensor) -> dict[str, Tensor]:
        """The parameters as the kernel takes them: the gain as it is applied, one value per feature."""
        params: dict[str, Tensor] = {name: param for name, param in self._parameters.items() if param is not None}
        if self.norm.gain == "one_plus":
            params["weight"] = params["weight"].to(torch.promote_types(torch.float32, x.dtype)) + 1.0
        elif self.norm.gain == "scalar" and self.norm.kind in ("layernorm", "rmsnorm", "seednorm"):
            params["weight"] = params["weight"].expand(x.shape[-1])
        return params


def parameters_of(norm: Norm) -> list[tuple[str, str, float]]:
    """(name, form, initial value) of each parameter of a resolved Norm.

    form: "vector" over the normalized features, "scalar" [1], or "heads" [heads, hd].
    """
    gain, alpha = float(norm.weight_init), float(norm.alpha or 0.0)  # type: ignore[arg-type]
    found = []
    if norm.gain != "none":
        form = {"scalar": "scalar", "per_head": "heads"}.get(norm.gain or "", "vector")
        found.append(("weight", form, gain - 1.0 if norm.gain == "one_plus" else gain))
    if norm.bias:
        found.append(("bias", "vector", 0.0))
    if norm.kind in ("dyt", "derf"):
        found.append(("alpha", "scalar", alpha))
    if norm.kind == "derf":
        found.append(("shift", "scalar", 0.0))
    if norm.kind == "seednorm":
        found += [("alpha", "vector", alpha), ("beta", "vector", 0.0)]
    return found


def _form(norm: Norm, width: int, dtype: torch.dtype) -> NormForm:
    """What a kernel must know of a norm. A scalar gain is expanded; 1 + w of low precision is kept in fp32."""
    lowered = dtype in (torch.bfloat16, torch.float16)
    gains = {"one_plus": "wide" if lowered else "vector", "per_head": "per_head", "none": "none"}
    cast_first = norm.cast == "before_gain"
    return NormForm(norm.kind or "", width, gains.get(norm.gain or "", "vector"), bool(norm.bias), cast_first)


def norm_or_identity(norm: Norm | None, site: str, units: int, width: int, env: Env) -> nn.Module:
    """The norm layer of a slot, or the identity where the scheme leaves it empty."""
    return nn.Identity() if norm is None else NormLayer(norm, site, units, width, env)
