"""Run a golden through the model that the training code builds, on one rank or many: tensor-parallel, in stages, or both."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from goldens.case import Case, NotCovered, from_yaml, to_yaml
from megnorm.layers.embedding import full_logits
from megnorm.layers.env import Env
from megnorm.layers.rope import token_positions
from megnorm.models.build import Input, Model, build_model
from megnorm.models.causal import Tokens
from megnorm.models.config import ModelConfig
from megnorm.models.encdec import EncoderDecoder, Pairs
from megnorm.models.family import ties
from megnorm.models.masked import MaskedTokens
from megnorm.parallel.collectives import all_reduce, gather_objects
from megnorm.parallel.layout import named_matrices, reduce_replicated_grads
from megnorm.parallel.mesh import Mesh, build_mesh
from megnorm.parallel.pipeline import Pipeline
from megnorm.parallel.schedule import forward_only, make_schedule


@dataclass(frozen=True)
class Errors:
    """What a golden's run differs by.

    logits: max |difference|; loss: |difference|; both over max(1, largest magnitude of the reference) in neutral sets.
    gradients: by name, |difference| / max(|reference|, 1e-3 of the reference's global gradient norm), Euclidean norms.
    """

    logits: float
    loss: float
    gradients: Mapping[str, float]
    relative: bool

    @property
    def worst(self) -> tuple[str, float]:
        """The gradient that differs most; a NaN counts as most."""
        return max(self.gradients.items(), key=lambda item: (item[1] != item[1], item[1]))


@functools.cache
def _mesh(tp: int, pp: int, kv_heads: int, tied: tuple[tuple[str, tuple[int, ...]], ...]) -> Mesh:
    cpu = torch.device("cpu")
    return build_mesh(tp=tp, pp=pp, dp=1, kv_heads=kv_heads, device=cpu, sequence_parallel=tp > 1, ties=dict(tied))


def stages_of(model: ModelConfig, pp: int) -> list[tuple[int, int]]:
    """[first, last) layers of each stage, in even shares."""
    layers = model.layers + model.source_layers
    ends = [i * layers // pp for i in range(pp + 1)]
    return list(zip(ends, ends[1:], strict=False))


def mesh_of(case: Case, tp: int, pp: int = 1) -> Mesh:
    """The mesh for a golden over all ranks. Raises NotCovered if it does not split over tp ranks or pp stages."""
    model = case.model
    for name, size in (("heads", model.heads), ("ffn", model.ffn), ("expert ffn", model.expert_ffn)):
        if size % tp:
            raise NotCovered(f"tp {tp} does not divide {name} {size}")
    if model.kv % tp and tp % model.kv:
        raise NotCovered(f"tp {tp} and kv_heads {model.kv} do not divide each other")
    if pp > 1 and model.moe.balance_across == "layers":
        raise NotCovered("one balance loss of all layers together, which stages run in turn")
    layers = model.layers + model.source_layers
    if layers < pp:
        raise NotCovered(f"pp {pp} asks for a layer each, of {layers}")
    return _mesh(tp, pp, model.kv, tuple(sorted(ties(model, stages_of(model, pp), pp).items())))


def run(case: Case, mesh: Mesh | None = None) -> Errors:
    """Build, load, run forward and backward, compare. Every rank of the mesh must call it, and all raise alike.

    Raises ValueError. The sequences of the golden are micro-batches, which the training code's executor sends through the
    stages.
    """
    mesh = mesh or Mesh()
    config, pp = from_yaml(to_yaml(case.model)), mesh.pp
    layers = stages_of(config, pp.size)[pp.rank]
    env = Env(mesh=mesh, dtype=case.dtype)
    env.rng.begin(0, case.step, 0, 0, mesh.tp.rank)
    stage = build_model(config, env, seed=0, layers=layers)
    load(stage, case, mesh)
    parts, count = _parts(case, mesh)
    logits = _logits(stage, parts, mesh)[: case.tokens.shape[1]].transpose(0, 1)
    schedule = make_schedule("1f1b", pp.size, 1, len(parts))
    executor = Pipeline({pp.rank: stage}, mesh)
    loss = executor.run(schedule, parts, weight=1.0 / count)
    loss = all_reduce(loss + executor.extra.to(loss), pp)  # and what sparse layers add to it
    return errors_of(case, logits, loss, gradients(stage, mesh))


def errors_of(case: Case, logits: Tensor, loss: Tensor, ours: Mapping[str, Tensor]) -> Errors:
    """What a run gave against what the reference did. Raises ValueError for logits of another shape."""
    if logits.shape != case.logits.shape:
        raise ValueError(f"logits are {list(logits.shape)}, the golden's {list(case.logits.shape)}")
    scale = max(1.0, case.logits.abs().max().item()) if case.logits_relative else 1.0
    loss_scale = max(1.0, abs(case.loss)) if case.logits_relative else 1.0
    difference = (logits - case.logits).abs()
    return Errors(
        (difference if case.seen is None else difference[case.seen]).max().item() / scale,
        abs(loss.item() - case.loss) / loss_scale,
        _gradient_errors(ours, case),
        case.logits_relative,
    )


class _ToLogits:
    """A stage for the executor: forward alone, the last one keeps the logits [s, b, v] of every micro-batch."""

    def __init__(self, stage: Model) -> None:
        self.stage, self.edge = stage, stage.edge
        self.found: list[Tensor] = []

    def __call__(self, batch: Any, carry: Tensor | None) -> Tensor:
        x = self.stage.states(batch, carry)
        if not self.stage.last:
            return x
        self.found.append(full_logits(self.stage.head(x), self.stage.head, self.stage.cfg.vocab_size))
        return x.new_zeros(())


@torch.no_grad()
def _logits(stage: Model, parts: list[Input], mesh: Mesh) -> Tensor:
    """[s, b, v] on every rank."""
    forward = _ToLogits(stage)
    Pipeline({mesh.pp.rank: forward}, mesh).run(forward_only(mesh.pp.size, 1, len(parts)), parts)
    return torch.cat(gather_objects(forward.found, mesh.pp)[-1], 1)


def load(stage: Model, case: Case, mesh: Mesh) -> None:
    """Fill every logical matrix from the golden. Raises ValueError, on every rank of the pipeline, if one is left over,
    missing or of other shape."""
    problem, taken = _fill(stage, case)
    found = gather_objects((problem, taken), mesh.pp)
    for words, _ in found:
        if words:
            raise ValueError(words)
    left = set(case.weights).difference(*(names for _, names in found))
    if left:
        # head.weight of an untied golden loaded into a tied model, a norm that the scheme does not have, ...
        raise ValueError(f"the golden's '{min(left)}' has no place in the model ({len(left)} such)")


def _fill(stage: Model, case: Case) -> tuple[str, set[str]]:
    """What is wrong ("" for nothing), and which of the golden's weights this stage has taken."""
    taken: set[str] = set()
    for named in named_matrices(stage):
        matrix, view = named.matrix, named.view()
        if named.name in case.zero:
            view.zero_()
            continue
        if named.name not in case.weights:
            return f"the model's '{named.name}' is not in the golden", taken
        full = case.weights[named.name]
        if tuple(full.shape) != matrix.shape:
            return f"'{named.name}' is {list(matrix.shape)} in the model, {list(full.shape)} in the golden", taken
        for dim, (start, size) in enumerate(zip(matrix.offset, matrix.local, strict=True)):
            full = full.narrow(dim, start, size)
        view.copy_(full)
        taken.add(named.name)
    return _take_table(stage, case.table) if case.table is not None and stage.first else "", taken


def _take_table(stage: Model, table: Tensor) -> str:
    """Put the reference's constant position table in place of the model's, which must be the same to fp32 rounding.

    fairseq computes angles in fp32, whose rounding grows with the position and depends on the machine. Returns what is
    wrong.
    """
    assert not isinstance(stage, EncoderDecoder), "no encoder-decoder golden has a constant table"
    ours = getattr(stage.embed.position, "table", None)
    if ours is None or len(ours) < len(table):
        return "the golden has a position table that the model lacks"
    difference = (ours[: len(table)].to(table) - table).abs().max().item()
    if not difference <= 1e-6 * (len(table) + 1):
        return f"the model's position table differs from the golden's by {difference:.1e}"
    ours[: len(table)] = table.to(ours)
    return ""


def _parts(case: Case, mesh: Mesh) -> tuple[list[Input], int]:
    """The golden's sequences as micro-batches [s, 1] (as one, if experts balance over that), and the tokens with a loss.

    Tails are filled to a multiple of tp; causal models do not see the filling, and to encoders it is padding.
    """
    tokens, labels, padding = case.tokens.t(), case.labels.t(), case.model.padding_id
    blank = 0 if padding is None else padding
    positions = token_positions(tokens, padding)
    tail = -1 if padding is not None else 0
    tokens, labels, positions = (
        _filled(tokens, mesh, blank),
        _filled(labels, mesh, -100),
        _filled(positions, mesh, tail),
    )
    mask = labels != -100
    count, rows = int(mask.sum()), range(tokens.shape[1])
    if case.model.moe.balance_over == "micro_batch":
        return [Tokens(tokens, labels, mask.to(case.dtype), positions)], count
    plain: list[Any] = [_columns(i, tokens, labels, mask.to(case.dtype)) for i in rows]
    if case.model.family == "causal":
        return [Tokens(*plain[i], *_columns(i, positions)) for i in rows], count
    encoded = case.tokens if case.source is None else case.source
    real = _filled((torch.ones_like(encoded, dtype=torch.bool) if case.real is None else case.real).t(), mesh, False)
    if case.source is None:
        segments = _filled((torch.zeros_like(encoded) if case.segments is None else case.segments).t(), mesh, 0)
        return [
            MaskedTokens(*one, real=r, segments=kind)
            for one, r, kind in zip(plain, real.split(1, 1), segments.split(1, 1), strict=True)
        ], count
    source = _filled(case.source.t(), mesh, 0)
    return [Pairs(*_columns(i, source, real), *plain[i]) for i in rows], count


def _filled(x: Tensor, mesh: Mesh, value: int) -> Tensor:
    return torch.cat([x, x.new_full((-len(x) % mesh.sp.size, *x.shape[1:]), value)])


def _columns(i: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The row i of each, or all of what is one for all rows."""
    return tuple(x[:, i : i + 1].contiguous() if x.dim() == 2 else x for x in tensors)


def gradients(stage: Model, mesh: Mesh) -> dict[str, Tensor]:
    """Whole logical gradients by canonical name, on every rank, put together from the slices that ranks own."""
    params = [param for param in stage.parameters() if param.requires_grad]
    for param in params:
        param.main_grad = param.grad  # type: ignore[attr-defined]
    reduce_replicated_grads(params, mesh)
    own: dict[str, tuple[Tensor, Tensor]] = {}
    for named in named_matrices(stage):
        matrix = named.matrix
        full = torch.zeros(matrix.shape, dtype=named.param.dtype)
        held = torch.zeros(matrix.shape, dtype=torch.int32)
        if matrix.owner:
            place = tuple(slice(o, o + n) for o, n in zip(matrix.offset, matrix.local, strict=True))
            assert named.param.grad is not None
            full[place] = named.view(named.param.grad)
            held[place] = 1
        own[named.name] = all_reduce(full, mesh.tp), all_reduce(held, mesh.tp)
    whole: dict[str, Tensor] = {}
    times: dict[str, Tensor] = {}
    for part in gather_objects(own, mesh.pp):
        for name, (full, held) in part.items():
            whole[name] = whole[name] + full if name in whole else full
            times[name] = times[name] + held if name in times else held
    for name, held in times.items():
        if not bool((held == 1).all()):
            raise ValueError(f"'{name}': its elements are not owned by exactly one rank each")
    return whole


def _gradient_errors(ours: Mapping[str, Tensor], case: Case) -> dict[str, float]:
    norms = {name: grad.double().norm().item() for name, grad in case.grads.items()}
    floor = 1e-3 * sum(norm**2 for norm in norms.values()) ** 0.5
    return {
        name: (ours[name].double() - grad.double()).norm().item() / max(norms[name], floor, 1e-300)
        for name, grad in case.grads.items()
    }
