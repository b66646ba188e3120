"""Variables that CUDA's libraries read when they are loaded; set before torch is imported.

`slurm/environment.sh` sets the same in a batch job. What the user or the image has set stays, but
for TF32: NVIDIA's containers switch it on, and then a rotary angle, a float32 product, is off by
1 rad at position 3000. All passes would agree on it, so that no check of ours would notice.
"""

import os

DEFAULTS = {
    # Megatron: kernels run in the order of their launch, so that a collective of tensor or
    # sequence parallelism has begun before the product that hides it.
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    # A rank whose collective failed or timed out dies with a traceback instead of hanging.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
    "NCCL_DEBUG": "WARN",
    # NVLink SHARP takes GPU memory for every communicator; a 72B run has dozens.
    "NCCL_NVLS_ENABLE": "0",
    # TransformerEngine: attention whose backward repeats bit for bit is slower.
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "1",
}
FIXED = {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "0", "NVIDIA_TF32_OVERRIDE": "0"}
# Groups differ in length from step to step. Segments that can grow keep the allocator from
# fragmenting into out-of-memory errors. torch takes either name.
ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
ALLOCATOR_DEFAULT = "expandable_segments:True"


def set_gpu_variables() -> None:
    """Set them for this process and those that it starts."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    os.environ.update(FIXED)
    if not any(os.environ.get(name) for name in ALLOCATOR):
        os.environ[ALLOCATOR[0]] = ALLOCATOR_DEFAULT
