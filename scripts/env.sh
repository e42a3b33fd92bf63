#!/usr/bin/env bash
# Makes ./.venv: megnorm in editable form, with the versions of scripts/constraints.txt. Does nothing when up to date.
# PYTHON: the interpreter to build it from (default python3). pip's own configuration decides where packages come from.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

stamp=$(cat setup.py scripts/env.sh scripts/constraints.txt | sha256sum | cut -d' ' -f1)
if [[ -f .venv/stamp && "$(cat .venv/stamp)" == "$stamp" ]]; then
    exit 0
fi

echo "== environment: .venv (once; most of the time goes to downloading torch)"
"${PYTHON:-python3}" -m venv .venv
for attempt in 1 2 3; do
    if .venv/bin/pip install --quiet --disable-pip-version-check \
        -c scripts/constraints.txt -e '.[all-cpu,dev]' mpich; then
        echo "$stamp" > .venv/stamp
        exit 0
    fi
    echo "   installation failed (try $attempt of 3)" >&2
    sleep $((attempt * 5))
done
echo "scripts/env.sh: packages could not be installed; see pip's message above" >&2
exit 1
