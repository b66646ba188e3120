#!/bin/bash
# One node's task of srun: node.sh COMMAND... runs a command with the ranks' environment and keeps a
# log of what it says. Started by common.sh.
set -uo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=slurm/environment.sh
. "$here/environment.sh"
# shellcheck source=slurm/forward.sh
. "$here/forward.sh"

# srun has started this node's one task; a launcher's variables from the submitting shell would say
# otherwise.
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE
export PYTHONPATH="${here%/slurm}${PYTHONPATH:+:$PYTHONPATH}"

log="$NEMO_CARE_LOGS/node_$(printf '%03d' "$SLURM_NODEID")_$SLURMD_NODENAME"
# Some Slurm configurations signal all processes of a task, not only its first.
exec > >(trap '' USR1 TERM; exec tee -a "$log.out") 2> >(trap '' USR1 TERM; exec tee -a "$log.err" >&2)

forward "$@"
status=$?
if ((status == 75)); then
    # Stopped with a checkpoint. A status other than 0 would make srun kill the other nodes' tasks,
    # which are still leaving; common.sh finds this note instead.
    : >"$NEMO_CARE_LOGS/stopped_$SLURM_NODEID"
    exit 0
fi
if ((status != 0)); then
    # srun ends the other tasks now, and returns the status of one of those. Only the first to fail
    # leaves its own.
    (set -o noclobber && echo "$status" >"$NEMO_CARE_LOGS/failed") 2>/dev/null
    echo "$SLURMD_NODENAME: exit status $status" >&2
fi
exit "$status"
