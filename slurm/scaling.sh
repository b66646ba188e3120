#!/bin/bash
# Submit the same recipe at several sizes, from the folder of the checkout on a login node:
#
#     slurm/scaling.sh 4 8 16 -- --partition=gpu -- model.hf_path=/models/Qwen2.5-VL-72B-Instruct ...
#
# First the numbers of nodes, then options of sbatch, then recipe overrides. Each size trains
# NEMO_CARE_STEPS steps (10) in runs/scaling/NODES (NEMO_CARE_SCALING_DIR/NODES). The batch of a
# step is the recipe's (strong scaling), or NEMO_CARE_PROMPTS_PER_NODE for each node (weak scaling).
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
script=${NEMO_CARE_SCRIPT:-$here/train_72b.sh}
folder=${NEMO_CARE_SCALING_DIR:-$PWD/runs/scaling}
sizes=() options=() overrides=() part=sizes
for argument; do
    if [[ $argument == -- && $part != overrides ]]; then
        if [[ $part == sizes ]]; then part=options; else part=overrides; fi
        continue
    fi
    case $part in
    sizes)
        [[ $argument =~ ^[1-9][0-9]*$ ]] || {
            echo "$argument is not a number of nodes: slurm/scaling.sh 4 8 -- [sbatch options] -- \
[key=value ...]" >&2
            exit 2
        }
        sizes+=("$argument")
        ;;
    options) options+=("$argument") ;;
    overrides) overrides+=("$argument") ;;
    esac
done
if ((${#sizes[@]} == 0)); then
    echo "the number of nodes is missing: slurm/scaling.sh 4 8 -- [sbatch options] -- [key=value ...]" >&2
    exit 2
fi

export NEMO_CARE_HOME=${NEMO_CARE_HOME:-${here%/slurm}}
for nodes in "${sizes[@]}"; do
    batch=()
    if [[ -n ${NEMO_CARE_PROMPTS_PER_NODE:-} ]]; then
        batch=("algorithm.prompts_per_step=$((nodes * NEMO_CARE_PROMPTS_PER_NODE))")
    fi
    total=$((nodes + ${NEMO_CARE_SPARE_NODES:-0}))
    # Only steps: no validation, no exported model.
    job=$(sbatch --parsable --job-name="nemo-care-scaling-$nodes" "${options[@]}" --nodes="$total" \
        "$script" data.validation.annotations=null checkpoint.export=false \
        trainer.max_steps="${NEMO_CARE_STEPS:-10}" "${batch[@]}" "${overrides[@]}" \
        exp_manager.explicit_log_dir="$folder/$nodes")
    echo "$nodes nodes: job $job, $folder/$nodes"
done
echo "when they have finished: nemo-care report --scaling $(printf "$folder/%s " "${sizes[@]}")"
