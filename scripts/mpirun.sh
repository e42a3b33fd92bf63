#!/usr/bin/env bash
# Train under MPI, which gives the ranks:  NP=16 bash scripts/mpirun.sh run.yaml [key=value ...]
# NP: ranks to start (default 2). MPIRUN_FLAGS: what your mpirun needs, such as "--hostfile hosts" or, for Open MPI as
# root, "--allow-run-as-root". Needs megnorm[mpi]. All options of the run live in the YAML file.
set -euo pipefail
config=${1:?usage: scripts/mpirun.sh run.yaml [key=value ...]}
shift
read -r -a flags <<< "${MPIRUN_FLAGS:-}"
# mpi4py as the runner: a rank that fails ends all; by itself MPI would let the others wait for it
exec mpirun -n "${NP:-2}" ${flags[@]+"${flags[@]}"} python -m mpi4py -m megnorm.train --config "$config" "$@"
