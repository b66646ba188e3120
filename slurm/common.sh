# shellcheck shell=bash
# Shared by the scripts in this folder; they source it in the batch job and call `run_job`.
# docs/slurm.md lists the variables.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=slurm/forward.sh
. "$root/slurm/forward.sh"

STOPPED=75 # nemo_care.process.ending.STOPPED
UNUSABLE=2

say() { printf '%(%FT%T)T slurm: %s\n' -1 "$*"; }

# fail STATUS MESSAGE
fail() {
    say "$2" >&2
    exit "$1"
}

# run_job train|evaluate [key=value ...]
run_job() {
    command=$1
    shift
    overrides=()
    restart=${SLURM_RESTART_COUNT:-0}
    trap 'asked=USR1' USR1
    trap 'asked=TERM' TERM
    check_settings "$@"
    mkdir -p "$logs"
    count_fruitless_restarts
    choose_nodes
    local engines=""
    if ((rollout_count > 0)) && [[ -z $asked ]]; then
        start_engines
    fi
    if [[ -n $asked ]]; then
        finish "$STOPPED" # asked to stop before training began
    fi
    local status=0
    start_on "${nodes[@]}" || status=$?
    stop_engines
    if ((status != 0)) && [[ -s $logs/failed ]]; then
        status=$(<"$logs/failed")
    fi
    if compgen -G "$logs/stopped_*" >/dev/null && ((status == 0)); then
        status=$STOPPED
    elif [[ -n $asked ]] && ((status != 0 && status != UNUSABLE)); then
        # It was asked to stop and could not save: an evaluation, whose finished samples are in its
        # files, or a run that was still starting.
        say "stopped without saving a checkpoint (exit status $status)"
        status=$STOPPED
    fi
    finish "$status"
}

# ---------------------------------------------------------------- settings

check_settings() {
    [[ -n ${SLURM_JOB_ID:-} ]] || fail $UNUSABLE "this is a batch script: sbatch $0"
    local argument
    run_dir=${NEMO_CARE_RUN_DIR:-$PWD/runs/$NEMO_CARE_RECIPE}
    # The evaluated run would not share its directory.
    [[ $command == train || -n ${NEMO_CARE_RUN_DIR:-} ]] || run_dir+=_evaluated
    for argument; do
        case $argument in
        trainer.num_nodes=*)
            fail $UNUSABLE "$argument: the job sets it, to sbatch's --nodes less NEMO_CARE_SPARE_NODES"
            ;;
        rollout.vllm.ray_address=*)
            ((${NEMO_CARE_ROLLOUT_NODES:-0} == 0)) || fail $UNUSABLE \
                "$argument: the job starts Ray on its NEMO_CARE_ROLLOUT_NODES and sets it"
            overrides+=("$argument")
            ;;
        exp_manager.explicit_log_dir=*) run_dir=${argument#*=} ;;
        *) overrides+=("$argument") ;;
        esac
    done
    [[ $run_dir == /* ]] || run_dir=$PWD/$run_dir
    logs=$run_dir/slurm/$SLURM_JOB_ID/restart_$restart

    spares=${NEMO_CARE_SPARE_NODES:-0}
    # Nodes that run vLLM's engines instead of training.
    rollout_count=${NEMO_CARE_ROLLOUT_NODES:-0}
    wanted=$((SLURM_JOB_NUM_NODES - spares - rollout_count))
    local taken="NEMO_CARE_SPARE_NODES=$spares"
    ((rollout_count == 0)) || taken+=" with NEMO_CARE_ROLLOUT_NODES=$rollout_count"
    ((wanted > 0)) || fail $UNUSABLE \
        "$taken leaves none of --nodes=$SLURM_JOB_NUM_NODES: raise --nodes"

    if ((rollout_count > 0)); then
        port=${NEMO_CARE_ROLLOUT_PORT:-6379}
        # A secret of this start, unless the user has one: Ray executes the code of its clients.
        export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token}
        RAY_AUTH_TOKEN=${RAY_AUTH_TOKEN:-$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')}
        export RAY_AUTH_TOKEN
        # An engine for each of these nodes, unless an argument says otherwise.
        overrides=("rollout.vllm.engines=$rollout_count" "${overrides[@]}")
    fi

    # All CPUs of a node for its single task, to which srun would give one.
    launch=(srun --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" --cpu-bind=none)
    # Where devices are constrained, a step gets only the job's GPUs that it requests. Slurm sets
    # this if the job has any.
    [[ -z ${SLURM_GPUS_ON_NODE:-} ]] || launch+=(--gres="gpu:$SLURM_GPUS_ON_NODE")
    python=${NEMO_CARE_PYTHON:-}
    case ${NEMO_CARE_CONTAINER:-} in
    "")
        fail $UNUSABLE "NEMO_CARE_CONTAINER is not set: give an image for Pyxis (a .sqsh file or \
docker://...), or none to run on the nodes' own Python"
        ;;
    none)
        if [[ -z $python ]]; then
            python=$root/.venv/bin/python
            [[ -x $python ]] || fail $UNUSABLE \
                "no $python: make it with \`make .venv/.installed\`, or set NEMO_CARE_PYTHON"
        fi
        ;;
    *)
        [[ -n ${NEMO_CARE_MOUNTS:-} ]] || fail $UNUSABLE "NEMO_CARE_MOUNTS is not set: give the \
folders with checkpoint and data, such as /data:/data,/models:/models (comma-separated)"
        mkdir -p "$run_dir"
        # Ranks reach Ray's processes, in the container of another step, by sockets in /tmp.
        ((rollout_count == 0)) || NEMO_CARE_MOUNTS+=,/tmp:/tmp
        launch+=(
            --container-image="$NEMO_CARE_CONTAINER"
            --container-mounts="$root:$root,$PWD:$PWD,$run_dir:$run_dir,$NEMO_CARE_MOUNTS"
            --container-workdir="$PWD"
            --no-container-mount-home
        )
        python=${python:-python3}
        ;;
    esac
}

# ---------------------------------------------------------------- restarts

# The progress of a run: its newest checkpoint, or an evaluation's number of rows.
progress() {
    local found
    if [[ $command == train ]]; then
        found=$(find "$run_dir/checkpoints" -maxdepth 1 -name 'step_*' ! -name '*.*' \
            -printf '%f\n' 2>/dev/null | sort -V | tail -n 1) || true
    else
        found=$(cat "$run_dir"/evaluation/*.jsonl 2>/dev/null | wc -l) || true
    fi
    echo "${found:-none}"
}

# A job that is requeued repeatedly without progress wastes its nodes.
count_fruitless_restarts() {
    local file=$run_dir/slurm/progress.$SLURM_JOB_ID limit=${NEMO_CARE_MAX_FRUITLESS_RESTARTS:-3}
    local fruitless=0 before="" now
    now=$(progress)
    if ((restart > 0)) && [[ -f $file ]]; then
        read -r fruitless before <"$file"
        if [[ $now == "$before" ]]; then
            fruitless=$((fruitless + 1))
        else
            fruitless=0
        fi
    fi
    echo "$fruitless $now" >"$file"
    ((fruitless < limit)) || fail 1 "$fruitless restarts in a row without progress (newest: $now); \
logs: $run_dir/slurm/$SLURM_JOB_ID; NEMO_CARE_MAX_FRUITLESS_RESTARTS=$limit allows no more"
    say "job $SLURM_JOB_ID, start $((restart + 1)), on $SLURM_JOB_NODELIST; resumes from: $now"
    say "run directory: $run_dir; logs: $logs"
}

# finish STATUS: requeue a run that stopped with more to do; end the job with the status.
finish() {
    local status=$1 state now
    if ((status != STOPPED)); then
        ((status == 0)) || fail "$status" "failed with exit status $status; logs: $logs"
        say "done"
        exit 0
    fi
    # Before the requeue, after which Slurm ends the job's processes.
    now=$(progress)
    state=$(scontrol show job --oneliner "$SLURM_JOB_ID" | grep -o ' JobState=[A-Z_]*')
    if [[ $state != *RUNNING ]]; then
        say "stopped; Slurm ends or requeues the job itself (${state# })"
    elif [[ ${NEMO_CARE_REQUEUE:-1} == 0 ]]; then
        say "stopped; NEMO_CARE_REQUEUE=0: submit the same command to resume"
    elif scontrol requeue "$SLURM_JOB_ID"; then
        say "stopped; requeued, to resume from: $now"
    else
        say "stopped, and can't be requeued: submit the same command to resume" >&2
    fi
    exit "$STOPPED"
}

# ---------------------------------------------------------------- nodes

# Set `nodes` to the first `wanted` nodes that pass the preflight, and `rollout_nodes` to the next.
choose_nodes() {
    local all node verdict checks=$logs/preflight needed=$((wanted + rollout_count))
    mapfile -t all < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    nodes=()
    if [[ ${NEMO_CARE_PREFLIGHT:-1} == 0 ]]; then
        say "NEMO_CARE_PREFLIGHT=0: the nodes are not checked"
        divide_nodes "${all[@]:0:needed}"
        return
    fi
    mkdir -p "$checks"
    # Where Ray will run is not known yet.
    local checked=("${overrides[@]}")
    ((rollout_count == 0)) || checked+=("rollout.vllm.ray_address=${all[0]}:$port")
    # Every node must see this file on the shared file system, and write its verdict beside it.
    echo "$SLURM_JOB_ID.$restart" >"$checks/canary"
    NEMO_CARE_LOGS=$checks timeout --kill-after=30 "${NEMO_CARE_PREFLIGHT_SECONDS:-900}" \
        "${launch[@]}" --kill-on-bad-exit=0 bash "$root/slurm/node.sh" \
        "$python" -m nemo_care.checks.node --verdict "$checks" \
        --config-name "$NEMO_CARE_RECIPE" "${checked[@]}" trainer.num_nodes="$wanted" \
        >"$checks/output" 2>&1 || true
    for node in "${all[@]}"; do
        verdict="no answer within ${NEMO_CARE_PREFLIGHT_SECONDS:-900} s, see $checks/output"
        if [[ -s $checks/$node ]]; then
            verdict=$(<"$checks/$node")
        fi
        case $verdict in
        ok) nodes+=("$node") ;;
        recipe:*) fail $UNUSABLE "${verdict#recipe: }" ;;
        *) say "preflight: $node is left out: $verdict" >&2 ;;
        esac
    done
    ((${#nodes[@]} >= needed)) || fail 1 "preflight: ${#nodes[@]} of ${#all[@]} nodes are fit and \
$needed are needed: sbatch --exclude the rest, or request spares (NEMO_CARE_SPARE_NODES)"
    divide_nodes "${nodes[@]:0:needed}"
}

# divide_nodes NODE...: the first ones train, the others run engines.
divide_nodes() {
    nodes=("${@:1:wanted}")
    rollout_nodes=("${@:wanted + 1}")
}

# joined WORD...: the words with commas between them.
joined() {
    local IFS=,
    echo "$*"
}

# The address by which Slurm itself reaches a node.
address_of() {
    local address
    address=$(scontrol show node --oneliner "$1" | grep -o ' NodeAddr=[^ ]*')
    echo "${address#*=}"
}

# ---------------------------------------------------------------- engines

# start_engines: start a Ray cluster on all chosen nodes, in the background, and name it in the
# overrides. The nodes that train take part without GPUs. Sets `engines` to the process.
start_engines() {
    local all=("${nodes[@]}" "${rollout_nodes[@]}") list rollout_list address ready=()
    list=$(joined "${all[@]}")
    rollout_list=$(joined "${rollout_nodes[@]}")
    address=$(address_of "${rollout_nodes[0]}"):$port
    overrides+=("rollout.vllm.ray_address=$address")
    mkdir -p "$logs/engines"
    say "engines on ${#rollout_nodes[@]} nodes: $rollout_list"
    # It shares the nodes that train with their ranks.
    NEMO_CARE_LOGS=$logs/engines "${launch[@]}" --overlap --nodes=${#all[@]} --ntasks=${#all[@]} \
        --nodelist="$list" --kill-on-bad-exit=1 bash "$root/slurm/node.sh" \
        bash "$root/slurm/ray_node.sh" "${rollout_nodes[0]}" "$address" "$rollout_list" "$python" \
        >"$logs/engines/output" 2>&1 &
    engines=$!
    # The ranks do not wait for a cluster.
    while ((${#ready[@]} < ${#all[@]})) && [[ -z $asked ]]; do
        kill -0 "$engines" 2>/dev/null || fail 1 "Ray did not start; logs: $logs/engines"
        read -r -t 0.5 -u "$idle" || true
        mapfile -t ready < <(compgen -G "$logs/engines/ready_*" || true)
    done
}

# Ray's daemons are stopped by their own command, for which they get 30 seconds.
stop_engines() {
    local tries
    [[ -n $engines ]] && kill -USR1 "$engines" 2>/dev/null || return 0
    for ((tries = 0; tries < 60; tries++)); do
        kill -0 "$engines" 2>/dev/null || return 0
        read -r -t 0.5 -u "$idle" || true
    done
}

# ---------------------------------------------------------------- ranks

# start_on NODE...: run with one task per node, and return the exit status.
start_on() {
    local list
    list=$(joined "$@")
    MASTER_ADDR=${NEMO_CARE_MASTER_ADDR:-$(address_of "$1")}
    export MASTER_ADDR
    # The default is derived from the job's number (nemo_care/ranks/slurm.py).
    unset MASTER_PORT
    [[ -z ${NEMO_CARE_MASTER_PORT:-} ]] || export MASTER_PORT=$NEMO_CARE_MASTER_PORT
    export NEMO_CARE_LOGS=$logs NEMO_CARE_RANK_LOGS=$logs
    # git can be missing in the container, or reject a checkout that another user owns.
    NEMO_CARE_COMMIT=$(git -C "$root" describe --always --abbrev=40 --dirty --exclude '*' \
        2>/dev/null || true)
    export NEMO_CARE_COMMIT
    say "$command on $# nodes: $list"
    forward "${launch[@]}" --nodes=$# --ntasks=$# --nodelist="$list" --kill-on-bad-exit=1 \
        bash "$root/slurm/node.sh" "$python" -m nemo_care "$command" \
        --config-name "$NEMO_CARE_RECIPE" exp_manager.explicit_log_dir="$run_dir" \
        "${overrides[@]}" trainer.num_nodes=$#
}
