#!/usr/bin/env bash
# One config under several schemes, then a table and figures:
#   bash scripts/sweep.sh run.yaml preln deepnorm hybridnorm_star
# OUT: where the runs go (default runs/sweep). GPUS_PER_NODE as for local.sh.
set -euo pipefail
config=${1:?usage: scripts/sweep.sh run.yaml scheme [scheme ...]}
shift
: "${1:?name at least one scheme; \`megnorm norms\` lists them}"
out=${OUT:-runs/sweep}
runs=()
for scheme in "$@"; do
    bash "$(dirname "${BASH_SOURCE[0]}")/local.sh" "$config" "model.norm.scheme=$scheme" "train.out=$out/$scheme"
    runs+=("$out/$scheme")
done
exec megnorm compare "${runs[@]}" --out "$out/compare"
