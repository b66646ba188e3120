#!/bin/bash
# GRPO-CARE on Qwen3-VL-235B-A22B, from the folder of the checkout:
#
#     export NEMO_CARE_CONTAINER=/images/nemo.sqsh NEMO_CARE_MOUNTS=/data:/data,/models:/models
#     sbatch --nodes=16 slurm/train_qwen3_vl_235b.sh model.hf_path=/models/Qwen3-VL-235B-A22B-Instruct ...
#
# Arguments are recipe overrides; options of sbatch override those below.
#SBATCH --job-name=nemo-care-235b
#SBATCH --nodes=16
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
#SBATCH --output=%x_%j.log
NEMO_CARE_RECIPE="${NEMO_CARE_RECIPE:-grpo_care_qwen3_vl_235b_a22b}"
# Slurm runs a copy of this file, so common.sh is not in the copy's folder.
# shellcheck source=slurm/common.sh
. "${NEMO_CARE_HOME:-$SLURM_SUBMIT_DIR}/slurm/common.sh" || exit 2
run_job train "$@"
