#!/usr/bin/env bash
# From raw text to a Hugging Face model in transformers: the whole way, on two CPU cores, in minutes.
# Every stage says what it does and where its output lies. Stops with an error at the first stage that fails.
# examples/first_run/README.md tells more about each. Starts from nothing each time: an earlier runs/first_run is removed.
# Arguments are overrides for the run:  bash scripts/quickstart.sh model.norm.scheme=deepnorm
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/env.sh
export PATH="$PWD/.venv/bin:$PATH" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=true

text=examples/first_run
out=runs/first_run
began=$SECONDS
stage() { printf '\n== %s\n' "$1"; }
rm -rf "$out"

stage "data: byte-level BPE of 2048 tokens, then text to token files -> $out/tokenizer/, $out/data/{train,valid}.{bin,idx}"
bash scripts/first_data.sh
entropy=$(python "$text/check.py" entropy "$out/data/valid")

stage "plan: what $text/run.yaml asks for (starts nothing)"
megnorm plan --config "$text/run.yaml" --ranks 2 "$@"

stage "train: HybridNorm on two ranks (tensor parallel), some minutes -> $out/metrics.jsonl, tensorboard/, checkpoints/"
GPUS_PER_NODE=2 bash scripts/local.sh "$text/run.yaml" "$@"

stage "plot: loss, gradient norms by layer -> $out/plots/"
megnorm plot "$out" --unigram-entropy "$entropy"

stage "check: has it learned from context? (held-out loss from $out/metrics.jsonl)"
python "$text/check.py" loss "$out" "$out/data/valid"

stage "convert: to a folder that transformers loads -> $out/hf/"
megnorm convert --to hf "$out" "$out/hf" --language en

stage "reload: the folder in transformers against the checkpoint, on held-out text"
python "$text/check.py" logits "$out" "$out/hf" "$out/data/valid"

stage "generate: from $out/hf"
megnorm generate "$out/hf" --prompt "The people of the United States" --max-new-tokens 60 --temperature 0.8 --top-k 50

stage "done in $((SECONDS - began)) s (installation not counted); everything lies in $out/"
