#!/usr/bin/env bash
# Everything that needs GPUs, on this machine: kernels against the reference, parity on 1, 2, 4, 8 GPUs, and the roofline.
#   bash scripts/gpu.sh [folder]     writes doctor.txt, tests.txt, roofline.txt and roofline.jsonl there (gpu-report)
# docs/gpu.md tells how to read them.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}  # tools lie beside the package, which need not be installed
out=${1:-gpu-report}
python=${PYTHON:-python}
if ! "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
    echo "gpu.sh: there is no CUDA device here" >&2
    exit 2
fi
mkdir -p "$out"
"$python" -m megnorm doctor | tee "$out/doctor.txt"
"$python" -m pytest -q tests/gpu 2>&1 | tee "$out/tests.txt"
tests=$?
"$python" tools/bench/kernels.py --json "$out/roofline.jsonl" 2>&1 | tee "$out/roofline.txt"
bench=$?
echo "tests $([[ $tests == 0 ]] && echo passed || echo FAILED); benchmark $([[ $bench == 0 ]] && echo ran || echo FAILED); see $out"
exit $((tests || bench))
