#!/bin/bash
# One node's task of a Ray cluster: ray_node.sh HEAD ADDRESS ENGINE_NODES PYTHON. HEAD is the node
# that starts the cluster at ADDRESS; ENGINE_NODES (comma-separated) give their GPUs to it, the
# others take part without. Started by common.sh through node.sh.
set -euo pipefail

head=$1 address=$2 engine_nodes=$3 python=$4
ray=("$python" -m ray.scripts.scripts)
start=(start --disable-usage-stats)
if [[ $SLURMD_NODENAME == "$head" ]]; then
    start+=(--head --include-dashboard=false --node-ip-address="${address%:*}" --port="${address##*:}")
else
    until [[ -e $NEMO_CARE_LOGS/ready_$head ]]; do
        sleep 0.5
    done
    start+=(--address="$address")
    [[ ,$engine_nodes, == *,"$SLURMD_NODENAME",* ]] || start+=(--num-gpus=0)
fi
"${ray[@]}" "${start[@]}"
: >"$NEMO_CARE_LOGS/ready_$SLURMD_NODENAME"
# Ray's processes are daemons: this task lasts as long as they should.
trap '"${ray[@]}" stop --force; exit 0' USR1 TERM
sleep infinity &
wait
