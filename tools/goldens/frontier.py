"""The frontier format: ``param.<reference name>``, ``grad.<reference name>``, ``input_ids``, ``logits``, ``loss``.

Reference names are the repositories' own, so that there is a reader for each family: Llama forms, and x-transformers.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from goldens import llama, mixed, siamese, xtransformers
from goldens.case import FRONTIER, Case, NotCovered, take

LOSS = "mean cross entropy of logits[:, :-1] against input_ids[:, 1:]"


def case(data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Case:
    """A frontier golden. Raises NotCovered, or ValueError if it says something the format does not document."""
    _refuse(data, tensors)
    if "streams" in data["config"]:
        return mixed.case(data, tensors)
    if data.get("loss_definition", LOSS) != LOSS:
        raise ValueError(f"loss_definition: '{data['loss_definition']}' is not documented for language models")
    params = {name.removeprefix("param."): value for name, value in tensors.items() if name.startswith("param.")}
    if "norm_type" in data:
        model, rename = llama.model(data, params), llama.renaming(data)
    elif "num_tokens" in data["config"]:
        model, rename = xtransformers.model(data, params), xtransformers.renaming(data)
    elif "attn_residual_after_norm" in data["config"]:
        model, rename = siamese.model(data, params), siamese.rename
    else:
        raise ValueError("config: neither a Llama form (norm_type) nor x-transformers (config.num_tokens)")
    frozen = set(data.get("params_without_grad", ()))
    weights: dict[str, Tensor] = {}
    grads: dict[str, Tensor] = {}
    for name, value in params.items():
        grad = torch.zeros_like(value) if name in frozen else take(tensors, f"grad.{name}")
        for part in rename(name):
            if part.name in weights:
                raise ValueError(f"two parameters of the golden are '{part.name}'")
            weights[part.name], grads[part.name] = part.weight(value), part.select(grad)
    tokens = take(tensors, "input_ids")
    return Case(
        model=model,
        dtype=torch.float32,
        tokens=tokens,
        labels=torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], -100)], 1),
        weights=weights,
        grads=grads,
        logits=take(tensors, "logits"),
        loss=float(take(tensors, "loss")),
        tolerance=FRONTIER,
        logits_relative=False,
        step=int(data.get("schedule", {}).get("t", 0)),
        zero=xtransformers.absent_biases(model, weights) if "num_tokens" in data["config"] else frozenset(),
    )


def _refuse(data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    config = data["config"]
    if "patch" in config:
        raise NotCovered("a vision model")
    if "base_scale" in config and "param.sz" in tensors:
        raise NotCovered("weights projected after each step")
    if config.get("add_value_residual"):
        raise NotCovered("value residual")
