"""The model card of an exported folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megnorm.hf.custom import ARCHITECTURE
from megnorm.models.config import ModelConfig
from megnorm.norms.resolve import Resolved


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
    own = architecture == ARCHITECTURE
    lines = ["---", f"license: {card.license}", "library_name: transformers", "pipeline_tag: text-generation"]
    for key, values in (("language", card.languages), ("datasets", card.datasets)):
        if values:
            lines += [f"{key}:", *(f"- {value}" for value in values)]
    lines += ["tags:", "- megnorm", f"- {resolved.scheme}", "---", "", f"# {title}", ""]
    lines += [
        f"A causal language model with the normalization scheme `{resolved.scheme}`, trained with megnorm.",
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
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{title}")',
        f'model = AutoModelForCausalLM.from_pretrained("{title}"{", trust_remote_code=True" if own else ""})',
        'inputs = tokenizer("Once upon a time", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))",
        "```",
        "",
    ]
    if own:
        lines += ["No class of transformers computes this scheme; `modeling_megnorm.py` reads it from config.json.", ""]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")
