#!/usr/bin/env bash
# Train on several machines: run the same line on each.
#   MASTER_ADDR=host0 NNODES=4 NODE_RANK=<0..3> GPUS_PER_NODE=8 bash scripts/multinode.sh run.yaml [key=value ...]
# RDZV=static (default): node 0 is the master, NODE_RANK tells the nodes apart, a failure ends the run.
# RDZV=c10d: NODE_RANK is not needed, nodes may join late, and a failure restarts all ranks from the last checkpoint,
#   at most MAX_RESTARTS times (default 3). NNODES may then be a range, such as 2:4. RDZV_ID names the run.
# All options of the run live in the YAML file.
set -euo pipefail
config=${1:?usage: scripts/multinode.sh run.yaml [key=value ...]}
shift
: "${NNODES:?NNODES: the number of machines}" "${MASTER_ADDR:?MASTER_ADDR: host name of the first machine}"
port=${MASTER_PORT:-29500}

case "${RDZV:-static}" in
static)
    meet=(--node-rank "${NODE_RANK:?NODE_RANK: 0 on the first machine, then 1, 2, ...}"
        --master-addr "$MASTER_ADDR" --master-port "$port")
    ;;
c10d)
    # torch's agents tell the address of a shared store once: a node that replaces a lost one would never hear it
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}
    meet=(--rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$port" --rdzv-id "${RDZV_ID:-megnorm}"
        --max-restarts "${MAX_RESTARTS:-3}")
    ;;
*)
    echo "RDZV=$RDZV: static or c10d" >&2
    exit 2
    ;;
esac
exec torchrun --nnodes "$NNODES" --nproc-per-node "${GPUS_PER_NODE:-1}" "${meet[@]}" \
    -m megnorm.train --config "$config" "$@"
