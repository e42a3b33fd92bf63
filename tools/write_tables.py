"""Write what is generated from the schemes: README's table and the drawings of docs/schemes.

python tools/write_tables.py            write
python tools/write_tables.py --check    exit 1 if anything written is not what the schemes say now
"""

import argparse
import sys
from pathlib import Path

from megnorm.hf.families.target import native_classes
from megnorm.norms import registry
from megnorm.norms.config import NormConfig
from megnorm.norms.draw import draw
from megnorm.norms.resolve import resolve

PROJECT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- schemes:begin -->\n", "<!-- schemes:end -->\n"
LAYERS = 12


def table() -> str:
    """README's table: each scheme with its paper, what it is, options and Hugging Face classes."""
    lines = ["| scheme | what it is | options | leaves as | paper |", "|---|---|---|---|---|"]
    for name in registry.names():
        scheme = registry.get(name)
        options = ", ".join(f"`{option}`" for option in registry.options(name))
        classes = native_classes(NormConfig(name), LAYERS)
        lines.append(
            f"| [`{name}`](docs/schemes/{name}.svg) | {scheme.summary} | {options} | {classes} | {scheme.paper} |"
        )
    return "\n".join(lines) + "\n"


def generated() -> dict[Path, str]:
    """Every generated file and its content."""
    readme = PROJECT / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    files = {readme: before + BEGIN + table() + END + after}
    for name in registry.names():
        files[PROJECT / "docs" / "schemes" / f"{name}.svg"] = draw(resolve(NormConfig(name), LAYERS))
    return files


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    stale = [
        path for path, text in generated().items() if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    if args.check:
        for path in stale:
            print(f"{path.relative_to(PROJECT)} is stale; run python tools/write_tables.py", file=sys.stderr)
        return 1 if stale else 0
    for path in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(generated()[path], encoding="utf-8")
        print(path.relative_to(PROJECT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
