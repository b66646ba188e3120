#!/bin/bash
# One node's task of srun: node.sh COMMAND... runs a command with the ranks' environment and logs
# its output. Started by common.sh.
set -uo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=slurm/environment.sh
. "$here/environment.sh"
# shellcheck source=slurm/forward.sh
. "$here/forward.sh"

# srun has started one task on this node; a launcher's variables from the submitting shell would
# contradict that.
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE
export PYTHONPATH="${here%/slurm}${PYTHONPATH:+:$PYTHONPATH}"

log="$NEMO_CARE_LOGS/node_$(printf '%03d' "$SLURM_NODEID")_$SLURMD_NODENAME"
# Some Slurm configurations signal all processes of a task, not only the first.
exec > >(trap '' USR1 TERM; exec tee -a "$log.out") 2> >(trap '' USR1 TERM; exec tee -a "$log.err" >&2)

forward "$@"
status=$?
if ((status == 75)); then
    # Stopped with a checkpoint. With a status other than 0, srun would kill the tasks of other
    # nodes, which are still exiting; common.sh reads this note instead.
    : >"$NEMO_CARE_LOGS/stopped_$SLURM_NODEID"
    exit 0
fi
if ((status != 0)); then
    # srun now ends the other tasks, and returns the status of one of them. Only the first to fail
    # records its status.
    (set -o noclobber && echo "$status" >"$NEMO_CARE_LOGS/failed") 2>/dev/null
    echo "$SLURMD_NODENAME: exit status $status" >&2
fi
exit "$status"
