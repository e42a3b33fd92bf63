"""Where a layer asks for one operation in place of several. None: the layer's own composition, the reference, serves.

What is joined passes by the modules that it stands for; a module that somebody watches (a probe's hook) is therefore left
to run by itself.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn

from megnorm.kernels.registry import NormForm
from megnorm.layers.env import Env
from megnorm.layers.linear import ColumnParallelLinear
from megnorm.layers.norm import NormLayer
from megnorm.layers.recompute import Recompute
from megnorm.layers.residual import Add

Kernel = Callable[..., Any]


class Sub(Protocol):
    """What is read of a sub-layer."""

    input_norm: nn.Module
    output_norm: nn.Module
    post_norm: nn.Module
    residual: Add
    dropout: Any
    recompute: Recompute
    entry: "Entry | None"


def watched(*modules: nn.Module) -> bool:
    return any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def _local(module: nn.Module) -> NormForm | None:
    """The form of a norm over all features of a row that this rank holds."""
    if not isinstance(module, NormLayer) or module.heads is not None or module.axis.size > 1:
        return None
    return module.form


def _absent(module: nn.Module) -> bool:
    return isinstance(module, nn.Identity)


def _factors(residual: Add) -> tuple[float, float] | None:
    """skip and branch, where the residual is those two numbers alone."""
    if (
        residual.gate is not None
        or residual.layer_input
        or not isinstance(residual.skip, float)
        or not isinstance(residual.branch, float)
    ):
        return None
    return residual.skip, residual.branch


def _source(sub: Sub, stream: Tensor, u: Tensor) -> Tensor:
    return u if sub.residual.source == "input" else stream


@dataclass(frozen=True)
class Join:
    """A branch's way back into the stream, (sub-layer, stream, u, branch) -> stream: add and post norm, or norm and add."""

    kernel: Kernel
    post: bool
    factors: tuple[float, float]

    def watched(self, sub: Sub) -> bool:
        return watched(sub.post_norm if self.post else sub.output_norm)

    def __call__(self, sub: Sub, stream: Tensor, u: Tensor, y: Tensor) -> Tensor:
        f = sub.dropout(sub.output_norm(y)) if self.post else y
        return sub.recompute("norms", partial(self._run, sub), _source(sub, stream, u), f)

    def _run(self, sub: Sub, r: Tensor, f: Tensor) -> Tensor:
        norm = sub.post_norm if self.post else sub.output_norm
        assert isinstance(norm, NormLayer)
        tail = (False,) if self.post else ()
        out: Tensor = self.kernel(r, f, *norm.given(f), *self.factors, *tail)
        return out


def join(sub: Sub, dropout: float, env: Env) -> Join | None:
    factors, post, output = _factors(sub.residual), _local(sub.post_norm), _local(sub.output_norm)
    if factors is None:
        return None
    if post is not None:
        kernel = env.fused("add_norm", norms=(post,))
    elif output is not None and _absent(sub.post_norm) and dropout == 0.0:
        kernel = env.fused("norm_add", norms=(output,))
    else:
        return None
    return None if kernel is None else Join(kernel, post is not None, factors)


@dataclass(frozen=True)
class Boundary:
    """From one sub-layer's branch to the next one's input norm: (stream, u, branch) -> the stream, and its norm."""

    kernel: Kernel
    output: bool
    factors: tuple[float, float]

    def watched(self, first: nn.Module, first_norm: nn.Module, second_norm: nn.Module) -> bool:
        return watched(first, first_norm, second_norm)

    def __call__(self, first: Sub, second: Sub, stream: Tensor, u: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        r, after = _source(first, stream, u), second.input_norm
        assert isinstance(after, NormLayer)
        if not self.output:
            f = first.dropout(y)
            normed, total = self.kernel(r, f, *after.given(f), *self.factors, True)
            return total, normed
        before = first.output_norm
        assert isinstance(before, NormLayer)
        total, normed = self.kernel(r, y, before.given(y), after.given(y), *self.factors)
        return total, normed


def boundary(first: Sub, second: Sub, dropout: float, env: Env) -> Boundary | None:
    """add + norm, or norm + add + norm, inside a block. Two outputs are no unit that could be recomputed for one of them.

    A norm that is joined with the product behind it is not joined with the sum before it.
    """
    if second.entry is not None:
        return None
    factors, after, before = _factors(first.residual), _local(second.input_norm), _local(first.output_norm)
    if factors is None or after is None or not _absent(first.post_norm) or "norms" in env.recompute.modes:
        return None
    if _absent(first.output_norm):
        kernel = env.fused("add_norm", norms=(after,))
    elif before is not None and dropout == 0.0:
        kernel = env.fused("norm_add_norm", norms=(before, after))
    else:
        return None
    return None if kernel is None else Boundary(kernel, before is not None, factors)


@dataclass(frozen=True)
class Entry:
    """The input norm and the product behind it: x -> all its outputs side by side [s, b, local rows], and N(x) where kept."""

    kernel: Kernel
    norm: NormLayer
    product: ColumnParallelLinear
    keep: bool

    def watched(self) -> bool:
        return watched(self.norm, self.product)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out = self.kernel(x, *self.norm.given(x), self.product.weight, self.product.bias, self.product.mesh.tp)
        h, u = out if self.keep else (out, x)  # where it is not kept, nobody reads it
        return h, u


def entry(sub: Sub, product: ColumnParallelLinear, env: Env) -> Entry | None:
    """None too where the norm's output is recomputed, and where the gathered one is kept: the operation saves its own."""
    norm, mesh = sub.input_norm, env.mesh
    form = _local(norm)
    if form is None or not isinstance(norm, NormLayer) or norm.args.scale != 1.0:
        return None
    if "norms" in env.recompute.modes or mesh.keep_gathered:
        return None
    keep = sub.residual.source == "input"
    kernel = env.fused(
        "norm_linear",
        norms=(form,),
        features=(form.width, sum(product.sizes)),
        biased=product.bias is not None,
        tokens=env.tokens,
        quantize=env.quantize,
        ranks=mesh.tp.size,
        split_tokens=mesh.sequence_parallel,
        keep=keep,
    )
    return None if kernel is None else Entry(kernel, norm, product, keep)


def heads(norms: tuple[nn.Module, ...], env: Env, **sizes: int) -> Kernel | None:
    """Norms by head of q, k, v and the rotation in one; None too where none of them has a norm."""
    forms = []
    for norm in norms:
        if isinstance(norm, NormLayer) and norm.heads is None:
            return None
        forms.append(norm.form if isinstance(norm, NormLayer) else None)
    return env.fused("qkv_norm_rope", norms=tuple(forms), **sizes) if any(forms) else None


def inner(norm: nn.Module, env: Env, **activation: Any) -> Kernel | None:
    """The activation and the norm behind it in one."""
    if not isinstance(norm, NormLayer) or norm.heads is not None:
        return None
    return env.fused("act_stats", norms=(norm.form,), sharded=norm.axis.size > 1, **activation)
