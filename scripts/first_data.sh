#!/usr/bin/env bash
# The text of examples/first_run as a tokenizer and token files in runs/first_run/, on which the small examples train:
# data/ for language models, pairs/ for encoder-decoders (a sentence and its words in reverse).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
text=examples/first_run out=runs/first_run

megnorm tokenizer train --input "$text/train.jsonl.gz" --vocab-size 2048 --output "$out/tokenizer"
for split in train valid; do
    megnorm preprocess --strict --quiet --input "$text/$split.jsonl.gz" --tokenizer "$out/tokenizer" \
        --output "$out/data/$split"
done
for split in train valid; do
    python "$text/pairs.py" "$text/$split.jsonl.gz" "$out/pairs/$split.tsv"
    megnorm preprocess --strict --quiet --input "$out/pairs/$split.tsv" --keys 0 1 --tokenizer "$out/tokenizer" \
        --output "$out/pairs/$split"
done
