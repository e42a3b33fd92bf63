"""A trained model as megnorm keeps it: read from a run, run forward, written back as a checkpoint."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megnorm import config as configs
from megnorm.checkpoint import io
from megnorm.models.config import ModelConfig
from megnorm.norms.resolve import Resolved, from_json


@dataclass(frozen=True)
class Native:
    """A checkpoint's model: config, resolved scheme, full fp32 weights by canonical name, and where it came from."""

    model: ModelConfig
    resolved: Resolved
    state: Mapping[str, Tensor]
    tokenizer: str | None
    path: Path


def read_native(source: Path) -> Native:
    """The newest checkpoint of a run folder, or one checkpoint's folder. Raises ValueError where there is none."""
    path = checkpoint_of(source)
    record = io.read_meta(path)
    for key in ("config", "resolved"):
        if key not in record:
            raise ValueError(f"{path / 'meta.json'} has no '{key}'; it was not written by megnorm train or convert")
    config = configs.from_dict(record["config"], f"{path / 'meta.json'}: config")
    if config.model.family != "causal":
        raise ValueError(
            f"{path}: model.family={config.model.family} can be trained and evaluated, but only a causal model can be "
            "exported or generate; give the run of one"
        )
    names = [name for name in io.available(path) if not name.startswith("optim.")]
    state = {name: tensor.float() for name, tensor in io.read_full(path, names).items()}
    return Native(config.model, from_json(record["resolved"]), state, config.data.tokenizer, path)


def checkpoint_of(source: Path) -> Path:
    """The checkpoint that a path means: itself, or the newest whole one of a run or of its checkpoints folder."""
    if (source / "manifest.json").is_file():
        return source
    for folder in (source / "checkpoints", source):
        found = io.latest(folder) if folder.is_dir() else None
        if found is not None:
            return found
    raise ValueError(f"{source}: no checkpoint there; give a run folder (train.out), or one of its checkpoints")


def native_forward(
    state: Mapping[str, Tensor], model: ModelConfig, resolved: Resolved, *, dtype: torch.dtype = torch.float32
) -> Callable[[Tensor], Tensor]:
    """megnorm's own forward with these weights on the CPU: tokens [b, s] -> logits [b, s, v]."""
    from megnorm.layers.env import Env
    from megnorm.models.causal import CausalLM
    from megnorm.parallel.layout import named_matrices

    made = CausalLM(model, resolved, model.vocab_size, Env(dtype=dtype)).eval()
    with torch.no_grad():
        for named in named_matrices(made):
            named.view().copy_(state[named.name])

    def forward(tokens: Tensor) -> Tensor:
        return made.logits(tokens.t()).transpose(0, 1)

    return forward


def write_native(
    out: Path, model: ModelConfig, resolved: Resolved, state: Mapping[str, Tensor], *, tokenizer: str | None = None
) -> Path:
    """Weights as the checkpoint of step 0 of a run folder, with a config.yaml to start from; the checkpoint's path."""
    if (out / "checkpoints").exists():
        raise ValueError(f"{out}: it holds checkpoints already; choose another folder")
    config = configs.RunConfig(model=model)
    config = replace(config, data=replace(config.data, tokenizer=tokenizer), train=replace(config.train, out=str(out)))
    record: dict[str, Any] = {"step": 0, "config": configs.to_dict(config), "resolved": resolved.to_json()}
    shards = [io.Shard.whole(name, tensor.detach().float().contiguous()) for name, tensor in state.items()]
    path = io.save(out / "checkpoints", 0, shards, record)
    configs.save(config, out / "config.yaml")
    return path
