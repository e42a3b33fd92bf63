"""Pairs for small encoder-decoders, out of text: a sentence, and the same with its words in reverse.

python examples/first_run/pairs.py TEXT.jsonl.gz PAIRS.tsv
"""

import gzip
import json
import re
import sys
from pathlib import Path

WORDS = range(3, 13)  # in a sentence


def main(text: Path, out: Path) -> None:
    found: dict[str, str] = {}
    with gzip.open(text, "rt", encoding="utf-8") as lines:
        for line in lines:
            for sentence in re.split(r"(?<=[.!?])\s+|\n+", json.loads(line)["text"]):
                words = sentence.split()
                if len(words) in WORDS:
                    found[" ".join(words)] = " ".join(reversed(words))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(f"{source}\t{target}\n" for source, target in found.items()), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
