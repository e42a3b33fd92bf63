"""A tokenizer for the exported folder."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megnorm.data import tokenizer as tokenizers

FAST = ("PreTrainedTokenizerFast", "TokenizersBackend")
KEPT = ("eos_token", "pad_token", "bos_token", "unk_token", "chat_template", "clean_up_tokenization_spaces")
PAD_NAMES = ("<|pad|>", "<pad>", "[PAD]")
BEGIN_NAMES = ("<|begin_of_text|>", "<s>", "<bos>", "[CLS]")


@dataclass(frozen=True)
class SpecialIds:
    """Ids of special tokens; None: the tokenizer has none. start: the first token of a decoder."""

    eos: int | None = None
    pad: int | None = None
    bos: int | None = None
    start: int | None = None

    def with_(self, other: "SpecialIds") -> "SpecialIds":
        """These, but for those that the other has."""
        return replace(self, **{name: value for name, value in asdict(other).items() if value is not None})


def load_tokenizer(source: Path, *, max_length: int | None = None) -> Any:
    """A transformers tokenizer of any Hugging Face tokenizer that data was made with. Raises ValueError."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = source if source.is_dir() else source.parent
    written = folder / "tokenizer_config.json"
    options = json.loads(written.read_text(encoding="utf-8")) if written.is_file() else {}
    if options.get("tokenizer_class") not in (None, "PreTrainedTokenizer", *FAST):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    inner = tokenizers.load(str(source))
    if not isinstance(inner, tokenizers.HuggingFace):
        raise ValueError(f"{source}: a tokenizer of this kind has no Hugging Face form; export with --no-tokenizer")
    given = {name: _text(options[name]) for name in KEPT if options.get(name) is not None}
    made = PreTrainedTokenizerFast(tokenizer_object=inner.inner, **given)
    usual = {"eos_token": tokenizers.END_NAMES, "pad_token": PAD_NAMES, "bos_token": BEGIN_NAMES}
    for name, tokens in usual.items():
        found = [token for token in tokens if token in made.get_vocab()]
        if getattr(made, name) is None and found:
            setattr(made, name, found[0])
    if max_length is not None:
        made.model_max_length = max_length
    return made


def _text(token: Any) -> Any:
    """A special token may be written with its options."""
    return token["content"] if isinstance(token, dict) and "content" in token else token


def special_ids(tokenizer: Any) -> SpecialIds:
    return SpecialIds(tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id)


def write_tokenizer(source: Path, folder: Path, *, vocab_size: int, max_length: int) -> SpecialIds:
    """Save the tokenizer into an exported folder; its special ids. Raises ValueError if the model has fewer tokens."""
    tokenizer = load_tokenizer(source, max_length=max_length)
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"{source}: the tokenizer has {len(tokenizer)} tokens and the model {vocab_size}; "
            "give the tokenizer that the data was made with"
        )
    tokenizer.save_pretrained(folder)
    return special_ids(tokenizer)
