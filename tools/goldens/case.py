"""One golden, whatever its format: a model's config, its weights by canonical name, and what the reference computed."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megnorm.config import RunConfig, from_dict, to_dict
from megnorm.models.config import ModelConfig
from megnorm.models.family import resolve_model
from megnorm.norms import registry
from megnorm.norms.config import NormConfig
from megnorm.norms.resolve import scheme_of
from megnorm.refuse import check_model, check_scheme


class NotCovered(Exception):
    """A golden of a documented kind that megnorm does not build yet; the message says which kind."""


@dataclass(frozen=True)
class Tolerance:
    """Largest errors that pass; Errors in run.py says what each is relative to."""

    logits: float
    loss: float
    gradient: float


NEUTRAL = Tolerance(logits=1e-10, loss=1e-10, gradient=1e-6)
SINGLE = Tolerance(logits=1e-7, loss=1e-7, gradient=1e-6)
FRONTIER = Tolerance(logits=2e-4, loss=2e-4, gradient=1e-3)


@dataclass(frozen=True)
class Case:
    """tokens, labels [b, s] int64, labels -100 where nothing is predicted; weights, grads: by canonical name, global.

    logits [b, s, v], loss (mean over predicted tokens): the reference's. logits_relative: errors of logits and loss are
    relative to max(1, largest magnitude), else absolute. zero: parameters that the reference lacks and that are zero
    here, so that they change nothing; their gradients are not compared. table: the reference's position table, or None.
    source [b, s']: of an encoder-decoder. real [b, s] bool: False at padding of an encoder's tokens; None: there is none.
    segments [b, s]: token types. seen [b, s] bool: where logits are compared; None: everywhere.
    step: the optimizer step that it is, for factors that move.
    """

    model: ModelConfig
    dtype: torch.dtype
    tokens: Tensor
    labels: Tensor
    weights: Mapping[str, Tensor]
    grads: Mapping[str, Tensor]
    logits: Tensor
    loss: float
    tolerance: Tolerance
    logits_relative: bool
    zero: frozenset[str] = frozenset()
    table: Tensor | None = None
    source: Tensor | None = None
    real: Tensor | None = None
    segments: Tensor | None = None
    seen: Tensor | None = None
    step: int = 0


def find(folder: Path) -> Iterator[Path]:
    """Every golden under ``folder``, sorted: NAME.json of a pair NAME.json and NAME.safetensors, or an HF folder.

    Half a pair is a golden too (one that cannot be read): tensors without json, or a json that lists tensors that are
    not there. Other files, such as statistics, are no goldens.
    """
    found: set[Path] = set()
    for path in folder.rglob("*"):
        home = path.parent
        if (home / "golden.json").exists() and (home / "config.json").exists():
            found.add(home)
        elif path.suffix == ".safetensors" or (path.suffix == ".json" and _describes_tensors(path)):
            found.add(path.with_suffix(".json"))
    yield from sorted(found)


def _describes_tensors(path: Path) -> bool:
    try:
        data = json.loads(path.read_text())
    except (ValueError, OSError):
        return path.with_suffix(".safetensors").exists()
    return isinstance(data, dict) and "loss" in data and ("tensors" in data or "shapes" in data)


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The json and the tensors of a pair. Raises ValueError naming the file that is missing or broken."""
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"there is no {path.name} beside the tensors") from None
    except ValueError as error:
        raise ValueError(f"{path.name} is no JSON: {error}") from None
    if not isinstance(data, dict) or not isinstance(data.get("config"), dict):
        raise ValueError(f"{path.name} has no 'config'")
    file = path.with_suffix(".safetensors")
    try:
        with safe_open(file, "pt") as opened:
            return data, {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise ValueError(f"there is no {file.name} beside the json") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file.name} cannot be read: {error}") from None


def take(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """A tensor by name. Raises ValueError if the golden lacks it."""
    if name not in tensors:
        raise ValueError(f"the tensor '{name}' is missing")
    return tensors[name]


def field(config: Mapping[str, Any], name: str) -> Any:
    """A key of a golden's json. Raises ValueError if it is missing."""
    if name not in config:
        raise ValueError(f"config.{name} is missing")
    return config[name]


def choose(table: Mapping[str, str], word: Any, key: str) -> str:
    """megnorm's word for a golden's: the part before a remark in brackets. Raises ValueError for an unknown one."""
    plain, _, remark = str(word).partition(" (")
    plain = f"{plain.strip()}_tanh" if "tanh" in remark else plain.strip()
    if plain not in table:
        raise ValueError(f"config.{key}: '{word}' is not a documented value; known are {', '.join(table)}")
    return table[plain]


def with_ends(norm: NormConfig, *, embedding: bool, final: bool) -> NormConfig:
    """``norm`` with or without a norm on the embedding and before the head: by the scheme's option, else by a patch."""
    options, patch = dict(norm.options), dict(norm.patch)
    for site, wanted in (("embedding", embedding), ("final", final)):
        if (getattr(scheme_of(norm), site) is not None) == wanted:
            continue
        if f"{site}_norm" in registry.options(norm.scheme):
            options[f"{site}_norm"] = wanted
        else:
            patch[site] = {} if wanted else None
    return NormConfig(**{**_shallow(norm), "options": options, "patch": patch})


def with_defaults(norm: NormConfig, **defaults: Any) -> NormConfig:
    """``norm`` with what its norms are made of: kind, gain, bias, eps."""
    return NormConfig(**{**_shallow(norm), **defaults})


def _shallow(norm: NormConfig) -> dict[str, Any]:
    return {name: getattr(norm, name) for name in NormConfig.__dataclass_fields__}


def to_yaml(model: ModelConfig) -> str:
    """A config as the text a run would be given."""
    return yaml.safe_dump({"model": to_dict(RunConfig(model=model))["model"]}, sort_keys=False)


def from_yaml(text: str) -> ModelConfig:
    """The inverse of ``to_yaml``, checked as a run's config is."""
    model = from_dict(yaml.safe_load(text), "golden").model
    check_model(model)
    check_scheme(model, resolve_model(model))
    return model
