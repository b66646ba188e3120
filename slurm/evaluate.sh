#!/bin/bash
# Evaluate a checkpoint on the samples of a recipe, from the folder of the checkout:
#
#     export NEMO_CARE_CONTAINER=/images/nemo.sqsh NEMO_CARE_MOUNTS=/data:/data,/models:/models
#     export NEMO_CARE_RECIPE=grpo_care_qwen2_5_vl_7b
#     sbatch --nodes=2 slurm/evaluate.sh evaluation.checkpoint=runs/grpo_care_qwen2_5_vl_7b \
#         exp_manager.explicit_log_dir=runs/7b_evaluated
#
# An interrupted evaluation resumes. Arguments are recipe overrides; options of sbatch override
# those below.
#SBATCH --job-name=nemo-care-evaluate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
#SBATCH --output=%x_%j.log
if [[ -z ${NEMO_CARE_RECIPE:-} ]]; then
    echo "NEMO_CARE_RECIPE is not set: name the recipe whose samples are evaluated" >&2
    exit 2
fi
# Slurm runs a copy of this file, so common.sh is not in the copy's folder.
# shellcheck source=slurm/common.sh
. "${NEMO_CARE_HOME:-$SLURM_SUBMIT_DIR}/slurm/common.sh" || exit 2
run_job evaluate "$@"
