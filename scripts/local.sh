#!/usr/bin/env bash
# Train on this machine:  GPUS_PER_NODE=8 bash scripts/local.sh run.yaml [key=value ...]
# GPUS_PER_NODE: ranks to start (default 1; on a machine without accelerators they run on the CPU over gloo).
# All options of the run live in the YAML file.
set -euo pipefail
config=${1:?usage: scripts/local.sh run.yaml [key=value ...]}
shift
exec torchrun --standalone --nproc-per-node "${GPUS_PER_NODE:-1}" -m megnorm.train --config "$config" "$@"
