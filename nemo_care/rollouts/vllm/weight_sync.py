"""Send the policy's weights to engines, by vLLM's own interface for reinforcement learning.

vLLM has a sender for each method: `ipc` (the same GPU, two processes: CUDA memory handles) and
`nccl` (different GPUs: broadcast), with a part in its workers that loads tensors layer by layer.
Without GPUs, the project's own method uses shared memory.
"""

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Protocol

import torch

from nemo_care.rollouts.vllm import shared_memory
from nemo_care.rollouts.vllm.engine import Engine, Engines
from nemo_care.rollouts.vllm.weight_stream import WeightStream


class Sender(Protocol):
    """The interface of vLLM's trainer weight transfer engine."""

    def send_weights(self) -> None:
        """Send all weights; all ranks of the replica call it."""
        ...


def transfer_backend(placement: str) -> str:
    """Return vLLM's name of the transfer method on this machine."""
    if not torch.cuda.is_available():
        return shared_memory.BACKEND
    return "ipc" if placement == "colocated" else "nccl"


def make_sender(
    backend: str, weights: WeightStream, engines: Sequence[Engine], bucket_bytes: int
) -> Sender:
    """Shake hands with the engines; every rank of the replica creates a sender.

    `engines` are those that receive their weights from this rank: with `ipc`, every rank adds its
    part of the handles, and the ranks that own an engine pass them on; otherwise only one rank
    has engines.
    """
    receiver = Engines(engines)
    if backend == shared_memory.BACKEND:
        return shared_memory.SharedMemorySender(
            weights, receiver if engines else None, bucket_bytes
        )
    # In vLLM, rank 0 is the one that passes weights on to engines.
    rank = 0 if engines else 1
    if backend == "ipc":
        from vllm.distributed.weight_transfer.ipc_engine import (
            IPCTrainerInitInfo,
            IPCTrainerWeightTransferEngine,
        )

        return _WithoutExpandableSegments(
            IPCTrainerWeightTransferEngine.trainer_init(
                IPCTrainerInitInfo(
                    rank=rank,
                    packed=True,
                    packed_buffer_size_bytes=ipc_buffer_bytes(weights, bucket_bytes),
                ),
                client=receiver,
                source=weights,
            )
        )
    from vllm.distributed.weight_transfer.nccl_engine import (
        NCCLTrainerInitInfo,
        NCCLTrainerWeightTransferEngine,
    )

    workers = sum(engine.settings.tensor_parallel_size for engine in engines)
    address, port = _free_address(engines) if engines else ("", 0)
    return NCCLTrainerWeightTransferEngine.trainer_init(
        NCCLTrainerInitInfo(
            master_address=address,
            master_port=port,
            world_size=1 + workers,
            packed_buffer_size_bytes=bucket_bytes,
            rank=rank,
        ),
        client=receiver,
        source=weights,
    )


def ipc_buffer_bytes(weights: WeightStream, bucket_bytes: int) -> int:
    """Return the size of the GPU buffer that all pieces use; collective in the replica.

    vLLM's sender refuses a tensor that does not fit into it, such as a large embedding.
    """
    sizes = [prod(described.shape) * described.dtype.itemsize for described in weights.metadata()]
    return max(bucket_bytes, *sizes)


class _WithoutExpandableSegments:
    """A sender whose buffer is ordinary memory.

    Another process opens memory of an expandable segment with the system call pidfd_getfd, which
    containers and hardened kernels forbid.
    """

    def __init__(self, sender: Sender) -> None:
        self.sender = sender

    def send_weights(self) -> None:
        """Send all weights."""
        with without_expandable_segments():
            self.sender.send_weights()


@contextmanager
def without_expandable_segments() -> Iterator[None]:
    """Prevent allocations inside from being part of a segment that can grow."""
    settings = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
    if "expandable_segments:True" not in settings:
        yield
        return
    configure = torch._C._accelerator_setAllocatorSettings
    # The settings must be given completely.
    configure(settings.replace("expandable_segments:True", "expandable_segments:False"))
    try:
        yield
    finally:
        configure(settings)


def _free_address(engines: Sequence[Engine]) -> tuple[str, int]:
    """Return this machine's address as the engines reach it, and a free port."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    return engines[0].actor.trainer_address(), port
