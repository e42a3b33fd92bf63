"""Models to and from folders that transformers loads."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from megnorm.hf import custom
from megnorm.hf.card import Card, write_card
from megnorm.hf.compare import LogitMismatch, Reference, difference
from megnorm.hf.families.base import Family
from megnorm.hf.families.registry import by_model_type, choose
from megnorm.hf.fold import State, fold, fold_scores
from megnorm.hf.tokenizer import SpecialIds, write_tokenizer
from megnorm.models.config import ModelConfig
from megnorm.models.family import resolve_model
from megnorm.norms.resolve import Resolved

Read = TypeVar("Read")


@dataclass(frozen=True)
class Export:
    """What was written. refused: native classes tried before, and why. difference: largest |logit difference|, precision:
    of which."""

    folder: Path
    architecture: str
    refused: Mapping[str, str] = field(default_factory=dict)
    difference: float | None = None
    precision: str = "fp32"


@dataclass(frozen=True)
class Imported:
    """A folder read back: config, resolved scheme, full logical tensors by canonical name, the class it had, and the special
    tokens that its config names."""

    model: ModelConfig
    resolved: Resolved
    state: State
    architecture: str
    ids: SpecialIds = SpecialIds()


def to_hf(
    state: Mapping[str, Tensor],
    model: ModelConfig,
    resolved: Resolved,
    *,
    out: Path,
    tokenizer: Path | None = None,
    native: bool = True,
    dtype: torch.dtype = torch.float32,
    reference: Reference | None = None,
    exact: Callable[[], Reference] | None = None,
    tolerance: float = 1e-5,
    overwrite: bool = False,
    max_shard_size: str = "5GB",
    card: Card | None = None,
    ids: SpecialIds | None = None,
) -> Export:
    """Write the folder ``out``: weights, config, tokenizer, model card, and code where no native class is exact.

    state: full logical tensors by canonical name. native: a class of transformers where one holds the model exactly.
    reference: the model's own forward; the folder is loaded again and compared in fp32 before it gets its name, and
    LogitMismatch is raised above ``tolerance`` times the largest logit (at least 1). exact: makes the same forward in fp64;
    where fp32 differs by more, which rounding alone may do, fp64 decides. dtype: of the written weights,
    after that comparison. ids: special tokens that the tokenizer does not know. Raises ValueError for tensors that do not fit,
    or an ``out`` that exists without overwrite.
    """
    custom.check_state(state, model, resolved)
    full = {name: tensor.detach().to("cpu", torch.float32) for name, tensor in state.items()}
    family, refused = choose(model, resolved) if native else (None, {})
    fields, tensors = _native(family, full, model, resolved) if family else _custom(full, model, resolved)
    architecture, found, precision = fields["architectures"][0], None, "fp32"
    with _new_folder(out, overwrite) as folder:
        special = SpecialIds(pad=model.padding_id)
        if tokenizer is not None:
            special = write_tokenizer(tokenizer, folder, vocab_size=model.vocab_size, max_length=model.max_positions)
        special = special if ids is None else special.with_(ids)
        _write_config(folder, fields, special, model)
        _write_weights(folder, tensors, max_shard_size)
        if reference is not None:
            length = min(64, model.max_positions, model.source_positions)
            found, precision = _checked(folder, reference, exact, length, tolerance, f"{out}: {architecture}")
        if dtype != torch.float32:
            _write_config(folder, fields | {"dtype": str(dtype).removeprefix("torch.")}, special, model)
            _write_weights(folder, {name: tensor.to(dtype) for name, tensor in tensors.items()}, max_shard_size)
        parameters = sum(tensor.numel() for tensor in state.values())
        write_card(folder, card or Card(), out.name, architecture, model, resolved, parameters)
    return Export(out, architecture, refused, found, precision)


def _checked(
    folder: Path, reference: Reference, exact: Callable[[], Reference] | None, length: int, tolerance: float, what: str
) -> tuple[float, str]:
    """The largest difference, and the precision it was measured in. Raises LogitMismatch if it is too large."""
    found, largest = difference(reference, folder, length, passing=True)
    precision = "fp32"
    if not found <= tolerance * max(1.0, largest) and exact is not None:
        # Rounding, where a model makes much of it, or a difference? A class without fp64 leaves it at the first answer.
        with suppress(RuntimeError):
            found, largest = difference(exact(), folder, length, passing=True, dtype=torch.float64)
            precision = "fp64"
    if not found <= tolerance * max(1.0, largest):
        raise LogitMismatch(
            f"{what} differs from the model by {found:.3g} in a logit, above {tolerance:g} (largest logit {largest:.3g}); "
            "nothing was written, report this with the config"
        )
    return found, precision


def compare_logits(reference: Reference, folder: Path) -> float:
    """Largest |logit difference| in fp32 on random tokens between a forward and the model loaded from ``folder``."""
    return difference(reference, folder)[0]


def from_hf(folder: Path) -> Imported:
    """Read a folder of a family, or one written by ``to_hf``. Raises ValueError for what megnorm cannot express."""
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{file}: there is no such file; give the folder of a Hugging Face model")
    fields = json.loads(file.read_text(encoding="utf-8"))
    tensors = _read_weights(folder)
    if fields.get("model_type") == "megnorm":
        model, resolved = _read_config(file, custom.read_config, fields)
        state = custom.unrename(tensors, model)
        architecture = custom.architecture(model.family)
    else:
        family = by_model_type(
            fields.get("model_type", ""),
            (fields.get("architectures") or [""])[0],
            before=bool(fields.get("do_layer_norm_before", True)),
        )
        model = _read_config(file, family.read_config, dict(family.told(fields, tensors)))
        resolved = resolve_model(model)
        state = family.restore(family.unrename(_tidy(tensors, fields, model), model), model)
        architecture = family.architecture
    if model.tied_head:
        state.pop("head.weight", None)
    custom.check_state(state, model, resolved)
    names = {"pad": "pad_token_id", "start": "decoder_start_token_id"}
    ids = SpecialIds(**{ours: fields[theirs] for ours, theirs in names.items() if isinstance(fields.get(theirs), int)})
    return Imported(model, resolved, state, architecture, ids)


def _read_config(file: Path, read: Callable[[dict[str, Any]], Read], fields: dict[str, Any]) -> Read:
    try:
        return read(fields)
    except KeyError as missing:
        raise ValueError(f"{file}: the field {missing} is missing") from None


def _native(family: Family, state: State, model: ModelConfig, resolved: Resolved) -> tuple[dict[str, Any], State]:
    plain_model, plain, folded = fold(model, resolved, state)
    plain, folded = family.prepare(plain, folded)
    if not family.takes_scale(plain_model):
        plain_model, folded = fold_scores(plain_model, plain, folded)
    fields = {"architectures": [family.architecture], **family.config(plain_model, plain)}
    renamed = family.rename(family.transform(folded, plain_model), plain_model)
    return fields, {name: tensor.float() for name, tensor in renamed.items()}


def _custom(state: State, model: ModelConfig, resolved: Resolved) -> tuple[dict[str, Any], State]:
    family = model.family
    fields = {"architectures": [custom.architecture(family)], "auto_map": custom.auto_map(family)}
    return fields | custom.config(model, resolved), custom.rename(state, model)


@contextmanager
def _new_folder(out: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary folder beside ``out`` that gets its name when the block ends well, and vanishes otherwise."""
    if out.exists() and not overwrite:
        raise ValueError(f"{out}: it exists already; choose another folder or overwrite it")
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{out.name}-", suffix=".tmp", dir=out.parent))
    try:
        yield folder
        folder.chmod(0o755)
        for path in folder.iterdir():
            path.chmod(0o644)
        if out.exists():
            old = folder.with_suffix(".old")
            os.replace(out, old)
            os.replace(folder, out)
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        else:
            os.replace(folder, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_config(folder: Path, fields: dict[str, Any], special: SpecialIds, model: ModelConfig) -> None:
    import transformers

    ids = {"eos_token_id": special.eos, "pad_token_id": special.pad, "bos_token_id": special.bos}
    if model.padding_id is not None:
        ids["pad_token_id"] = model.padding_id
    if model.family == "encdec":
        ids["decoder_start_token_id"] = special.start
    version = {"transformers_version": transformers.__version__}
    _write_json(folder / "config.json", {"dtype": "float32", **fields, **ids, "use_cache": True, **version})
    chosen = {name: value for name, value in ids.items() if value is not None}
    _write_json(folder / "generation_config.json", {**chosen, **version})
    if "auto_map" in fields:
        for source in custom.sources(model.family):
            shutil.copyfile(source, folder / source.name)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _write_weights(folder: Path, tensors: State, max_shard_size: str) -> None:
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    split = split_torch_state_dict_into_shards(tensors, max_shard_size=max_shard_size)
    for path in folder.glob("model*.safetensors*"):
        path.unlink()
    for name, keys in split.filename_to_tensors.items():
        save_file({key: tensors[key].contiguous() for key in keys}, folder / name, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        _write_json(folder / "model.safetensors.index.json", index)


def _read_weights(folder: Path) -> State:
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted({str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
        outside = [name for name in names if Path(name).name != name]
        if outside:
            raise ValueError(f"{index}: '{outside[0]}' is not a file of this folder; get the model from who made it")
        files = [folder / name for name in names]
    elif (folder / "model.safetensors").is_file():
        files = [folder / "model.safetensors"]
    if not files or not all(file.is_file() for file in files):
        raise ValueError(f"{folder}: safetensors files are missing; save the model again with safe serialization")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def _tidy(tensors: State, fields: Mapping[str, Any], model: ModelConfig) -> State:
    """Without buffers of old versions and without the tied head; with the base model's prefix if it was left out."""
    kept = {n: t for n, t in tensors.items() if not n.endswith(("rotary_emb.inv_freq", "attn.masked_bias"))}
    if fields["model_type"] in ("gpt2", "gpt_bigcode", "gpt_neox", "gptj"):
        kept = {n: t for n, t in kept.items() if not n.endswith((".attn.bias", ".attention.bias", ".masked_bias"))}
        kept = {n.replace("embed_out.", "lm_head."): t for n, t in kept.items()}
    if fields["model_type"] in ("bert", "roberta"):
        return _tidy_encoder(kept)
    if model.family == "encdec":
        return _tidy_pairs(kept, model, "" if fields["model_type"] == "t5" else "model.")
    prefix = "transformer." if fields["model_type"] in ("gpt2", "gpt_bigcode", "gptj", "bloom", "mpt") else "model."
    prefix = "gpt_neox." if fields["model_type"] == "gpt_neox" else prefix
    kept = {n if n.startswith((prefix, "lm_head.")) else prefix + n: t for n, t in kept.items()}
    if model.tied_head:
        kept.pop("lm_head.weight", None)
    return kept


def _tidy_pairs(tensors: State, model: ModelConfig, prefix: str) -> State:
    """Without what ties to the shared table; with the base model's prefix if it was left out."""
    cross = (
        "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"  # T5's first weights have it, unread
    )
    bias = tensors.get("final_logits_bias")
    if bias is not None and bias.any():
        raise ValueError("final_logits_bias: it is not zero, which megnorm cannot express; set it to zero")
    left = ("coder.embed_tokens.weight", "final_logits_bias", *(["lm_head.weight"] if model.tied_head else []), cross)
    kept = {n: t for n, t in tensors.items() if not n.endswith(left)}
    return {n if n.startswith((prefix, "lm_head.")) else prefix + n: t for n, t in kept.items()}


def _tidy_encoder(tensors: State) -> State:
    """Without what ties to another tensor, and what another task left behind; LayerNorms by their newer names."""
    left = (
        "position_ids",
        "predictions.decoder.weight",
        "predictions.decoder.bias",
        "lm_head.decoder.weight",
        "lm_head.decoder.bias",
    )
    kept = {n: t for n, t in tensors.items() if not n.endswith(left) and ".seq_relationship." not in n}
    if any(n.startswith(("cls.", "lm_head.")) for n in kept):
        kept = {n: t for n, t in kept.items() if ".pooler." not in n}
    return {
        n.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias"): t
        for n, t in kept.items()
    }
