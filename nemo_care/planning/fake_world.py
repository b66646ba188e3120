"""One rank of a fake world: torch's fake process group, with tensors on `meta`.

Every collective returns at once and moves nothing, and tensors that Megatron allocates on CUDA have
a shape but no memory. One process on any machine can therefore build what a rank of 512 would build
and run its step for the shapes. torch calls the fake process group a testing tool; its version is
pinned.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.tensor_parallel.random import initialize_rng_tracker
from torch._C._distributed_c10d import FakeWork

from nemo_care.megatron.cpu import enable_cpu_megatron
from nemo_care.ranks.process_groups import Layout, RankEnvironment, Ranks


class FakeRanks(Ranks):
    """`Ranks` of a fake world; data from different ranks is never read."""

    def __init__(self, layout: Layout, rank: int, world_size: int) -> None:
        """Raise InputError if the world does not fit the layout."""
        super().__init__(layout, RankEnvironment(rank, world_size, 0))

    def _start(self, env: RankEnvironment, cpu_threads: int) -> None:
        # The import registers the backend "fake".
        from torch.testing._internal.distributed.fake_pg import FakeStore

        enable_cpu_megatron("meta")
        _collectives_on_meta()
        dist.init_process_group("fake", store=FakeStore(), rank=env.rank, world_size=env.world_size)
        with _no_gloo():
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=self.layout.tensor,
                pipeline_model_parallel_size=self.layout.pipeline,
                expert_model_parallel_size=self.layout.expert,
                expert_tensor_parallel_size=self.layout.expert_tensor_size,
            )
        initialize_rng_tracker(inference_rng_tracker=True)

    def _make_object_groups(self) -> None:
        self.model_leader = self.rank
        self.is_model_leader = True


@cache
def _collectives_on_meta() -> torch.library.Library:
    """Let the fake backend accept `meta` tensors in the two collectives where torch does not."""
    dist.Backend.backend_capability["fake"].append("meta")
    library = torch.library.Library("c10d", "IMPL")
    for name in ("reduce_scatter_tensor_coalesced_", "allgather_into_tensor_coalesced_"):
        library.impl(name, lambda *args: FakeWork().boxed(), "Meta")
    return library


def _no_gloo() -> Any:
    """Replace Megatron's additional gloo groups, since gloo would wait for the missing ranks."""
    create = parallel_state.create_group

    def fake(*args: Any, backend: str | None = None, **kwargs: Any) -> Any:
        return create(*args, backend="fake", **kwargs)

    return patch.object(parallel_state, "create_group", fake)


@contextmanager
def fake_world(layout: Layout, rank: int, world_size: int) -> Iterator[FakeRanks]:
    """Provide the process groups of one rank for the duration of the block.

    CUDA must be hidden (`CUDA_VISIBLE_DEVICES=""`) and no process group may exist.

    Raises:
        RuntimeError: CUDA is visible, or this process is a rank already.
    """
    if torch.cuda.is_available():
        raise RuntimeError(
            "a fake world needs CUDA hidden: set CUDA_VISIBLE_DEVICES to an empty value"
        )
    if dist.is_initialized():
        raise RuntimeError("a fake world can't be entered by a process that is a rank already")
    ranks = FakeRanks(layout, rank, world_size)
    try:
        yield ranks
    finally:
        ranks.close()
        enable_cpu_megatron("cpu")


def stage_rank(layout: Layout, stage: int, world_size: int) -> int:
    """The first rank of a pipeline stage, in Megatron's order (tensor, data, pipeline)."""
    return stage * (world_size // layout.pipeline)


def exchanged_shape(shape: Sequence[int]) -> Any:
    """Set the shape of the tensors that stages receive, since no neighbour sends it."""
    both = list(shape), list(shape)
    return patch.object(P2PCommunicator, "_communicate_shapes", lambda *args: both)
