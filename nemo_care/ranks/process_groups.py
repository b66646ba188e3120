"""Process groups of a rank, and the transport of small Python objects between ranks.

Tensors use Megatron's groups (NCCL on GPUs, gloo on CPUs). Python objects (prompts, metrics) use
separate gloo groups, so that they never occupy a GPU.
"""

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import initialize_rng_tracker

from nemo_care.errors import InputError, RunFailed
from nemo_care.megatron.cpu import enable_cpu_megatron
from nemo_care.process.handover import without_collecting
from nemo_care.ranks.distributed import TIMEOUT, choose_kernels, init_distributed
from nemo_care.ranks.environment import RankEnvironment
from nemo_care.ranks.flat_tensors import flat_of, unflattened
from nemo_care.ranks.open_files import allow_open_files
from nemo_care.recipe.schema import Recipe

T = TypeVar("T")


def _from_source(make: Callable[[], T], source: int, group: dist.ProcessGroup | None) -> T:
    """Call `make` on rank `source` and return its result, or raise its exception, on the whole
    group."""
    result: list[T | Exception | None] = [None]
    if dist.get_rank() == source:
        try:
            result[0] = make()
        except Exception as error:
            result[0] = _sendable(error)
    if dist.get_world_size(group) > 1:
        dist.broadcast_object_list(result, src=source, group=group, device=torch.device("cpu"))
    if isinstance(result[0], Exception):
        raise result[0]
    return result[0]  # type: ignore[return-value]


def _sendable(error: Exception) -> Exception:
    """Return the exception, or one with its text if it can't be pickled, as a user's exception."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        sendable = RuntimeError(f"{type(error).__name__}: {error}")
        sendable.__cause__ = error
        return sendable
    return error


@dataclass(frozen=True)
class Layout:
    """The degrees of model parallelism.

    The experts of a layer are distributed over `expert` ranks, and each expert's matrices over
    `expert_tensor` (None: 1 with expert parallelism, otherwise `tensor`).
    """

    tensor: int = 1
    pipeline: int = 1
    sequence_parallel: bool = False
    expert: int = 1
    expert_tensor: int | None = None

    @property
    def expert_tensor_size(self) -> int:
        """The number of ranks that share each expert's matrices."""
        return self.expert_tensor or (1 if self.expert > 1 else self.tensor)

    @property
    def replicas_in_step(self) -> int:
        """The number of replicas that share their experts, and so compute in step."""
        return max(self.expert * self.expert_tensor_size // self.tensor, 1)

    @classmethod
    def of(cls, recipe: Recipe) -> "Layout":
        """Return the parallel layout of a recipe."""
        model = recipe.model
        return cls(
            tensor=model.tensor_model_parallel_size,
            pipeline=model.pipeline_model_parallel_size,
            sequence_parallel=model.sequence_parallel,
            expert=model.expert_model_parallel_size,
            expert_tensor=model.expert_tensor_parallel_size,
        )

    def data(self, world_size: int) -> int:
        """Return the number of data-parallel replicas in a world of `world_size` ranks.

        Raises:
            InputError: the world is not a multiple of tensor x pipeline.
        """
        model = self.tensor * self.pipeline
        if world_size % model:
            raise InputError(
                f"world size {world_size} is not a multiple of "
                f"model.tensor_model_parallel_size * model.pipeline_model_parallel_size = {model}: "
                "change trainer.devices, trainer.num_nodes or the layout"
            )
        return world_size // model


class Ranks:
    """The process groups of this rank, with the object collectives over them."""

    def __init__(
        self,
        layout: Layout,
        environment: RankEnvironment | None = None,
        *,
        cpu_threads: int = 1,
    ) -> None:
        """Initialise torch.distributed (if it is not yet) and Megatron's groups.

        `cpu_threads` is the number of compute threads of this rank on a machine without GPUs.

        Raises:
            InputError: the world does not fit the layout, or this process can't have enough open
            files.
        """
        env = environment or RankEnvironment(0, 1, 0)
        layout.data(env.world_size)
        allow_open_files(env.world_size)
        self.layout = layout
        self._start(env, cpu_threads)
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.data_rank = parallel_state.get_data_parallel_rank()
        self.data_size = parallel_state.get_data_parallel_world_size()
        self.is_first_stage = parallel_state.is_pipeline_first_stage()
        self.is_last_stage = parallel_state.is_pipeline_last_stage()
        model_group = parallel_state.get_model_parallel_group()
        # In the order of stages, and of tensor-parallel ranks within a stage.
        self.model_ranks = tuple(sorted(dist.get_process_group_ranks(model_group)))
        # One rank of each replica, among those that compute the loss.
        self.loss_leader = self.model_ranks[-layout.tensor]
        self.is_loss_leader = self.rank == self.loss_leader
        self._make_object_groups()

    def _start(self, env: RankEnvironment, cpu_threads: int) -> None:
        """Start torch.distributed and Megatron's groups."""
        enable_cpu_megatron()
        choose_kernels()
        if not dist.is_initialized():
            init_distributed(env, cpu_threads)
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=self.layout.tensor,
            pipeline_model_parallel_size=self.layout.pipeline,
            expert_model_parallel_size=self.layout.expert,
            expert_tensor_parallel_size=self.layout.expert_tensor_size,
            distributed_timeout_minutes=int(TIMEOUT.total_seconds() // 60),
        )
        initialize_rng_tracker(inference_rng_tracker=True)

    def _make_object_groups(self) -> None:
        """Create the gloo groups for Python objects."""
        replicas: list[tuple[int, ...]] = [()] * self.world_size
        dist.all_gather_object(replicas, self.model_ranks)
        unique = sorted({tuple(members) for members in replicas})
        self.model_leader = self.model_ranks[0]
        self.is_model_leader = self.rank == self.model_leader
        self._model_group, _ = dist.new_subgroups_by_enumeration(
            [list(members) for members in unique], backend="gloo", timeout=TIMEOUT
        )
        self._leader_group = dist.new_group(
            [members[0] for members in unique], backend="gloo", timeout=TIMEOUT
        )

    def from_leader(
        self, make: Callable[[], T], *, for_others: Callable[[T], T] = lambda result: result
    ) -> T:
        """Call `make` on the leader of this model replica and return its result on all its ranks.

        The other ranks get what `for_others` leaves of it. An exception of `make` is raised on
        every rank of the replica, so that none waits forever.
        """
        made: list[T] = []

        def sent() -> T:
            made.append(make())
            return for_others(made[0])

        received = _from_source(sent, self.model_leader, self._model_group)
        return made[0] if made else received

    def dealt_by_leader(
        self, parts: Sequence[tuple[int, Sequence[torch.Tensor]]]
    ) -> list[Sequence[torch.Tensor]]:
        """This rank's parts of tensors that the leader of this replica has, in CPU memory.

        Args:
            parts: (number of a rank within the replica, its tensors), equal on all of its ranks but
                for the values, which only the leader needs; others may have them on `meta`. Of one
                type; a part travels as one message.
        """
        mine: list[Sequence[torch.Tensor]] = []
        for number, tensors in parts:
            target = self.model_ranks[number]
            total = sum(tensor.numel() for tensor in tensors)
            if target == self.rank == self.model_leader or (target == self.rank and not total):
                mine.append(tensors)
            elif target == self.rank:
                flat = torch.empty(total, dtype=tensors[0].dtype)
                dist.recv(flat, src=self.model_leader, group=self._model_group)
                mine.append(unflattened(flat, tensors))
            elif self.is_model_leader and total:
                dist.send(flat_of(tensors), dst=target, group=self._model_group)
        return mine

    def gather_in_replica(self, value: T) -> list[T]:
        """Gather one value per rank of this model replica, in rank order, on each of its ranks."""
        values: list[T | None] = [None] * dist.get_world_size(self._model_group)
        dist.all_gather_object(values, value, group=self._model_group)
        return values  # type: ignore[return-value]

    def gather_from_replicas(self, value: T) -> list[T]:
        """Gather one value per model replica, in data-parallel order, on every rank."""

        def gather() -> list[T]:
            values: list[T | None] = [None] * self.data_size
            dist.all_gather_object(values, value, group=self._leader_group)
            return values  # type: ignore[return-value]

        return self.from_leader(gather)

    def move_between_replicas(
        self, moves: Sequence[tuple[int, int]], values: Sequence[T]
    ) -> list[T]:
        """Move objects from one model replica to another, each rank to its counterpart.

        `moves` are (from, to) and equal on all ranks; `values` are this replica's objects, in the
        order of its moves. Returns the received objects, in that order. Collective over all ranks.
        """
        group = parallel_state.get_data_parallel_group_gloo()
        given = iter(values)
        received: list[T] = []
        # One after the other, in the same order on all ranks, so that no two wait for each other.
        for source, target in moves:
            if self.data_rank == source:
                dist.send_object_list([next(given)], group_dst=target, group=group)
            elif self.data_rank == target:
                box: list[Any] = [None]
                dist.recv_object_list(box, group_src=source, group=group)
                received.append(box[0])
        return received

    def move_tensors_between_replicas(
        self,
        moves: Sequence[tuple[int, int]],
        given: Sequence[Sequence[torch.Tensor]],
        expected: Sequence[Sequence[torch.Tensor]],
    ) -> list[Sequence[torch.Tensor]]:
        """Move tensors in CPU memory as `move_between_replicas` moves objects, without pickling.

        `given` are the tensors, of one type, of each of this replica's moves. `expected` are of the
        shapes and types of what it receives, and can be on `meta`.
        """
        group = parallel_state.get_data_parallel_group_gloo()
        leaving, arriving = iter(given), iter(expected)
        received: list[Sequence[torch.Tensor]] = []
        for source, target in moves:
            if self.data_rank == source:
                if tensors := next(leaving):
                    dist.send(flat_of(tensors), group_dst=target, group=group)
            elif self.data_rank == target:
                if tensors := next(arriving):
                    flat = torch.empty_like(flat_of(tensors), device="cpu")
                    dist.recv(flat, group_src=source, group=group)
                    tensors = unflattened(flat, tensors)
                received.append(tensors)
        return received

    @staticmethod
    def gather_on_rank_zero(value: T) -> list[T]:
        """Gather one value per rank, in rank order, on rank 0; return an empty list elsewhere."""
        is_first = dist.get_rank() == 0
        values: list[T | None] = [None] * dist.get_world_size() if is_first else []
        dist.gather_object(value, values if is_first else None, dst=0)
        return values  # type: ignore[return-value]

    @staticmethod
    def together(do: Callable[[], T]) -> T:
        """Call `do` on every rank and return its result there; collective over all ranks.

        If it fails on any rank with InputError or RunFailed, the error of the lowest such rank is
        raised on all of them: no rank continues alone and then waits forever.
        """
        result: T | None = None
        error: InputError | RunFailed | None = None
        try:
            result = do()
        except (InputError, RunFailed) as failure:
            error = failure
        first = Ranks.first_problem(None if error is None else _sendable(error))
        if first is not None:
            raise first[1]
        return result  # type: ignore[return-value]

    @staticmethod
    def first_problem(problem: T | None) -> tuple[int, T] | None:
        """Return, on all ranks, the lowest rank with a problem and the problem, or None."""
        problems: list[T | None] = [None] * dist.get_world_size()
        dist.all_gather_object(problems, problem)
        return next(((rank, it) for rank, it in enumerate(problems) if it is not None), None)

    def first_rank_with(self, ok: torch.Tensor) -> list[int | None]:
        """Find for each of `ok` (bool [N], on the compute device) the lowest rank with False.

        None if it is True on all ranks. The result is equal on all ranks and needs one small
        collective.
        """
        # 1 means that this rank has none; thus the ranks of a fake world agree too.
        codes = torch.where(ok, 1, self.rank - self.world_size)
        dist.all_reduce(codes, op=dist.ReduceOp.MIN)
        return [None if code > 0 else code + self.world_size for code in codes.tolist()]

    @staticmethod
    def from_rank_zero(make: Callable[[], T]) -> T:
        """Call `make` on rank 0 and return its result, or raise its exception, on every rank."""
        return _from_source(make, 0, None)

    def on_leaders(self, value: T | None) -> T | None:
        """Return rank 0's `value` on the leader of each model replica; None on the other ranks."""
        if not self.is_model_leader:
            return None
        values = [value]
        if self.data_size > 1:
            with without_collecting():
                dist.broadcast_object_list(
                    values, src=0, group=self._leader_group, device=torch.device("cpu")
                )
        return values[0]

    def broadcast_from_loss_leader(self, tensor: torch.Tensor) -> torch.Tensor:
        """Broadcast `tensor` of one rank of the last stage to the replica (in place, same shape).

        Also to the other tensor-parallel ranks of that stage, which have computed the same: on a
        GPU, sums in another order can make their results differ in the last bit, and a decision
        that depends on it would be made differently on each.
        """
        if len(self.model_ranks) > 1:
            dist.broadcast(
                tensor, src=self.loss_leader, group=parallel_state.get_model_parallel_group()
            )
        return tensor

    @staticmethod
    def send_to_next_stage(tensor: torch.Tensor) -> None:
        """Give this stage's `tensor` to the same rank of the next stage, which receives it."""
        dist.send(
            tensor,
            dst=parallel_state.get_pipeline_model_parallel_next_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )

    @staticmethod
    def receive_from_previous_stage(tensor: torch.Tensor) -> None:
        """Fill `tensor` with what the stage before sends, which has this shape and type."""
        dist.recv(
            tensor,
            src=parallel_state.get_pipeline_model_parallel_prev_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )

    def sum_over_model(self, value: torch.Tensor) -> torch.Tensor:
        """Sum `value` over the ranks of this model replica (in place)."""
        dist.all_reduce(value, group=parallel_state.get_model_parallel_group())
        return value

    @staticmethod
    def sum_over_experts(value: torch.Tensor) -> torch.Tensor:
        """Sum `value` over the ranks that have the experts of one model (in place)."""
        group = parallel_state.get_expert_tensor_model_pipeline_parallel_group()
        dist.all_reduce(value, group=group)
        return value

    @staticmethod
    def sum_over_data(value: torch.Tensor) -> torch.Tensor:
        """Sum `value` over the model replicas (in place)."""
        dist.all_reduce(value, group=parallel_state.get_data_parallel_group())
        return value

    @staticmethod
    def max_over_data(value: torch.Tensor) -> torch.Tensor:
        """Take the maximum of `value` over the model replicas (in place)."""
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=parallel_state.get_data_parallel_group())
        return value

    @staticmethod
    def barrier() -> None:
        """Wait for all ranks."""
        dist.barrier()

    @staticmethod
    def close() -> None:
        """Leave all process groups."""
        if dist.is_initialized():
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()
