"""Variables that libraries read when they are loaded; set before torch is imported.

`slurm/environment.sh` sets the same in a batch job. Values set by the user or the image are kept,
except for TF32: NVIDIA's containers enable it, which makes a rotary angle, a float32 product, wrong
by 1 rad at position 3000. All passes would agree on it, so no check of ours would detect it.
"""

import os

from nemo_care.process.environment import INTERFACE

DEFAULTS = {
    # Megatron: kernels run in launch order, so that a collective of tensor or sequence
    # parallelism starts before the product that hides it.
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    # A rank whose collective failed or timed out exits with a traceback instead of hanging.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
    "NCCL_DEBUG": "WARN",
    # NVLink SHARP takes GPU memory for every communicator; a 72B run has dozens.
    "NCCL_NVLS_ENABLE": "0",
    # TransformerEngine: attention with a bitwise reproducible backward is slower.
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "1",
    # Checkpoints are directories. Hundreds of ranks querying the hub would be throttled.
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
}
FIXED = {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "0", "NVIDIA_TF32_OVERRIDE": "0"}
# Groups differ in length from step to step. Expandable segments prevent fragmentation, which would
# lead to out-of-memory errors. torch accepts either name.
ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
ALLOCATOR_DEFAULT = "expandable_segments:True"
SOCKETS = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def set_gpu_variables() -> None:
    """Set the variables for this process and its children."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    os.environ.update(FIXED)
    if not any(os.environ.get(name) for name in ALLOCATOR):
        os.environ[ALLOCATOR[0]] = ALLOCATOR_DEFAULT
    if INTERFACE.value:
        os.environ.update(dict.fromkeys(SOCKETS, INTERFACE.value))
