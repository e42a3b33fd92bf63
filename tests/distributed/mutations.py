"""Deliberately broken builds for test_mutations.py: each takes away or adds one thing that exactness needs.

A mutation is a context manager that patches the code inside a rank and puts it back. Only the parallel run is patched, so
what a mutation breaks is compared with an unbroken serial run.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from megnorm.config import RunConfig
from megnorm.layers import dispatch, embedding, linear, loss, moe, norm, router
from megnorm.norms.sites import STREAM_SITES, Placement, placement
from megnorm.optim import clip
from megnorm.parallel import collectives, data_parallel, pipeline
from megnorm.parallel.layout import Layout, layout_of, named_matrices
from megnorm.parallel.mesh import Axis, Mesh
from megnorm.plan import make_plan
from megnorm.train.build import mesh_of
from tools import parity

Mutation = Callable[[], AbstractContextManager[Any]]


def compare_broken(rank: int, world: int, config: RunConfig, name: str | None, steps: int) -> parity.Difference | None:
    """The body of a rank: a parallel run under a mutation (None: unbroken) against an unbroken serial one."""
    plan = make_plan(config, world)
    mesh = mesh_of(plan, torch.device("cpu"))
    if name is None:
        parallel = parity.trace(plan, mesh, steps)
    else:
        with MUTATIONS[name]():
            parallel = parity.trace(plan, mesh, steps)
    if rank != 0:
        return None
    return parity.compare(parity.trace(make_plan(parity.serial_of(config), 1), Mesh(), steps), parallel)


def gradient_sum(pattern: str, axis: str | None) -> Mutation:
    """Gradients of the logical tensors that match are summed over ``axis`` (None: over none), whatever is right."""

    @contextmanager
    def mutation() -> Iterator[None]:
        build, hits = parity.build_stages, []

        def broken(*args: Any) -> Any:
            stages, rng = build(*args)
            chosen = {id(n.matrix) for n in named_matrices(*stages.values()) if re.fullmatch(pattern, n.name)}
            for param in (param for stage in stages.values() for param in stage.parameters()):
                held = layout_of(param).matrices
                hits.extend(m for m in held if id(m) in chosen and m.grad_sum != axis)
                param.megnorm_layout = Layout(  # type: ignore[attr-defined]
                    tuple(replace(m, grad_sum=axis) if id(m) in chosen else m for m in held)
                )
            return stages, rng

        with mock.patch.object(parity, "build_stages", broken):
            yield
        assert hits, f"nothing to break: no gradient matching {pattern} is summed otherwise than over {axis}"

    return mutation


def reduced_twice(role: str) -> Mutation:
    """The gradient sum of the matrices of a role runs a second time."""

    @contextmanager
    def mutation() -> Iterator[None]:
        reduce, found = data_parallel.reduce_replicated_grads, []

        def broken(params: Any, mesh: Mesh) -> None:
            reduce(params, mesh)
            for param in params:
                for matrix in layout_of(param).matrices:
                    if matrix.grad_sum and matrix.role == role:
                        found.append(matrix)
                        collectives.all_reduce(matrix.view(param.main_grad), mesh.axis(matrix.grad_sum))

        with mock.patch.object(data_parallel, "reduce_replicated_grads", broken):
            yield
        assert found, f"nothing to break: no gradient of a {role} is summed"

    return mutation


def table_row(over: str | None, *sites: str, **changed: Any) -> Mutation:
    """The rows of the site table for norms over ``over`` (None: either) at ``sites`` are others."""

    def broken(site: str, at: str) -> Placement:
        right = placement(site, at)
        return replace(right, **changed) if site in sites and over in (None, at) else right

    return lambda: mock.patch.object(norm, "placement", broken)


def local_statistics(site: str) -> Mutation:
    """The norm at ``site`` normalizes what this rank holds: another function, which changes with the number of ranks."""

    @contextmanager
    def mutation() -> Iterator[None]:
        init, hits = norm.NormLayer.__init__, []

        def broken(self: Any, spec: Any, at: str, units: int, width: int, env: Any) -> None:
            init(self, spec, at, units, width, env)
            if at == site and self.axis.size > 1:
                hits.append(at)
                self.axis, self.args = Axis("none"), replace(self.args, n=self.held.count * width, share=1.0)

        with mock.patch.object(norm.NormLayer, "__init__", broken):
            yield
        assert hits, f"nothing to break: no norm at {site} has statistics over tp"

    return mutation


def _reduce_forward_only(self: Any, x: Tensor) -> Tensor:
    backward = torch._C._current_graph_task_id() != -1
    return x if self.axis.size == 1 or backward else norm._SumBoth.apply(x, self.axis)


@contextmanager
def _heads_counted_by_each_replica() -> Iterator[None]:
    init = norm.NormLayer.__init__

    def broken(self: Any, *args: Any) -> None:
        init(self, *args)
        self.args = replace(self.args, share=1.0)

    with mock.patch.object(norm.NormLayer, "__init__", broken):
        yield


def _bias_on_every_rank(self: linear.RowParallelLinear, x: Tensor) -> Tensor:
    y = F.linear(x, self.weight, self.bias)
    if self.mesh.sequence_parallel:
        return linear.scatter_sequence(y, self.mesh.tp)
    return linear.sum_from(y, self.mesh.tp)


def _unmasked_padding(logits: Tensor, logical: int) -> Tensor:
    return logits.to(loss.wide(logits), copy=True)


def _first_labels_only(self: embedding.TokenEmbedding, tokens: Tensor) -> Tensor:
    """Rows of other ranks are not zeroed: each rank adds its first or last row for them."""
    x = F.embedding((tokens - self.first).clamp(0, self.rows - 1), self.weight)
    return embedding.sum_from(x, self.mesh.tp)


def _sliced_gradient(x: Tensor, axis: Axis) -> Tensor:
    return collectives.gather_sequence(x, axis, partial=False)


def _norm_of_all_holders(pieces: Any, mesh: Mesh, **options: Any) -> Tensor:
    """The clip norm with every rank counting what it holds, owner or not."""
    held = [replace(p.named, matrix=replace(p.named.matrix, owner=True)) for p in pieces]
    return clip.global_norm([replace(p, named=n) for p, n in zip(pieces, held, strict=True)], mesh, **options)


def _norm_of_own_range(pieces: Any, mesh: Mesh, **options: Any) -> Tensor:
    """The clip norm of the range that this rank updates."""
    return clip.global_norm(pieces, mesh, sharded=False)


@contextmanager
def _mean_of_means() -> Iterator[None]:
    """Every micro-batch weighs the same, however many of its tokens have a loss."""
    run = parity.Pipeline.run

    def broken(self: Any, schedule: Any, parts: Any, **options: Any) -> Tensor:
        even = [replace(p, loss_mask=p.loss_mask / p.loss_mask.sum() / parity.PARTS) for p in parts]
        return run(self, schedule, even, **{**options, "weight": 1.0})

    with mock.patch.object(parity.Pipeline, "run", broken):
        yield


@contextmanager
def _last_stage_alone_sums_nothing() -> Iterator[None]:
    """Both copies of a tied embedding keep their own gradients."""
    axis = Mesh.axis
    with mock.patch.object(Mesh, "axis", lambda self, name: Axis(name) if name == "ends" else axis(self, name)):
        yield


@contextmanager
def _every_backward_is_reduced() -> Iterator[None]:
    """Buckets are summed over dp during the first backward, not the last; at once, so that no luck puts it right."""
    run, start = parity.Pipeline.run, data_parallel.start_all_reduce

    def at_once(*args: Any) -> Any:
        work = start(*args)
        if work is not None:
            work.wait()
        return work

    def broken(self: Any, schedule: Any, parts: Any, *, before: Any, **options: Any) -> Tensor:
        return run(self, schedule, parts, before=lambda action, final: before(action, action.kind == "B"), **options)

    sums = mock.patch.object(data_parallel, "start_all_reduce", at_once)
    with mock.patch.object(parity.Pipeline, "run", broken), sums:
        yield


@contextmanager
def _own_range_not_published() -> Iterator[None]:
    """Other ranks' updates never arrive."""
    publish = data_parallel.DataParallel.publish

    def broken(self: Any) -> None:
        self.shard, kept = False, self.shard
        publish(self)
        self.shard = kept

    with mock.patch.object(data_parallel.DataParallel, "publish", broken):
        yield


@contextmanager
def _messages_of_another_micro_batch() -> Iterator[None]:
    """A stage takes what the micro-batch before left, from the second on."""
    receive = pipeline._Messages.receive
    kept: dict[Any, Tensor] = {}

    def broken(self: Any, action: Any) -> Tensor | None:
        message = receive(self, action)
        if message is not None and action.kind == "F":
            stale = kept.get(action.stage, message)
            kept[action.stage] = message.clone()
            return stale.clone()
        return message

    with mock.patch.object(pipeline._Messages, "receive", broken):
        yield


def _patched(target: Any, name: str, value: Any) -> Mutation:
    return lambda: mock.patch.object(target, name, value)


@contextmanager
def _experts_like_all_else() -> Iterator[None]:
    """Gradients of experts are summed over dp, where ranks hold different ones."""
    build = parity.build_stages

    def broken(*args: Any) -> Any:
        stages, rng = build(*args)
        for param in (param for stage in stages.values() for param in stage.parameters()):
            whole = tuple(replace(m, replicas="dp") for m in layout_of(param).matrices)
            param.megnorm_layout = Layout(whole)  # type: ignore[attr-defined]
        return stages, rng

    with mock.patch.object(parity, "build_stages", broken):
        yield


@contextmanager
def _experts_of_own_replica() -> Iterator[None]:
    """Gradients of experts are not summed over the ranks that hold the same ones."""
    axis = Mesh.axis
    with mock.patch.object(Mesh, "axis", lambda self, name: Axis(name) if name == "edp" else axis(self, name)):
        yield


@contextmanager
def _expert_bias_on_every_rank() -> Iterator[None]:
    init = moe.ExpertLinear.__init__

    def broken(self: Any, *args: Any, **options: Any) -> None:
        init(self, *args, **options)
        self.share = 1.0

    with mock.patch.object(moe.ExpertLinear, "__init__", broken):
        yield


def _norm_without_other_experts(pieces: Any, mesh: Mesh, **options: Any) -> Tensor:
    return clip.global_norm(pieces, replace(mesh, ep=Axis("ep")), **options)


def _by_rank(self: Any, leaving: Tensor) -> None:
    """Rows stay as they arrive, one rank's behind the other's, whatever expert they are for."""
    MEET(self, leaving)
    self.regroup = torch.arange(len(self.regroup))


def _loads_of_own_tokens(mesh: Mesh, *models: Any) -> Tensor | None:
    return LOADS(replace(mesh, dp=Axis("dp")), *models)


MEET, LOADS = dispatch.Dispatch._meet, router.loads


def _untouched(x: Tensor, axis: Axis) -> Tensor:
    return x


MUTATIONS: dict[str, Mutation] = {
    "head gains of q not summed": gradient_sum(r".*\.q_norm\.weight", None),
    "head gains of k not summed": gradient_sum(r".*\.k_norm\.weight", None),
    "head gains of v not summed": gradient_sum(r".*\.v_norm\.weight", None),
    "head gains of context not summed": gradient_sum(r".*\.context_norm\.weight", None),
    "table: head norms like stream norms": table_row("head", "q", "k", "v", "context", grad_sum="sp"),
    "table: stream norms never summed": table_row(None, *STREAM_SITES, grad_sum=None),
    "local statistics of inner": local_statistics("inner"),
    "local statistics of q": local_statistics("q"),
    "local statistics of k": local_statistics("k"),
    "local statistics of context": local_statistics("context"),
    "statistics not summed in backward": _patched(norm.NormLayer, "_reduce", _reduce_forward_only),
    "replicated kv heads counted by each rank": _heads_counted_by_each_replica,
    "bias on every rank": _patched(linear.RowParallelLinear, "forward", _bias_on_every_rank),
    "head scale summed twice": reduced_twice("scale"),
    "head scale not summed": gradient_sum(r".*\.head_scale", None),
    "head scale summed once too often": gradient_sum(r".*\.head_scale", "tp"),
    "kv weights not summed over replicas": gradient_sum(r".*\.attention\.[kv]\.weight", None),
    "kv biases not summed over replicas": gradient_sum(r".*\.attention\.[kv]\.bias", None),
    "kv gains not summed over replicas": gradient_sum(r".*\.k_norm\.(weight|bias)", None),
    "stream gains not summed": gradient_sum(r".*\.(input|output|post)_norm\.(weight|bias)", None),
    "final gain not summed": gradient_sum(r"final_norm\.(weight|bias)", None),
    "embedding gain not summed": gradient_sum(r"embed\.norm\.(weight|bias)", None),
    "stream gains summed without sequence parallelism": gradient_sum(r".*\.input_norm\.weight", "tp"),
    "residual scales not summed": gradient_sum(r".*\.residual\.(skip|branch)", None),
    "mixing weights not summed": gradient_sum(r".*\.mix\.(map|scale|bias)", None),
    "positions not summed": gradient_sum(r"embed\.position\.weight", None),
    "row biases not summed": gradient_sum(r".*\.(o|down)\.bias", None),
    "vocabulary padding in the loss": _patched(loss, "_masked", _unmasked_padding),
    "rows of other ranks not zeroed": _patched(embedding.TokenEmbedding, "forward", _first_labels_only),
    "head gradient sliced, not summed": _patched(embedding, "gather_sequence", _sliced_gradient),
    "clip norm counts replicas": _patched(parity, "global_norm", _norm_of_all_holders),
    "clip norm of one range": _patched(parity, "global_norm", _norm_of_own_range),
    "mean of micro-batch means": _mean_of_means,
    "tied embedding not summed over the ends": _last_stage_alone_sums_nothing,
    "buckets summed before the last backward": _every_backward_is_reduced,
    "updated weights not gathered": _own_range_not_published,
    "a stage takes an old message": _messages_of_another_micro_batch,
    "gradients of experts summed like all else": _experts_like_all_else,
    "gradients of experts not summed": _experts_of_own_replica,
    "expert bias on every rank": _expert_bias_on_every_rank,
    "router weights not summed": gradient_sum(r".*\.router\.weight", None),
    "gradients into experts not summed": _patched(moe, "copy_to", _untouched),
    "balance of own tokens": _patched(router, "sum_from", _untouched),
    "loads of own tokens": _patched(router, "loads", _loads_of_own_tokens),
    "rows not regrouped by expert": _patched(dispatch.Dispatch, "_meet", _by_rank),
    "clip norm of own experts": _patched(parity, "global_norm", _norm_without_other_experts),
}
