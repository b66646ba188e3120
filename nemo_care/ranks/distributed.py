"""Start of torch.distributed in the process of a rank, on its GPU or CPU cores."""

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from nemo_care.errors import InputError
from nemo_care.process.cores import bind_near
from nemo_care.ranks.environment import RankEnvironment
from nemo_care.ranks.slurm import rendezvous_address

# Limit of a collective, in all groups. A rank can wait for another's slow file system, or for an
# engine, whose own limit is reached first: rollout.vllm.timeout_seconds is shorter.
TIMEOUT = timedelta(hours=2)


def choose_kernels() -> None:
    """Choose the GPU kernels of this process, whatever the environment says."""
    # See nemo_care/ranks/gpu_variables.py: torch can have been imported earlier.
    torch.set_float32_matmul_precision("highest")
    # cuDNN's attention keeps a plan for every shape, and the number of shapes is unbounded here.
    torch.backends.cuda.enable_cudnn_sdp(False)


def _pci_address(gpu: Any) -> str:
    return f"{gpu.pci_domain_id:04x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}.0"


def _set_rendezvous_address() -> None:
    """Set MASTER_ADDR and MASTER_PORT from Slurm's environment if no launcher has set them."""
    if "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ:
        return
    address, port = rendezvous_address()
    os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))


def init_distributed(env: RankEnvironment, cpu_threads: int) -> None:
    """Start torch.distributed in this process.

    `cpu_threads` is the number of compute threads of this rank on a machine without GPUs.

    Raises:
        InputError: this rank has no GPU on a machine with GPUs.
    """
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        # With one visible GPU per task, every task's GPU is number 0.
        visible = torch.cuda.device_count()
        if visible > 1 and env.local_rank >= visible:
            raise InputError(
                f"rank {env.rank} has number {env.local_rank} on its machine, which has "
                f"{visible} GPUs: set trainer.devices to the GPUs of one machine"
            )
        torch.cuda.set_device(env.local_rank % visible)
        # Copies from and to memory of another CPU's node cross the link between CPUs.
        bind_near(_pci_address(torch.cuda.get_device_properties(env.local_rank % visible)))
    else:
        torch.set_num_threads(cpu_threads)
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    if env.world_size == 1:
        store = dist.HashStore()
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=TIMEOUT)
        return
    _set_rendezvous_address()
    dist.init_process_group(backend, rank=env.rank, world_size=env.world_size, timeout=TIMEOUT)
