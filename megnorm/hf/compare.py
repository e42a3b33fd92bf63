"""The last step of an export: the written folder is loaded as its user will, and must say what the model says."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megnorm.hf import custom
from megnorm.hf.families.rope import longest_input

Reference = Callable[..., Tensor]
"""Called with tokens [b, s] int64, and by name with what else ``random_inputs`` gives -> logits [b, s, v] or [b, classes]."""


class LogitMismatch(ValueError):
    """The exported folder computes something else than the model; nothing was left under the final name."""


def difference(
    reference: Reference,
    folder: Path,
    length: int = 64,
    *,
    passing: bool = False,
    dtype: torch.dtype = torch.float32,
) -> tuple[float, float]:
    """Largest |difference| and largest |logit| on random tokens; every tensor of the folder must have been used.

    passing: the folder's name is; transformers is made to forget the code that it read there. dtype: what the folder is
    loaded in; the reference's is its own.
    """
    loaded, info = _load(folder, dtype)
    try:
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if info[kind]:
                raise LogitMismatch(
                    f"{folder}: {kind.replace('_', ' ')}: {', '.join(map(str, sorted(info[kind])[:3]))}"
                )
        return _compare(reference, loaded, folder, length)
    finally:
        if passing:
            _forget_code(loaded)


def _load(folder: Path, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """The model as its user gets it, and what was said about its tensors."""
    import transformers
    from transformers.utils import logging

    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True, local_files_only=True)
    door = getattr(transformers, custom.door(config.architectures[0]))
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        answer: tuple[Any, dict[str, Any]] = door.from_pretrained(
            folder, trust_remote_code=True, dtype=dtype, local_files_only=True, output_loading_info=True
        )
        return answer
    finally:
        if bars:
            logging.enable_progress_bar()


def _compare(reference: Reference, loaded: Any, folder: Path, length: int) -> tuple[float, float]:
    inputs = random_inputs(loaded.config, custom.door(loaded.config.architectures[0]), length)
    rest = {name: tensor for name, tensor in inputs.items() if name != "input_ids"}
    with torch.no_grad():
        ours = reference(inputs["input_ids"], **rest).detach().cpu()
        ours = ours.to(torch.promote_types(ours.dtype, torch.float32))
        theirs = loaded.eval()(**inputs).logits
    if ours.shape != theirs.shape:
        raise LogitMismatch(f"{folder}: logits of shape {tuple(theirs.shape)}, the model's are {tuple(ours.shape)}")
    if ours.dim() == 3 and "attention_mask" in inputs and "decoder_input_ids" not in inputs:
        real = inputs["attention_mask"].bool()  # what stands at padding is nobody's business
        ours, theirs = ours[real], theirs[real]
    return (ours - theirs).abs().max().item(), ours.abs().max().item()


def _forget_code(model: Any) -> None:
    """Delete the copy of a folder's code that transformers keeps in its cache under the folder's passing name."""
    module = type(model).__module__
    if module.startswith("transformers_modules."):
        _, folder, *_ = module.split(".")  # inside, a package for the config and one for the model
        for path in sys.modules["transformers_modules"].__path__:
            shutil.rmtree(Path(path, folder), ignore_errors=True)
        for name in [name for name in sys.modules if f"{name}.".startswith(f"transformers_modules.{folder}.")]:
            del sys.modules[name]


def random_inputs(config: Any, door: str, length: int = 64) -> dict[str, Tensor]:
    """What a model of transformers is called with: tokens alone, or rows of which one is padded, and a decoder's tokens."""
    tokens = random_tokens(config, length=length)
    if door == custom.CLASSES["causal"][0]:
        return {"input_ids": tokens}
    padding, cut = _padding(config), 1 + tokens.shape[1] // 2
    mask = torch.ones_like(tokens)
    mask[1, cut:] = 0
    if padding is not None:
        tokens[mask == 0] = padding
        mask = (tokens != padding).long()
    inputs = {"input_ids": tokens, "attention_mask": mask}
    kinds: int = getattr(config, "type_vocab_size", 0) or getattr(config, "segments", 0)
    if kinds > 1:
        inputs["token_type_ids"] = (torch.arange(tokens.shape[1]) // 3 % kinds).expand_as(tokens)
    if door == custom.CLASSES["encdec"][0]:
        inputs["decoder_input_ids"] = random_tokens(config, length=max(1, length - 1), seed=1)
    return inputs


def random_tokens(config: Any, *, batch: int = 2, length: int = 64, seed: int = 0) -> Tensor:
    """Tokens [batch, length] for comparisons; rows do not begin with padding."""
    generator = torch.Generator().manual_seed(seed)
    longest = longest_input(config) or length
    tokens = torch.randint(config.vocab_size, (batch, min(length, longest)), generator=generator)
    padding = _padding(config)
    if padding is not None:
        tokens[:, 0] = (padding + 1) % config.vocab_size
    return tokens


def _padding(config: Any) -> int | None:
    """The token that has no position."""
    if config.model_type == "roberta":
        return int(config.pad_token_id)
    found: int | None = getattr(config, "position_padding_id", None)
    return found
