"""Tiny models with random weights, gains and biases included, so that a misplaced one shows."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megnorm.hf import custom
from megnorm.models.config import ModelConfig, RopeScaling
from megnorm.models.family import resolve_model
from megnorm.norms.config import NormConfig
from megnorm.norms.resolve import Resolved, settled

SIZES: dict[str, Any] = {"layers": 3, "width": 16, "heads": 4, "kv_heads": 2, "ffn": 24, "vocab_size": 61}

SCALINGS = [
    RopeScaling("linear", 4.0),
    RopeScaling("dynamic", 4.0, original=16),
    RopeScaling("yarn", 4.0, original=64),
    RopeScaling("yarn", 4.0, 64, attention_factor=1.3, beta_fast=4.0, beta_slow=0.5, truncate=False),
    RopeScaling("llama3", 8.0, original=32),
]


def tiny(scheme: str, kind: str = "rmsnorm", *, norm: dict[str, Any] | None = None, **changes: Any) -> ModelConfig:
    """rmsnorm: rotary, gated, untied. layernorm: learned positions, plain, tied, biases."""
    options: dict[str, Any] = {**SIZES, "max_positions": 48}
    if kind == "layernorm":
        options |= {"positions": "learned", "activation": "gelu", "bias": True, "tied_head": True}
    return ModelConfig(**options | {"norm": NormConfig(scheme, kind=kind, **norm or {})} | changes)  # type: ignore[arg-type]


def random_state(model: ModelConfig, resolved: Resolved, seed: int = 2) -> dict[str, Tensor]:
    """Full logical tensors of such a model: matrices small, gains and scales around 1, the rest around 0.

    In the order of their names, so that numbers do not depend on the order in which a class makes its modules.
    """
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in sorted(custom.shapes(model, resolved).items()):
        noise = torch.randn(shape, generator=generator)
        around_one = name.endswith(("norm.weight", "head_scale", "residual.skip", "residual.branch"))
        state[name] = 1 + 0.3 * noise if around_one else 0.4 * noise
    return state


def made(scheme: str, kind: str = "rmsnorm", **changes: Any) -> tuple[ModelConfig, Resolved, dict[str, Tensor]]:
    model = tiny(scheme, kind, **changes)
    resolved = settled(resolve_model(model), 700)  # factors that grow are exported as they are
    return model, resolved, random_state(model, resolved)


def tokens(model: ModelConfig, batch: int = 2, length: int = 11, seed: int = 1) -> Tensor:
    return torch.randint(model.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def reload(folder: Path, **options: Any) -> Any:
    """What a user gets from transformers."""
    import transformers

    architecture = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    return (
        getattr(transformers, custom.door(architecture))
        .from_pretrained(folder, trust_remote_code=True, **options)
        .eval()
    )
