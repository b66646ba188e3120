# shellcheck shell=bash
# The environment of every rank, sourced by node.sh, inside the container if there is one. For other
# ways to start, nemo_care/ranks/gpu_variables.py sets the same. Variables set by the submitting
# shell or the image are kept.

# Megatron: kernels run in launch order, so that a collective of tensor and sequence parallelism
# starts before the GEMM that hides it.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"

# Groups differ in length from step to step. Expandable segments prevent fragmentation, which would
# lead to out-of-memory errors.
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"

# No TF32, which NVIDIA's images enable: rotary angles are float32 products, and one at position
# 3000 would be off by 1 rad. All passes would agree on it, so no check would detect it.
export TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=0 NVIDIA_TF32_OVERRIDE=0

# A rank whose collective failed or timed out exits with a traceback instead of hanging.
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# NVLink SHARP takes GPU memory for every communicator; a 72B run has dozens.
export NCCL_NVLS_ENABLE="${NCCL_NVLS_ENABLE:-0}"

# TransformerEngine: 0 selects attention with a bitwise reproducible backward, which is slower.
export NVTE_ALLOW_NONDETERMINISTIC_ALGO="${NVTE_ALLOW_NONDETERMINISTIC_ALGO:-1}"

# The network interface for gloo and for NCCL's sockets (its bootstrap, and its data without
# InfiniBand). By default both guess, wrongly on machines with a management network or docker0. A
# prefix such as "ib" or "eth" matches several interfaces for NCCL; gloo needs one name.
if [[ -n ${NEMO_CARE_INTERFACE:-} ]]; then
    export GLOO_SOCKET_IFNAME="$NEMO_CARE_INTERFACE"
    export NCCL_SOCKET_IFNAME="$NEMO_CARE_INTERFACE"
fi

# Checkpoints are directories. Hundreds of ranks querying the hub would be throttled.
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"
export TRANSFORMERS_OFFLINE="${TRANSFORMERS_OFFLINE:-1}"

# Output reaches the logs when it is written, not when a buffer is full.
export PYTHONUNBUFFERED=1
