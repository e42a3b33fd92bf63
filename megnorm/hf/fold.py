"""Exact rewrites that make a model plainer, so that more of them fit a class of transformers.

Constants and learned factors that stand next to a matrix or a gain move into it: scales of norms, factors on branches,
head scales, the embedding scale of an untied model. What is computed stays the same up to rounding.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from megnorm.models.config import ModelConfig
from megnorm.norms.resolve import Resolved
from megnorm.norms.scheme import Layer, Norm, Scale

if TYPE_CHECKING:
    from torch import Tensor

State = dict[str, "Tensor"]
SITES = {
    "attention": ("input", "output", "post", "q", "k", "v", "context"),
    "ffn": ("input", "output", "post", "inner"),
}
LAST = {"attention": "o", "ffn": "down"}
INVARIANT = ("layernorm", "rmsnorm")
"""Kinds that undo a factor on their input, up to eps."""


def fold(
    model: ModelConfig, resolved: Resolved, state: Mapping[str, "Tensor"] | None = None
) -> tuple[ModelConfig, Resolved, State]:
    """The plainest equal model: gains as vectors, no scales that a matrix or gain can carry.

    state: full logical tensors by canonical name; None folds the declaration alone. The input is not changed.
    """
    made: State = dict(state or {})
    layers = tuple(_layer(f"blocks.{i}", layer, model, made) for i, layer in enumerate(resolved.layers))
    embedding = _norm("embed.norm", resolved.embedding, model.width, made)
    final = _norm("final_norm", resolved.final, model.width, made)
    scale = embedding_scale(model)
    if scale != 1.0 and not model.tied_head:
        _multiply(made, "embed.token.weight", scale)
        model = replace(model, embedding_scale=1.0)
    if model.logit_scale != 1.0 and not (model.tied_head and (final is None or model.head_transform)):
        _scale_logits(model, final, made)
        model = replace(model, logit_scale=1.0)
    return model, replace(resolved, layers=layers, embedding=embedding, final=final), made


def fold_skip(resolved: Resolved, state: Mapping[str, "Tensor"] | None = None) -> tuple[Resolved, State]:
    """N(a r + y) as N(r + y / a) with eps / a^2, in every sub-layer that has a constant skip and a post norm."""
    made: State = dict(state or {})
    layers = []
    for i, layer in enumerate(resolved.layers):
        for part in ("attention", "ffn"):
            sub = getattr(layer, part)
            skip, post = sub.residual.skip, sub.post
            free = skip.learned is None and not (sub.residual.layer_input or sub.residual.gate)
            free = free and sub.residual.source == "stream"
            if skip.value == 1.0 or skip.value <= 0 or not free or post is None or post.kind not in INVARIANT:
                continue
            _scale_branch(f"blocks.{i}.{part}", LAST[part], sub.output, 1.0 / skip.value, made)
            post = replace(post, eps=post.eps / skip.value**2)
            sub = replace(sub, post=post, residual=replace(sub.residual, skip=Scale()))
            layer = replace(layer, **{part: sub})
        layers.append(layer)
    return replace(resolved, layers=tuple(layers)), made


def fold_scores(
    model: ModelConfig, resolved: Resolved, state: Mapping[str, "Tensor"]
) -> tuple[ModelConfig, dict[str, "Tensor"]]:
    """The factor on scores as 1 / sqrt(head_dim), the rest of it in W_q or in the (folded) norm behind it."""
    made: State = dict(state)
    if model.attention.scale is None:
        return model, made
    factor = model.attention.scale * model.hd**0.5
    for i, layer in enumerate(resolved.layers):
        _scale(
            f"blocks.{i}.attention.q" + ("" if layer.attention.q is None else "_norm"), layer.attention.q, factor, made
        )
    return replace(model, attention=replace(model.attention, scale=None)), made


def embedding_scale(model: ModelConfig) -> float:
    """The factor on token embeddings as a number."""
    return model.width**0.5 if model.embedding_scale == "sqrt_width" else float(model.embedding_scale)


def _layer(path: str, layer: Layer, model: ModelConfig, state: State) -> Layer:
    sizes = {"q": model.heads, "k": model.kv, "v": model.kv, "context": model.heads}
    shared = {name: state.get(f"{path}.attention.residual.{name}") for name in ("skip", "branch")}
    changes: dict[str, Any] = {}
    for part, sites in SITES.items():
        sub, here = getattr(layer, part), f"{path}.{part}"
        norms = {}
        for site in sites:
            norm = getattr(sub, site)
            width = model.ffn if site == "inner" else model.width
            if norm is not None and site in sizes:
                width = model.hd * (sizes[site] if norm.over == "width" else 1)
            norms[site] = _norm(f"{here}.{site}_norm", norm, width, state)
        sub = replace(sub, **norms)
        branch = sub.residual.branch
        if branch.learned is not None or branch.value != 1.0:
            factor = branch.value
            if branch.learned is not None:
                factor = state.pop(f"{here}.residual.branch", shared["branch"])
            if state:
                _scale_branch(here, LAST[part], sub.output, factor, state)
            sub = replace(sub, residual=replace(sub.residual, branch=Scale()))
        changes[part] = sub
    if changes["attention"].head_scale is not None:
        _head_scale(f"{path}.attention", changes["attention"].head_scale, model, state)
        changes["attention"] = replace(changes["attention"], head_scale=None)
    return replace(layer, **changes)


def _norm(path: str, norm: Norm | None, width: int, state: State) -> Norm | None:
    """The same norm with gain "vector" (or "per_head") and scale 1."""
    if norm is None:
        return None
    scale: float = norm.scale  # type: ignore[assignment]
    if state:
        name = f"{path}.weight"
        if norm.gain == "one_plus":
            state[name] = 1 + state[name].double()  # the class may store w again
        elif norm.gain == "scalar":
            state[name] = state[name].expand(width).clone()
        elif norm.gain == "none":
            state[name] = next(iter(state.values())).new_ones(width)
        if scale != 1.0:
            _scale(path, norm, scale, state)
    return replace(norm, gain="per_head" if norm.gain == "per_head" else "vector", scale=1.0)


def _scale_branch(path: str, last: str, output: Norm | None, factor: "float | Tensor", state: State) -> None:
    """Multiply a branch's output: in its output norm if it has one, else in its last matrix."""
    if output is not None:
        _scale(f"{path}.output_norm", output, factor, state)
        return
    lasts = [name for name in state if name.startswith(f"{path}.") and name.rpartition(".")[0].endswith(f".{last}")]
    for name in lasts:  # one, or that of every expert
        _multiply(state, name, factor[:, None] if name.endswith("weight") and not isinstance(factor, float) else factor)


def _scale_logits(model: ModelConfig, final: Norm | None, state: State) -> None:
    """In the head; a tied one leaves it to the final norm."""
    if not model.tied_head:
        _scale("head", None, model.logit_scale, state)
        return
    _scale("final_norm", final, model.logit_scale, state)
    _multiply(state, "head.bias", model.logit_scale)


def _scale(path: str, norm: Norm | None, factor: "float | Tensor", state: State) -> None:
    """Multiply the output of a norm, or (None) of a linear layer."""
    for name in ("weight", "bias", *(["alpha"] if norm is not None and norm.kind == "seednorm" else [])):
        _multiply(state, f"{path}.{name}", factor)


def _head_scale(path: str, place: str, model: ModelConfig, state: State) -> None:
    if not state:
        return
    scale, weight = state.pop(f"{path}.head_scale"), f"{path}.o.weight"
    if place == "pre_projection":
        state[weight] = state[weight] * scale.repeat_interleave(model.hd)[None, :]
        return
    rows = scale.repeat_interleave(model.width // model.heads)
    state[weight] = state[weight] * rows[:, None]
    _multiply(state, f"{path}.o.bias", rows)


def _multiply(state: State, name: str, factor: "float | Tensor") -> None:
    if name in state:
        state[name] = state[name] * factor
