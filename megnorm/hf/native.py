"""A trained model as megnorm keeps it: read from a run, run forward, written back as a checkpoint."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megnorm import config as configs
from megnorm.checkpoint import io
from megnorm.hf.tokenizer import SpecialIds
from megnorm.models.config import ModelConfig
from megnorm.models.family import TASKS
from megnorm.norms.resolve import Resolved, from_json, settled


@dataclass(frozen=True)
class Native:
    """A checkpoint's model: config, resolved scheme, full fp32 weights by canonical name, and where it came from.

    ids: of an encoder-decoder the tokens that its decoder begins with and that its rows were padded with.
    """

    model: ModelConfig
    resolved: Resolved
    state: Mapping[str, Tensor]
    tokenizer: str | None
    path: Path
    ids: SpecialIds = SpecialIds()


def read_native(source: Path) -> Native:
    """The newest checkpoint of a run folder, or one checkpoint's folder. Raises ValueError where there is none."""
    path = checkpoint_of(source)
    record = read_record(path)
    config = configs.from_dict(record["config"], f"{path / 'meta.json'}: config")
    names = [name for name in io.available(path) if not name.startswith("optim.")]
    state = {name: tensor.float() for name, tensor in io.read_full(path, names).items()}
    data, ids = config.data, SpecialIds()
    if config.model.family == "encdec":
        ids = SpecialIds(pad=data.pad, start=data.pad if data.start is None else data.start)
    return Native(
        config.model, settled(from_json(record["resolved"]), record["step"]), state, data.tokenizer, path, ids
    )


def read_record(path: Path) -> dict[str, Any]:
    """What a checkpoint says of its model. Raises ValueError where that is not all there."""
    record: dict[str, Any] = io.read_meta(path)
    for key in ("config", "resolved", "step"):
        if key not in record:
            raise ValueError(f"{path / 'meta.json'} has no '{key}'; it was not written by megnorm train or convert")
    return record


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
) -> Callable[..., Tensor]:
    """megnorm's own forward with these weights on the CPU, called as the exported class is: tokens [b, s], and by name
    attention_mask, token_type_ids [b, s], decoder_input_ids [b, t] -> logits [b, s, v], or [b, classes]."""
    from megnorm.layers.env import Env
    from megnorm.layers.router import biases
    from megnorm.models.build import FAMILIES
    from megnorm.parallel.layout import named_matrices

    made: Any = FAMILIES[model.family](model, resolved, model.vocab_size, Env(dtype=dtype)).eval()
    with torch.no_grad():
        for named in named_matrices(made):
            named.view().copy_(state[named.name])
        for name, bias in biases(made):
            bias.copy_(state[name])

    @torch.no_grad()
    def forward(tokens: Tensor, **rest: Tensor) -> Tensor:
        if model.family == "causal":
            return made.logits(tokens.t()).transpose(0, 1)
        batch = _batch(tokens.t(), **{name: tensor.t() for name, tensor in rest.items()})
        out: Tensor = made.states(batch) if model.family == "classifier" else made.logits(batch).transpose(0, 1)
        return out

    return forward


def _batch(
    tokens: Tensor,
    attention_mask: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    decoder_input_ids: Tensor | None = None,
) -> Any:
    """A micro-batch without labels; all are [s, b]."""
    from megnorm.models.encdec import Pairs
    from megnorm.models.masked import MaskedTokens

    real, said = None if attention_mask is None else attention_mask.bool(), decoder_input_ids
    if said is not None:
        return Pairs(tokens, real, said, said, torch.ones(said.shape))
    return MaskedTokens(tokens, tokens, torch.ones(tokens.shape), real=real, segments=token_type_ids)


def write_native(
    out: Path,
    model: ModelConfig,
    resolved: Resolved,
    state: Mapping[str, Tensor],
    *,
    tokenizer: str | None = None,
    ids: SpecialIds | None = None,
) -> Path:
    """Weights as the checkpoint of step 0 of a run folder, with a config.yaml to start from; the checkpoint's path.

    ids: of padding and of the decoder's first token, where rows are to have others than usual.
    """
    if (out / "checkpoints").exists():
        raise ValueError(f"{out}: it holds checkpoints already; choose another folder")
    config = configs.RunConfig(model=model)
    task: Any = TASKS[model.family][0]
    data = replace(config.data, task=task, tokenizer=tokenizer)
    if ids is not None and model.family != "causal":
        data = replace(data, pad=data.pad if ids.pad is None else ids.pad, start=ids.start)
    train = replace(config.train, out=str(out))
    if model.family == "encdec":  # a bucket of pairs is a micro-batch
        longest = min(data.pairs.longest, model.max_positions, model.source_positions)
        data, train = replace(data, pairs=replace(data.pairs, longest=longest)), replace(train, micro_batch=1)
    config = replace(config, data=data, train=train)
    record: dict[str, Any] = {"step": 0, "config": configs.to_dict(config), "resolved": resolved.to_json()}
    shards = [io.Shard.whole(name, tensor.detach().float().contiguous()) for name, tensor in state.items()]
    path = io.save(out / "checkpoints", 0, shards, record)
    configs.save(config, out / "config.yaml")
    return path
