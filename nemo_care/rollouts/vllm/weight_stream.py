"""The policy's weights under Hugging Face's names, one tensor at a time, on every rank."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from nemo_care.models.video_language_model import VideoLanguageModel
from nemo_care.models.weights import iterate_hf_weights
from nemo_care.ranks.process_groups import Ranks


class Described(NamedTuple):
    """One tensor's description, with the attribute names that vLLM reads."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class WeightStream:
    """Yields the model on every rank of a replica, with one tensor in memory at a time.

    `trained_only` leaves out the frozen parts, for engines that have them already.

    Tensor-parallel shards are gathered (`iterate_hf_weights`); tensors of one pipeline stage are
    broadcast to the others. All ranks of the replica iterate together, and those of replicas that
    share its experts. An expert has its own tensors: a fused one would be too large for the GPUs,
    and vLLM reads it as [experts, input, output] only. vLLM's senders use it as their source of
    weights.
    """

    def __init__(self, model: VideoLanguageModel, ranks: Ranks) -> None:
        """Gather nothing yet."""
        self.model = model
        self.ranks = ranks
        self.trained_only = False
        # With frozen parts, and without.
        self._stages: dict[bool, list[list[Described]]] = {}

    def metadata(self) -> list[Described]:
        """The tensors of an iteration, in order.

        The first access, and the first with `trained_only`, is collective like an iteration.
        """
        return [described for stage in self._described() for described in stage]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield names and tensors on this rank's device."""
        stages = self._described()
        own = parallel_state.get_pipeline_model_parallel_rank()
        device = next(self.model.parameters()).device
        for stage, described in enumerate(stages):
            if stage == own:
                for name, tensor in self._own():
                    yield name, self._from_stage(stage, tensor.detach().contiguous())
                continue
            for name, dtype, shape in described:
                yield name, self._from_stage(stage, torch.empty(shape, dtype=dtype, device=device))

    def _own(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iterate_hf_weights(self.model, trained_only=self.trained_only, fused_experts=False)

    def _from_stage(self, stage: int, tensor: torch.Tensor) -> torch.Tensor:
        if self.ranks.layout.pipeline > 1:
            group = parallel_state.get_pipeline_model_parallel_group()
            dist.broadcast(tensor, src=dist.get_process_group_ranks(group)[stage], group=group)
        return tensor

    def _described(self) -> list[list[Described]]:
        if self.trained_only not in self._stages:
            stage = parallel_state.get_pipeline_model_parallel_rank()
            mine = [
                Described(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self._own()
            ]
            # Ranks of one stage have equal descriptions.
            by_stage = dict(self.ranks.gather_in_replica((stage, mine)))
            self._stages[self.trained_only] = [by_stage[stage] for stage in sorted(by_stage)]
        return self._stages[self.trained_only]
