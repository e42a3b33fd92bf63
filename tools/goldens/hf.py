"""Goldens that are Hugging Face folders, read by megnorm's own import: its config, and its names for weights and gradients."""

import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from goldens.case import NEUTRAL, SINGLE, Case, NotCovered, Tolerance, field, take
from megnorm.hf.convert import Imported, from_hf
from megnorm.hf.families.base import UNREAD
from megnorm.hf.families.registry import FAMILIES, by_model_type


def case(folder: Path) -> Case:
    """The golden in a folder. Raises NotCovered for a class that megnorm does not import, ValueError for a broken file."""
    config = _read(folder / "config.json")
    kind = field(config, "model_type")
    if kind not in {family.name for family in FAMILIES}:
        raise NotCovered(f"megnorm does not import model_type '{kind}'")
    try:
        tensors = load_file(folder / "golden.safetensors")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"golden.safetensors cannot be read: {error}") from None
    found = from_hf(folder)
    pairs = found.model.family == "encdec"
    mask = tensors.get("input/source_attention_mask" if pairs else "input/attention_mask")
    real = None if mask is None else mask.bool()
    return Case(
        model=found.model,
        dtype=torch.float64,
        tokens=take(tensors, "input/ids"),
        labels=take(tensors, "input/targets"),
        weights=_trained(found),
        grads=_trained(_gradients(folder, tensors)),
        logits=take(tensors, "output/logits"),
        loss=float(take(tensors, "output/loss")),
        tolerance=_tolerance(kind, balanced=found.model.moe.balance_loss > 0),
        logits_relative=True,
        source=take(tensors, "input/source_ids") if pairs else None,
        real=real,
        segments=tensors.get("input/token_type_ids"),
        seen=None if pairs else real,  # what the class computes at padding is nobody's business
    )


def _tolerance(kind: str, *, balanced: bool) -> Tolerance:
    """Two things of the reference stayed in fp32 when the rest ran in fp64: GPT-J's rotary angles, and the sums of a balance
    loss."""
    if kind == "gptj":
        return SINGLE
    return replace(NEUTRAL, loss=SINGLE.loss) if balanced else NEUTRAL


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file.name} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file.name} holds no fields")
    return found


def _gradients(folder: Path, tensors: dict[str, Tensor]) -> Imported:
    """Gradients, imported as if they were weights: the import only names, splits, turns and cuts."""
    found = {name.removeprefix("grad/"): x for name, x in tensors.items() if name.startswith("grad/")}
    config = _read(folder / "config.json")
    names = by_model_type(config["model_type"], (config.get("architectures") or [""])[0]).names
    grads = dict(_by_expert(found, names)) if "blocks.{i}.ffn.router" in names else found
    grads = {name: grad.contiguous() for name, grad in grads.items()}
    with tempfile.TemporaryDirectory() as place:
        shutil.copy(folder / "config.json", place)
        save_file(grads, Path(place) / "model.safetensors", metadata={"format": "pt"})
        return from_hf(Path(place))


def _by_expert(grads: Mapping[str, Tensor], names: Mapping[str, str]) -> Iterator[tuple[str, Tensor]]:
    """As the weights of a folder are named: the running class has the experts of a layer in one tensor, gate above up."""
    for name, grad in grads.items():
        fused = re.fullmatch(
            r"model\.layers\.(\d+)\.mlp\.(gate\.weight|experts\.gate_up_proj|experts\.down_proj)", name
        )
        if fused is None:
            yield name, grad
            continue
        block = "blocks.{i}.ffn."
        if fused[2] == "gate.weight":
            yield names[f"{block}router"].format(i=fused[1]) + ".weight", grad
            continue
        roles = ("gate", "up") if fused[2].endswith("gate_up_proj") else ("down",)
        for e, expert in enumerate(grad):
            for role, part in zip(roles, expert.chunk(len(roles)), strict=True):
                yield names[f"{block}experts.{{e}}.{role}"].format(i=fused[1], e=e) + ".weight", part


def _trained(found: Imported) -> dict[str, Tensor]:
    """Without the rows of a position table that no token has."""
    return {name: tensor for name, tensor in found.state.items() if name != UNREAD}
