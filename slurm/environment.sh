# shellcheck shell=bash
# The environment of every rank, sourced by node.sh, inside the container where there is one; what
# CUDA's libraries read, nemo_care/ranks/gpu_variables.py sets for other ways to start. A variable that the submitting shell or the image has set stays as it is.

# Megatron: kernels run in the order of their launch, so that a collective of tensor and sequence
# parallelism has begun before the GEMM that hides it.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"

# Groups differ in length from step to step. Segments that can grow keep the allocator from
# fragmenting into out-of-memory errors.
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"

# No TF32, which NVIDIA's images switch on: rotary angles are float32 products, and one at position 3000
# would be off by 1 rad. All passes would agree on it, so that no check would notice.
export TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=0 NVIDIA_TF32_OVERRIDE=0

# A rank whose collective failed or timed out dies with a traceback instead of hanging.
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# NVLink SHARP takes GPU memory for every communicator; a 72B run has dozens.
export NCCL_NVLS_ENABLE="${NCCL_NVLS_ENABLE:-0}"

# TransformerEngine: 0 asks for attention whose backward repeats bit for bit, and is slower.
export NVTE_ALLOW_NONDETERMINISTIC_ALGO="${NVTE_ALLOW_NONDETERMINISTIC_ALGO:-1}"

# The network interface for gloo and for NCCL's sockets (its bootstrap, and its data where there is
# no InfiniBand). Both guess when it is not given, and guess wrong on machines with a management
# network or docker0. A prefix such as "ib" or "eth" matches several for NCCL; gloo wants one name.
if [[ -n ${NEMO_CARE_INTERFACE:-} ]]; then
    export GLOO_SOCKET_IFNAME="$NEMO_CARE_INTERFACE"
    export NCCL_SOCKET_IFNAME="$NEMO_CARE_INTERFACE"
fi

# Checkpoints are directories. Hundreds of ranks that ask the hub would be throttled.
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"
export TRANSFORMERS_OFFLINE="${TRANSFORMERS_OFFLINE:-1}"

# Output reaches the logs when it is written, not when a buffer is full.
export PYTHONUNBUFFERED=1
