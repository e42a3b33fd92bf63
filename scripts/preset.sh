#!/usr/bin/env bash
# Train a published model of examples/papers:  bash scripts/preset.sh hybridnorm_1.2b data.path=... [key=value ...]
# On the GPUS_PER_NODE (default 8) GPUs of this machine; with NNODES, on several: the same line on each, and the other
# variables of scripts/multinode.sh. Under Slurm: sbatch --nodes 4 scripts/slurm.sbatch examples/papers/hybridnorm_1.2b.yaml
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
config=examples/papers/${1:?usage: scripts/preset.sh name [key=value ...]; ls examples/papers shows names}.yaml
shift
export GPUS_PER_NODE=${GPUS_PER_NODE:-8}
if [[ -n "${NNODES:-}" ]]; then
    exec bash scripts/multinode.sh "$config" "$@"
fi
exec bash scripts/local.sh "$config" "$@"
