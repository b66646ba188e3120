"""Run micro-batches through Megatron's pipeline schedules."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from nemo_care.models.video_language_model import ModelInputs

B = TypeVar("B")
R = TypeVar("R")


def forward_only(
    model: torch.nn.Module,
    batches: Sequence[B],
    inputs_of: Callable[[B], ModelInputs],
    result_of: Callable[[torch.Tensor, B], R],
) -> list[R]:
    """Forward all micro-batches without gradients.

    Args:
        model: this rank's stage.
        batches: the micro-batches, equal on all ranks of the model replica.
        inputs_of: the model's inputs of a micro-batch; called right before it is computed, so that
            patches are in memory for the micro-batches in flight only.
        result_of: called on the last stage with the hidden states (see
            `VideoLanguageModel.forward`) and the micro-batch.

    Returns:
        One result per micro-batch on the last pipeline stage; an empty list on the others.
    """

    def step(iterator, stage):
        batch = next(iterator)
        output = stage(inputs_of(batch))
        # With non_loss_data=True, the schedule calls this and collects the results.
        return output, lambda hidden, non_loss_data: result_of(hidden, batch)

    with torch.no_grad():
        return get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iter(batches),
            model=model,
            num_microbatches=len(batches),
            # The stages exchange the actual shapes (variable_seq_lengths).
            seq_length=1,
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )


def forward_backward(
    model: torch.nn.Module,
    batches: Sequence[B],
    inputs_of: Callable[[B], ModelInputs],
    loss_of: Callable[[torch.Tensor, B], tuple[torch.Tensor, R]],
) -> list[R]:
    """Forward and backward over all micro-batches; gradients accumulate in the model's buffers.

    `loss_of` returns this micro-batch's *share* of the loss, such that the shares add up to the
    step's loss, and any result to collect. The other arguments and the result are as in
    `forward_only`.
    """
    count = len(batches)

    def step(iterator, stage):
        batch = next(iterator)
        output = stage(inputs_of(batch))

        def loss(hidden: torch.Tensor) -> tuple[torch.Tensor, R]:
            share, collected = loss_of(hidden, batch)
            # The schedule divides by the number of micro-batches: it expects means, not shares.
            return share * count, collected

        return output, loss

    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter(batches),
        model=model,
        num_microbatches=count,
        seq_length=1,
        micro_batch_size=1,
        forward_only=False,
    )
