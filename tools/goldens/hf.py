"""Goldens that are Hugging Face folders, read by megnorm's own import: its config, and its names for weights and gradients."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from goldens.case import NEUTRAL, SINGLE, Case, NotCovered, field, take
from megnorm.hf.convert import Imported, from_hf
from megnorm.hf.families.base import UNREAD
from megnorm.hf.families.registry import FAMILIES

FP32_ANGLES = ("gptj",)
"""Classes whose rotary angles were left in fp32 when the rest of the reference ran in fp64."""


def case(folder: Path) -> Case:
    """The golden in a folder. Raises NotCovered for a class that megnorm does not import, ValueError for a broken file."""
    config = _read(folder / "config.json")
    kind = field(config, "model_type")
    if kind not in {family.name for family in FAMILIES}:
        raise NotCovered(f"megnorm does not import model_type '{kind}'")
    if config.get("router_aux_loss_coef"):
        raise NotCovered("one balance loss of all layers together")
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
        tolerance=SINGLE if kind in FP32_ANGLES else NEUTRAL,
        logits_relative=True,
        source=take(tensors, "input/source_ids") if pairs else None,
        real=real,
        segments=tensors.get("input/token_type_ids"),
        seen=None if pairs else real,  # what the class computes at padding is nobody's business
    )


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
    grads = {name.removeprefix("grad/"): x.contiguous() for name, x in tensors.items() if name.startswith("grad/")}
    with tempfile.TemporaryDirectory() as place:
        shutil.copy(folder / "config.json", place)
        save_file(grads, Path(place) / "model.safetensors", metadata={"format": "pt"})
        return from_hf(Path(place))


def _trained(found: Imported) -> dict[str, Tensor]:
    """Without the rows of a position table that no token has."""
    return {name: tensor for name, tensor in found.state.items() if name != UNREAD}
