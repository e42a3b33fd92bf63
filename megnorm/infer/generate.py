"""Continue token sequences, from an exported folder or from a run, with a key/value cache."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megnorm.hf import custom
from megnorm.hf.families.rope import longest_input
from megnorm.hf.native import read_native
from megnorm.hf.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. temperature 0 is greedy. top_k 0, top_p 1: all tokens. count: sequences a prompt."""

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.count < 1:
            raise ValueError("max_new_tokens and count must be at least 1")
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError("temperature and top_k must not be negative, and top_p lies in (0, 1]")
        if self.temperature == 0 and self.count > 1:
            raise ValueError("count must be 1 with temperature 0: greedy continuations are all the same")


@dataclass(frozen=True)
class Generator:
    """A model that transformers can run, its tokenizer if there is one, and where both came from."""

    model: Any
    tokenizer: Any | None
    source: Path


def load(
    source: Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu", tokenizer: Path | None = None
) -> Generator:
    """An exported folder, a run folder or a checkpoint. Raises ValueError.

    A run's weights go into the class that exports ship (hf/modeling_megnorm.py), so there is one decoder with a cache.
    No code from the folder is executed: a folder of that class is read by the one of this package.
    """
    if (source / "config.json").is_file():
        model = _exported(source, dtype)
        place = tokenizer or (source if (source / "tokenizer.json").is_file() else None)
    else:
        run = read_native(source)
        _require_causal(source, custom.architecture(run.model.family))
        model = custom.build(run.state, run.model, run.resolved, dtype=dtype)
        place = tokenizer or (Path(run.tokenizer) if run.tokenizer else None)
    return Generator(model.to(device).eval(), None if place is None else load_tokenizer(place), source)


def _exported(folder: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    from megnorm.hf.modeling_megnorm import MegnormForCausalLM

    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    _require_causal(folder, (fields.get("architectures") or [""])[0])
    cls = MegnormForCausalLM if fields.get("model_type") == "megnorm" else AutoModelForCausalLM
    return cls.from_pretrained(folder, dtype=dtype, local_files_only=True, trust_remote_code=False)


def _require_causal(source: Path, architecture: str) -> None:
    """Else transformers' door to causal models would take some encoders too, and they would say anything."""
    if custom.door(architecture) != custom.CLASSES["causal"][0]:
        raise ValueError(f"{source}: a {architecture} does not continue texts; give a model of model.family=causal")


def generate(generator: Generator, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
    """New tokens, ``count`` sequences for each prompt in turn, ended after the end token if there is one.

    Raises ValueError for an empty prompt, an unknown token, or more tokens than the model takes.
    """
    config = generator.model.config
    _check(prompts, config, sampling)
    end = _end_ids(generator)
    filler = end[0] if end else 0
    longest = max(len(prompt) for prompt in prompts)
    # Prompts of several lengths are padded on the left, so that every row goes on at the same place.
    ids = torch.tensor([[filler] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    device = generator.model.device
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(sampling.seed)
        out = generator.model.generate(
            ids.to(device),
            attention_mask=mask.to(device),
            generation_config=_options(sampling, end, filler),
        )
    return [_until(row[longest:].tolist(), end) for row in out]


def _options(sampling: Sampling, end: list[int], filler: int) -> Any:
    from transformers import GenerationConfig

    common = {"max_new_tokens": sampling.max_new_tokens, "eos_token_id": end or None, "pad_token_id": filler}
    if sampling.temperature == 0:
        return GenerationConfig(**common, do_sample=False)
    return GenerationConfig(
        **common,
        do_sample=True,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        num_return_sequences=sampling.count,
    )


def _end_ids(generator: Generator) -> list[int]:
    found = generator.tokenizer.eos_token_id if generator.tokenizer is not None else None
    found = generator.model.generation_config.eos_token_id if found is None else found
    return [] if found is None else list(found) if isinstance(found, list) else [found]


def _until(tokens: list[int], end: list[int]) -> list[int]:
    for i, token in enumerate(tokens):
        if token in end:
            return tokens[: i + 1]
    return tokens


def _check(prompts: Sequence[Sequence[int]], config: Any, sampling: Sampling) -> None:
    if not prompts:
        raise ValueError("there is no prompt; give at least one")
    for prompt in prompts:
        if not prompt:
            raise ValueError("the prompt is empty; give at least one token")
        wrong = [token for token in prompt if not 0 <= token < config.vocab_size]
        if wrong:
            raise ValueError(f"token {wrong[0]} is outside the vocabulary of {config.vocab_size} tokens")
    length, longest = max(map(len, prompts)) + sampling.max_new_tokens, longest_input(config)
    if longest is not None and length > longest:
        raise ValueError(
            f"prompt and new tokens make {length} positions and the model takes {longest}; ask for fewer new tokens"
        )
