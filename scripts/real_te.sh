#!/usr/bin/env bash
# Our calls against Transformer Engine's own Python, without a GPU: fetches its wheel and what that imports, and runs
# tests/kernels/real_te.py over an extension that is not there.  bash scripts/real_te.sh [version]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/env.sh
target=$(mktemp -d)
trap 'rm -rf "$target"' EXIT
.venv/bin/python -m pip install -q --no-deps --target "$target" "transformer-engine==${1:-2.20.2}" \
    einops onnx onnxscript onnx-ir ml_dtypes nvdlfw-inspect triton
PYTHONPATH="$target:$PWD" .venv/bin/python -W ignore -m tests.kernels.real_te
