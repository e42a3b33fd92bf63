"""Goldens of streams mixed by token: ``x``, ``readout``, ``output``, and branches that are tanh(linear(N(z))).

They hold the arithmetic of the streams alone, so the sub-layers here are megnorm's own with that branch, in stages that the
training code's executor runs; the loss is mean(sin(output * readout)).
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from goldens.case import FRONTIER, Case, choose, field, take
from goldens.run import Errors, errors_of, gradients, load, stages_of
from megnorm.layers import streams
from megnorm.layers.env import Context, Env
from megnorm.layers.norm import norm_or_identity
from megnorm.layers.sublayer import SubLayer
from megnorm.models.config import ModelConfig
from megnorm.models.family import resolve_model
from megnorm.norms import scheme
from megnorm.norms.config import NormConfig
from megnorm.norms.scheme import Mix
from megnorm.parallel.collectives import all_reduce, gather_objects, gather_sequence, own_slice
from megnorm.parallel.layout import Layout, parameter
from megnorm.parallel.mesh import Mesh
from megnorm.parallel.pipeline import Pipeline
from megnorm.parallel.schedule import make_schedule

LOSS = "mean(sin(output*readout))"
EPS = 1e-6  # of the branches' norms and the last one, which the json leaves unsaid
BRANCH = {"norm.weight": "input_norm.weight", "proj.weight": "proj"}
Part = tuple[str, int, int, Tensor]  # canonical name, which part of it, along which dimension, the part
# hyper-connections: what is one parameter here is two there, of read and mix, and of write
HYPER = {
    "dynamic_alpha_fn": ("map", 0), "dynamic_beta_fn": ("map", 1), "dynamic_alpha_scale": ("scale", 0),
    "dynamic_beta_scale": ("scale", 1), "static_alpha": ("bias", 0), "static_beta": ("bias", 1),
    "norm.gamma": ("norm.weight", 0),
}  # fmt: skip
MHC = {"fn": "map", "base": "bias", "scale": "scale"}


@dataclass(frozen=True)
class StreamCase(Case):
    """tokens [b, s] are unused; x [s, b, d], readout [d]. logits: the output [b, s, d]."""

    x: Tensor = torch.empty(0)
    readout: Tensor = torch.empty(0)


def case(data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> StreamCase:
    """A golden of the format. Raises ValueError if it says something that is not documented."""
    if field(data, "loss_definition") != LOSS:
        raise ValueError(f"loss_definition: '{data['loss_definition']}' is not documented for streams")
    config = data["config"]
    sinkhorn = "sinkhorn_iters" in config
    n, width = field(config, "streams"), field(config, "hidden")
    if sinkhorn:
        norm, layers = NormConfig("mhc", {"streams": n, "rounds": config["sinkhorn_iters"]}), field(config, "layers")
        mix = {"eps": float(field(config, "hc_eps"))}
        patch = {"all_layers": {"attention": {"mix": mix}, "ffn": {"mix": mix}}, "streams": {"exit": mix}}
        patch = {} if mix["eps"] == Mix().eps else patch
        norm = NormConfig(norm.scheme, norm.options, patch, kind="rmsnorm", eps=float(field(config, "rms_norm_eps")))
    else:
        norm, layers = (
            NormConfig("hyper_connections", {"streams": n}, kind="rmsnorm", eps=EPS),
            field(config, "sublayers") // 2,
        )
    params = {name.removeprefix("param."): value for name, value in tensors.items() if name.startswith("param.")}
    grads = {name: take(tensors, f"grad.{name}") for name in params}
    rename = _mhc if sinkhorn else _hyper
    x = take(tensors, "x")
    return StreamCase(
        model=ModelConfig(layers=layers, width=width, heads=width // 2, ffn=width, vocab_size=1, norm=norm),
        dtype=torch.float32,
        tokens=torch.zeros(x.shape[:2], dtype=torch.int64),
        labels=torch.zeros(x.shape[:2], dtype=torch.int64),
        weights=_joined(params, rename),
        grads=_joined(grads, rename),
        logits=take(tensors, "output"),
        loss=float(take(tensors, "loss")),
        tolerance=FRONTIER,
        logits_relative=False,
        x=x.transpose(0, 1),
        readout=take(tensors, "readout"),
    )


def _joined(found: Mapping[str, Tensor], rename: Callable[[str, Tensor], Part]) -> dict[str, Tensor]:
    """By canonical name; parts of one parameter are put together in their order."""
    parts: dict[str, list[tuple[int, int, Tensor]]] = {}
    for reference, value in found.items():
        name, place, dim, part = rename(reference, value)
        parts.setdefault(name, []).append((place, dim, part))
    ordered = {name: sorted(some, key=lambda part: part[0]) for name, some in parts.items()}
    return {name: torch.cat([part for *_, part in some], some[0][1]) for name, some in ordered.items()}


def _hyper(name: str, value: Tensor) -> Part:
    if name == "norm.weight":
        return "final_norm.weight", 0, 0, value
    match = re.fullmatch(r"(branches|layers)\.(\d+)\.(.+)", name)
    if match is None:
        raise ValueError(f"the parameter '{name}' is not documented")
    path = f"blocks.{int(match[2]) // 2}.{('attention', 'ffn')[int(match[2]) % 2]}"
    if match[1] == "branches":
        return f"{path}.{choose(BRANCH, match[3], name)}", 0, 0, value
    to, place = choose(HYPER, match[3], name)
    if to == "map":
        return f"{path}.mix.map", place, 0, value.t() if value.dim() == 2 else value[None]
    if to == "bias":
        return f"{path}.mix.bias", place, 1, value if value.dim() == 2 else value[:, None]
    return f"{path}.mix.{to}", place, 0, value.reshape(1) if to == "scale" else value


def _mhc(name: str, value: Tensor) -> Part:
    if name == "norm.weight":
        return "final_norm.weight", 0, 0, value
    if name.startswith("hc_head.hc_"):
        return f"joined.mix.{choose(MHC, name.removeprefix('hc_head.hc_'), name)}", 0, 0, value
    match = re.fullmatch(r"layers\.(\d+)\.(\w+)\.(\w+)(?:\.weight)?", name)
    if match is None:
        raise ValueError(f"the parameter '{name}' is not documented")
    path, part, leaf = f"blocks.{match[1]}", match[2], match[3]
    if part in ("attn_hc", "ffn_hc"):
        return f"{path}.{'attention' if part == 'attn_hc' else 'ffn'}.mix.{choose(MHC, leaf, name)}", 0, 0, value
    if leaf == "proj":
        return f"{path}.{choose({'self_attn': 'attention', 'mlp': 'ffn'}, part, name)}.proj", 0, 0, value
    own = {"input_layernorm": "attention", "post_attention_layernorm": "ffn"}
    return f"{path}.{choose(own, part, name)}.input_norm.weight", 0, 0, value


class Branch(SubLayer):
    """A sub-layer whose branch is tanh(W u)."""

    def __init__(self, spec: scheme.SubLayer, width: int, env: Env, name: str) -> None:
        super().__init__(spec, width, 0.0, env, name)
        partial = "tp" if env.mesh.sequence_parallel else None
        layout = Layout.whole((width, width), "o", grad_sum=partial, owner=env.mesh.tp.rank == 0)
        self.proj = parameter(env.empty(width, width), layout)

    def body(self, u: Tensor, context: Context, h: Tensor | None = None) -> Tensor:
        return torch.tanh(u @ self.proj.t())


class Stage(nn.Module):
    """Layers [first, last) between streams that begin and end as megnorm's do; for the executor."""

    def __init__(self, model: ModelConfig, env: Env, layers: tuple[int, int]) -> None:
        super().__init__()
        resolved, width = resolve_model(model), model.width
        self.env, self.width, self.streams = env, width, resolved.streams
        self.first, self.last = layers[0] == 0, layers[1] == model.layers
        self.blocks = nn.ModuleDict()
        for i in range(*layers):
            layer = resolved.layers[i]
            parts = {"attention": layer.attention, "ffn": layer.ffn}
            self.blocks[str(i)] = nn.ModuleDict(
                {part: Branch(spec, width, env, f"blocks.{i}.{part}") for part, spec in parts.items()}
            )
        if self.last:
            self.joined = streams.end(resolved.streams, width, env)
            self.final_norm = norm_or_identity(resolved.final, "final", 1, width, env)
        self.output: Tensor | None = None

    def edge(self, batch: StreamCase, *, into: bool) -> tuple[tuple[int, ...], torch.dtype]:
        s, b, d = batch.x.shape
        return streams.shape_of(s // self.env.mesh.sp.size, b, d, self.streams), batch.dtype

    def forward(self, batch: StreamCase, carry: Tensor | None = None) -> Tensor:
        """The streams behind this stage; of the last one its rank's part of the loss."""
        x = streams.begin(own_slice(batch.x, self.env.mesh.sp), self.streams) if carry is None else carry
        for block in self.blocks.values():
            for part in block.values():  # type: ignore[operator]
                x = part(x, Context(), layer_input=x)
        if not self.last:
            return x
        x = self.final_norm(self.joined(x))
        self.output = x.detach()
        return torch.sin(x * batch.readout).sum()


def run(case: StreamCase, mesh: Mesh | None = None) -> Errors:
    """Build, load, run forward and backward, compare. Every rank of the mesh must call it, and all raise alike."""
    mesh = mesh or Mesh()
    pp = mesh.pp
    stage = Stage(case.model, Env(mesh=mesh, dtype=case.dtype), stages_of(case.model, pp.size)[pp.rank])
    load(stage, case, mesh)
    schedule = make_schedule("1f1b", pp.size, 1, 1)
    loss = Pipeline({pp.rank: stage}, mesh).run(schedule, [case], weight=1.0 / case.x.numel())
    for axis in (mesh.sp, pp):
        loss = all_reduce(loss, axis)
    own = torch.empty(0) if stage.output is None else gather_sequence(stage.output, mesh.sp)
    return errors_of(case, gather_objects(own, pp)[-1].transpose(0, 1), loss, gradients(stage, mesh))
