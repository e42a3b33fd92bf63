"""One norm layer for every site and kind."""

import torch
from torch import Tensor, nn

from megnorm.layers.env import Env
from megnorm.layers.linear import Share
from megnorm.norms.scheme import Norm
from megnorm.norms.sites import KV_SITES, STREAM_SITES, Placement, placement
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
        assert norm.kind is not None and norm.eps is not None and norm.gain is not None and norm.alpha is not None
        place = placement(site, norm.over)
        self.norm, self.axis = norm, env.mesh.tp if place.statistics == "tp" else Axis("none")
        share = Share(0, units, 1) if site in STREAM_SITES else Share.of(units, env.mesh)
        self.share = 1.0 / share.replicas if self.axis.size > 1 else 1.0
        self.heads = (share.count, width) if norm.over == "head" else None
        self.n = width if norm.over == "head" else units * width
        self.width = width
        self._add_parameters(norm, site, units, share, place, env)
        self.kernel = env.kernel("norm", kind=norm.kind, sharded=self.axis.size > 1)

    def _add_parameters(self, norm: Norm, site: str, units: int, share: Share, place: Placement, env: Env) -> None:
        init = float(norm.weight_init) - 1.0 if norm.gain == "one_plus" else float(norm.weight_init)  # type: ignore[arg-type]
        vectors: dict[str, float] = {}
        if norm.gain == "scalar":
            self.weight = self._vector("weight", (1,), init, place, site, env)
        elif norm.gain == "per_head":
            held = Matrix(
                "",
                "norm",
                (units, self.width),
                (share.first, 0),
                (share.count, self.width),
                grad_sum="kv" if share.replicas > 1 else None,
                owner=env.mesh.tp.rank % share.replicas == 0,
            )
            self.weight = parameter(env.full(held.local, init), Layout((held,)))
        elif norm.gain != "none":
            vectors["weight"] = init
        if norm.bias:
            vectors["bias"] = 0.0
        if norm.kind in ("dyt", "derf"):
            self.alpha = self._vector("alpha", (1,), float(norm.alpha), place, site, env)  # type: ignore[arg-type]
        if norm.kind == "derf":
            self.shift = self._vector("shift", (1,), 0.0, place, site, env)
        if norm.kind == "seednorm":
            vectors |= {"alpha": float(norm.alpha), "beta": 0.0}  # type: ignore[arg-type]
        for name, value in vectors.items():
            if place.weight == "split":
                local, first = share.count * self.width, share.first * self.width
                held = Matrix(
                    "",
                    "norm",
                    (self.n,),
                    (first,),
                    (local,),
                    grad_sum="kv" if share.replicas > 1 else None,
                    owner=env.mesh.tp.rank % share.replicas == 0,
                )
                setattr(self, name, parameter(env.full((local,), value), Layout((held,))))
            else:
                setattr(self, name, self._vector(name, (self.n,), value, place, site, env))

    def _vector(
        self, name: str, shape: tuple[int, ...], value: float, place: Placement, site: str, env: Env
    ) -> nn.Parameter:
        """A parameter that every rank holds whole; its gradient is partial where each rank sees part of what it scales."""
        partial = site not in STREAM_SITES or env.mesh.sequence_parallel
        layout = Layout.whole(shape, "norm", grad_sum="tp" if partial else None, owner=env.mesh.tp.rank == 0)
        return parameter(env.full(shape, value), layout)

    def _reduce(self, x: Tensor) -> Tensor:
        if self.axis.size == 1:
            return x
        return _SumBoth.apply(x, self.axis)

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        if self.heads is not None:
            x = x.unflatten(-1, self.heads)
        params = dict(self._parameters)
        if self.norm.gain == "one_plus":
            params["weight"] = params["weight"].to(torch.promote_types(torch.float32, x.dtype)) + 1.0
        elif self.norm.gain == "scalar" and self.norm.kind in ("layernorm", "rmsnorm", "seednorm"):
            params["weight"] = params["weight"].expand(x.shape[-1])
        y = self.kernel(
            x,
            params,
            eps=self.norm.eps,
            cast_first=self.norm.cast == "before_gain",
            n=self.n,
            share=self.share,
            reduce=self._reduce,
        )
        y = y if self.norm.scale == 1.0 else y * self.norm.scale
        return y.view(shape) if self.heads is not None else y


def norm_or_identity(norm: Norm | None, site: str, units: int, width: int, env: Env) -> nn.Module:
    """The norm layer of a slot, or the identity where the scheme leaves it empty."""
    return nn.Identity() if norm is None else NormLayer(norm, site, units, width, env)


__all__ = ["KV_SITES", "NormLayer", "norm_or_identity"]
