#!/bin/bash
# GRPO-CARE on Qwen2.5-VL-72B with vLLM's engines on nodes of their own, which sample during training;
# from the folder of the checkout:
#
#     export NEMO_CARE_CONTAINER=/images/nemo-care.sqsh NEMO_CARE_MOUNTS=/data:/data,/models:/models
#     sbatch slurm/train_72b_async.sh model.hf_path=/models/Qwen2.5-VL-72B-Instruct ...
#
# Of the job's nodes, NEMO_CARE_ROLLOUT_NODES run engines (one each), and the others train. Arguments
# are recipe overrides; options of sbatch override those below.
#SBATCH --job-name=nemo-care-72b-async
#SBATCH --nodes=10
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
#SBATCH --output=%x_%j.log
NEMO_CARE_RECIPE="${NEMO_CARE_RECIPE:-grpo_care_qwen2_5_vl_72b}"
NEMO_CARE_ROLLOUT_NODES="${NEMO_CARE_ROLLOUT_NODES:-2}"
# Slurm runs a copy of this file, so common.sh is not in the copy's folder.
# shellcheck source=slurm/common.sh
. "${NEMO_CARE_HOME:-$SLURM_SUBMIT_DIR}/slurm/common.sh" || exit 2
run_job train rollout=vllm_async "$@"
