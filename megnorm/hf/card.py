"""The model card of an exported folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megnorm.hf import custom
from megnorm.models.config import ModelConfig
from megnorm.norms.resolve import Resolved

USES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "causal": ("A causal language model", "text-generation", (
        'inputs = tokenizer("Once upon a time", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))",
    )),
    "masked": ("A masked language model", "fill-mask", (
        'inputs = tokenizer("Paris is the [MASK] of France.", return_tensors="pt")  # with the mask token it was trained with',
        "print(tokenizer.decode(model(**inputs).logits[0].argmax(-1)))",
    )),
    "classifier": ("A text classifier", "text-classification", (
        'inputs = tokenizer("[CLS] a text [SEP]", add_special_tokens=False, return_tensors="pt")  # framed as in training',
        "print(model(**inputs).logits)",
    )),
    "encdec": ("An encoder-decoder", "translation", (
        "# a text ends with the end-of-document token, as in training",
        'inputs = tokenizer("A text." + tokenizer.eos_token, return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**inputs, num_beams=4, max_new_tokens=100)[0], skip_special_tokens=True))",
    )),
}  # fmt: skip
"""Family -> what it is, its task on the hub, and lines that use it."""


@dataclass(frozen=True)
class Card:
    """What only the owner of a model knows. license: an identifier of the hub, e.g. apache-2.0."""

    license: str = "unknown"
    languages: Sequence[str] = ()
    datasets: Sequence[str] = ()


def write_card(
    folder: Path, card: Card, title: str, architecture: str, model: ModelConfig, resolved: Resolved, parameters: int
) -> None:
    """README.md with front matter, what the model is, and how to load it."""
    own = architecture == custom.architecture(model.family)
    purpose, tag, usage = USES[model.family]
    lines = ["---", f"license: {card.license}", "library_name: transformers", f"pipeline_tag: {tag}"]
    for key, values in (("language", card.languages), ("datasets", card.datasets)):
        if values:
            lines += [f"{key}:", *(f"- {value}" for value in values)]
    lines += ["tags:", "- megnorm", f"- {resolved.scheme}", "---", "", f"# {title}", ""]
    lines += [
        f"{purpose} with the normalization scheme `{resolved.scheme}`, trained with megnorm.",
        "",
        "| | |",
        "|---|---|",
        f"| parameters | {parameters:,} |",
        f"| layers, width, heads | {model.layers}, {model.width}, {model.heads} ({model.kv} key/value) |",
        f"| feed-forward | {model.ffn}, {model.activation} |",
        f"| norms | {model.norm.kind} |",
        f"| positions | {model.positions}, at most {model.max_positions} |",
        f"| vocabulary | {model.vocab_size} |",
        f"| class | `{architecture}`{', shipped in this folder' if own else ''} |",
        "",
        "```python",
        f"from transformers import {custom.CLASSES[model.family][0]}, AutoTokenizer",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{title}")',
        f'model = {custom.CLASSES[model.family][0]}.from_pretrained("{title}"{", trust_remote_code=True" if own else ""})',
        *usage,
        "```",
        "",
    ]
    if own:
        lines += [
            "No class of transformers was taken for this model; the Python files here read its norms from config.json.",
            "",
        ]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")
