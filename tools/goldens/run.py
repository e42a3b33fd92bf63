"""Run a golden through the model that the training code builds, on one rank or a tensor-parallel group."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from goldens.case import Case, NotCovered, from_yaml, to_yaml
from megnorm.layers.env import Env
from megnorm.layers.rope import token_positions
from megnorm.models.causal import CausalLM, Tokens, build_model
from megnorm.parallel.collectives import all_reduce
from megnorm.parallel.layout import named_matrices, reduce_replicated_grads
from megnorm.parallel.mesh import Mesh, build_mesh


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
def _mesh(tp: int, kv_heads: int) -> Mesh:
    cpu = torch.device("cpu")
    return build_mesh(tp=tp, pp=1, dp=1, kv_heads=kv_heads, device=cpu, sequence_parallel=tp > 1)


def mesh_of(case: Case, tp: int) -> Mesh:
    """The mesh for a golden over all ranks. Raises NotCovered if its sizes do not split over ``tp`` ranks."""
    model = case.model
    for name, size in (("heads", model.heads), ("ffn", model.ffn)):
        if size % tp:
            raise NotCovered(f"tp {tp} does not divide {name} {size}")
    if model.kv % tp and tp % model.kv:
        raise NotCovered(f"tp {tp} and kv_heads {model.kv} do not divide each other")
    return _mesh(tp, model.kv)


def run(case: Case, mesh: Mesh | None = None) -> Errors:
    """Build, load, run forward and backward, compare. Every rank of the mesh must call it. Raises ValueError."""
    mesh = mesh or Mesh()
    config = from_yaml(to_yaml(case.model))
    model = build_model(config, Env(mesh=mesh, dtype=case.dtype), seed=0)
    load(model, case)
    batch, count = _batch(case, mesh)
    logits = model.logits(batch.tokens, batch.positions)[: case.tokens.shape[1]].transpose(0, 1)
    loss = model(batch) / count
    loss.backward()
    if logits.shape != case.logits.shape:
        raise ValueError(f"logits are {list(logits.shape)}, the golden's {list(case.logits.shape)}")
    scale = max(1.0, case.logits.abs().max().item()) if case.logits_relative else 1.0
    loss_scale = max(1.0, abs(case.loss)) if case.logits_relative else 1.0
    return Errors(
        (logits - case.logits).abs().max().item() / scale,
        abs(loss.item() - case.loss) / loss_scale,
        _gradient_errors(gradients(model, mesh), case),
        case.logits_relative,
    )


def load(model: CausalLM, case: Case) -> None:
    """Fill every logical matrix from the golden. Raises ValueError if one is left over, missing or of other shape."""
    left = set(case.weights)
    for named in named_matrices(model):
        matrix, view = named.matrix, named.view()
        if named.name in case.zero:
            view.zero_()
            continue
        if named.name not in case.weights:
            raise ValueError(f"the model's '{named.name}' is not in the golden")
        full = case.weights[named.name]
        if tuple(full.shape) != matrix.shape:
            raise ValueError(f"'{named.name}' is {list(matrix.shape)} in the model, {list(full.shape)} in the golden")
        for dim, (start, size) in enumerate(zip(matrix.offset, matrix.local, strict=True)):
            full = full.narrow(dim, start, size)
        view.copy_(full)
        left.discard(named.name)
    if left:
        # head.weight of an untied golden loaded into a tied model, a norm that the scheme does not have, ...
        raise ValueError(f"the golden's '{min(left)}' has no place in the model ({len(left)} such)")
    if case.table is not None:
        _take_table(model, case.table)


def _take_table(model: CausalLM, table: Tensor) -> None:
    """Put the reference's constant position table in place of the model's, which must be the same to fp32 rounding.

    fairseq computes angles in fp32, whose rounding grows with the position and depends on the machine.
    """
    position = model.embed.position
    ours = getattr(position, "table", None)
    if ours is None or len(ours) < len(table):
        raise ValueError("the golden has a position table that the model lacks")
    difference = (ours[: len(table)].to(table) - table).abs().max().item()
    if not difference <= 1e-6 * (len(table) + 1):
        raise ValueError(f"the model's position table differs from the golden's by {difference:.1e}")
    ours[: len(table)] = table.to(ours)


def _batch(case: Case, mesh: Mesh) -> tuple[Tokens, int]:
    """The golden's batch as [s, b], its tail filled to a multiple of tp; causal models do not see the filling."""
    tokens, labels = case.tokens.t(), case.labels.t()
    fill = -len(tokens) % mesh.sp.size
    positions = token_positions(tokens, case.model.padding_id)
    padding = case.model.padding_id
    tokens = torch.cat([tokens, tokens.new_full((fill, tokens.shape[1]), 0 if padding is None else padding)])
    labels = torch.cat([labels, labels.new_full((fill, labels.shape[1]), -100)])
    tail = positions.new_full((fill, *positions.shape[1:]), 0 if padding is None else -1)
    mask = labels != -100
    batch = Tokens(tokens.contiguous(), labels.contiguous(), mask.to(case.dtype), torch.cat([positions, tail]))
    return batch, int(mask.sum())


def gradients(model: CausalLM, mesh: Mesh) -> dict[str, Tensor]:
    """Whole logical gradients by canonical name, on every rank, put together from the slices that ranks own."""
    params = [param for param in model.parameters() if param.requires_grad]
    for param in params:
        param.main_grad = param.grad  # type: ignore[attr-defined]
    reduce_replicated_grads(params, mesh)
    whole: dict[str, Tensor] = {}
    for named in named_matrices(model):
        matrix = named.matrix
        full = torch.zeros(matrix.shape, dtype=named.param.dtype)
        held = torch.zeros(matrix.shape, dtype=torch.int32)
        if matrix.owner:
            place = tuple(slice(o, o + n) for o, n in zip(matrix.offset, matrix.local, strict=True))
            assert named.param.grad is not None
            full[place] = named.view(named.param.grad)
            held[place] = 1
        whole[named.name] = all_reduce(full, mesh.tp)
        if not bool((all_reduce(held, mesh.tp) == 1).all()):
            raise ValueError(f"'{named.name}': its elements are not owned by exactly one rank each")
    return whole


def _gradient_errors(ours: Mapping[str, Tensor], case: Case) -> dict[str, float]:
    norms = {name: grad.double().norm().item() for name, grad in case.grads.items()}
    floor = 1e-3 * sum(norm**2 for norm in norms.values()) ** 0.5
    return {
        name: (ours[name].double() - grad.double()).norm().item() / max(norms[name], floor, 1e-300)
        for name, grad in case.grads.items()
    }
