"""Exact rewrites that make a model plainer, so that more of them fit a class of transformers.

Constants and learned factors that stand next to a matrix or a gain move into it: scales of norms, factors on branches,
head scales, the embedding scale of an untied model. What is computed stays the same up to rounding.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from megnorm.models.config import ModelConfig
from megnorm.norms.resolve import Resolved
from megnorm.norms.scheme import Attention, Layer, Norm, Scale

if TYPE_CHECKING:
    from torch import Tensor

State = dict[str, "Tensor"]
_ATTENTION = ("input", "output", "post", "q", "k", "v", "context")
SITES = {"attention": _ATTENTION, "cross_attention": _ATTENTION, "ffn": ("input", "output", "post", "inner")}
LAST = {"attention": "o", "cross_attention": "o", "ffn": "down"}
INVARIANT = ("layernorm", "rmsnorm")
"""Kinds that undo a factor on their input, up to eps."""


def stacks(resolved: Resolved) -> list[tuple[str, Resolved]]:
    """Each stack with what the names of its tensors begin with."""
    if resolved.encoder is None:
        return [("", resolved)]
    return [("encoder.", resolved.encoder), ("decoder.", replace(resolved, encoder=None))]


def parts(path: str, layer: Layer) -> dict[str, Any]:
    """The sub-layers of a layer of the stack ``path`` by name."""
    found = {"attention": layer.attention, "ffn": layer.ffn}
    return found | {"cross_attention": layer.cross_attention or layer.attention} if path == "decoder." else found


def fold(
    model: ModelConfig, resolved: Resolved, state: Mapping[str, "Tensor"] | None = None
) -> tuple[ModelConfig, Resolved, State]:
    """The plainest equal model: gains as vectors, no scales that a matrix or gain can carry.

    state: full logical tensors by canonical name; None folds the declaration alone. The input is not changed.
    """
    made: State = dict(state or {})
    plain = resolved
    for path, stack in stacks(resolved):
        layers = tuple(_layer(path, i, layer, model, made) for i, layer in enumerate(stack.layers))
        embedding = _norm(f"{path}embed.norm", stack.embedding, model.width, made)
        final = _norm(f"{path}final_norm", stack.final, model.width, made)
        stack = replace(stack, layers=layers, embedding=embedding, final=final)
        plain = replace(plain, encoder=stack) if path == "encoder." else replace(stack, encoder=plain.encoder)
    scale = embedding_scale(model)
    if scale != 1.0 and not model.tied_head:
        for path in ("", "encoder.", "decoder."):
            _multiply(made, f"{path}embed.token.weight", scale)
        model = replace(model, embedding_scale=1.0)
    if model.logit_scale != 1.0 and not (model.tied_head and (plain.final is None or model.head_transform)):
        _scale_logits(model, plain, made)
        model = replace(model, logit_scale=1.0)
    return model, plain, made


def fold_skip(resolved: Resolved, state: Mapping[str, "Tensor"] | None = None) -> tuple[Resolved, State]:
    """N(a r + y) as N(r + y / a) with eps / a^2, in every sub-layer that has a constant skip and a post norm."""
    made: State = dict(state or {})
    plain = resolved
    for path, stack in stacks(resolved):
        layers = []
        for i, layer in enumerate(stack.layers):
            for part, sub in parts(path, layer).items():
                skip, post = sub.residual.skip, sub.post
                free = skip.learned is None and not (sub.residual.layer_input or sub.residual.gate)
                free = free and sub.residual.source == "stream"
                if skip.value == 1.0 or skip.value <= 0 or not free or post is None or post.kind not in INVARIANT:
                    continue
                _scale_branch(f"{path}blocks.{i}.{part}", LAST[part], sub.output, 1.0 / skip.value, made)
                post = replace(post, eps=post.eps / skip.value**2)
                sub = replace(sub, post=post, residual=replace(sub.residual, skip=Scale()))
                layer = replace(layer, **{part: sub})
            layers.append(layer)
        stack = replace(stack, layers=tuple(layers))
        plain = replace(plain, encoder=stack) if path == "encoder." else replace(stack, encoder=plain.encoder)
    return plain, made


def fold_scores(
    model: ModelConfig, resolved: Resolved, state: Mapping[str, "Tensor"]
) -> tuple[ModelConfig, dict[str, "Tensor"]]:
    """The factor on scores as 1 / sqrt(head_dim), the rest of it in W_q or in the (folded) norm behind it."""
    made: State = dict(state)
    if model.attention.scale is None:
        return model, made
    factor = model.attention.scale * model.hd**0.5
    for path, stack in stacks(resolved):
        for i, layer in enumerate(stack.layers):
            for part, sub in parts(path, layer).items():
                if isinstance(sub, Attention):
                    name = f"{path}blocks.{i}.{part}.q" + ("" if sub.q is None else "_norm")
                    _scale(name, sub.q, factor, made)
    return replace(model, attention=replace(model.attention, scale=None)), made


def embedding_scale(model: ModelConfig) -> float:
    """The factor on token embeddings as a number."""
    return model.width**0.5 if model.embedding_scale == "sqrt_width" else float(model.embedding_scale)


def _layer(stack: str, i: int, layer: Layer, model: ModelConfig, state: State) -> Layer:
    sizes, path = {"q": model.heads, "k": model.kv, "v": model.kv, "context": model.heads}, f"{stack}blocks.{i}"
    shared = {name: state.get(f"{path}.attention.residual.{name}") for name in ("skip", "branch")}
    changes: dict[str, Any] = {}
    for part, sub in parts(stack, layer).items():
        here, norms = f"{path}.{part}", {}
        for site in SITES[part]:
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
        if isinstance(sub, Attention) and sub.head_scale is not None:
            _head_scale(here, sub.head_scale, model, state)
            sub = replace(sub, head_scale=None)
        changes[part] = sub
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


def _scale_logits(model: ModelConfig, resolved: Resolved, state: State) -> None:
    """In the head; a tied one leaves it to the final norm."""
    if not model.tied_head:
        _scale("head", None, model.logit_scale, state)
        return
    path, last = stacks(resolved)[-1]
    _scale(f"{path}final_norm", last.final, model.logit_scale, state)
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
