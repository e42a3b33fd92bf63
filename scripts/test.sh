#!/usr/bin/env bash
# Style, types and tests.  bash scripts/test.sh          the fast set
#                          bash scripts/test.sh --full   everything that needs no accelerator
# Further arguments go to pytest:  bash scripts/test.sh -k hybridnorm
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/env.sh || exit 1
export OMP_NUM_THREADS=1

marks="not full and not exhaustive and not gpu"
if [[ "${1:-}" == "--full" ]]; then
    marks="not exhaustive and not gpu"
    shift
fi

failed=()
step() {
    local name=$1 began=$SECONDS
    shift
    echo "== $name"
    "$@" || failed+=("$name")
    echo "   $((SECONDS - began)) s"
}
step "ruff check" .venv/bin/ruff check .
step "ruff format" .venv/bin/ruff format --check .
step "mypy" .venv/bin/mypy
# loadgroup: one test at a time to the worker that is free; in chunks, the last worker would be late.
step "pytest -m '$marks'" .venv/bin/python -m pytest -q -m "$marks" -n 2 --dist loadgroup --durations=40 "$@"

if ((${#failed[@]})); then
    printf 'failed: %s\n' "${failed[@]}"
    exit 1
fi
echo "all passed in $SECONDS s"
