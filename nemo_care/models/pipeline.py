"""Run micro-batches through Megatron's pipeline schedules.

Replicas that share experts run the same number of passes: one with fewer micro-batches than
another begins with idle ones, and takes part (`accompany`) when it has nothing more to do.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from nemo_care.megatron.experts import most_in_step
from nemo_care.models.video_language_model import ModelInputs

B = TypeVar("B")
R = TypeVar("R")


def _with_idle(batches: Sequence[B]) -> list[B | None]:
    """Put as many idle passes (None) before the micro-batches as replicas in step have more."""
    return [None] * (most_in_step(len(batches)) - len(batches)) + list(batches)


def _inputs(
    model: torch.nn.Module, batch: B | None, inputs_of: Callable[[B], ModelInputs]
) -> ModelInputs:
    if batch is not None:
        return inputs_of(batch)
    return getattr(model, "module", model).idle_inputs()  # type: ignore[operator]


def accompany(model: torch.nn.Module) -> None:
    """Run idle passes until no replica that shares experts with this one runs a pass.

    All of them call it at the end of a phase in which the number of their passes differs.
    """
    while count := most_in_step(0):
        _forward(model, [None] * count, lambda batch: batch, lambda hidden, batch: None)


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
    every = _with_idle(batches)
    return _forward(model, every, inputs_of, result_of)[len(every) - len(batches) :]


def _forward(
    model: torch.nn.Module,
    batches: Sequence[B | None],
    inputs_of: Callable[[B], ModelInputs],
    result_of: Callable[[torch.Tensor, B], R],
) -> list[R]:
    if not batches:
        return []

    def step(iterator, stage):
        batch = next(iterator)
        output = stage(_inputs(stage, batch, inputs_of))
        # With non_loss_data=True, the schedule calls this and collects the results.
        return (
            output,
            lambda hidden, non_loss_data: None if batch is None else result_of(hidden, batch),
        )

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
    every = _with_idle(batches)
    count = len(every)

    def step(iterator, stage):
        batch = next(iterator)
        output = stage(_inputs(stage, batch, inputs_of))

        def loss(hidden: torch.Tensor) -> tuple[torch.Tensor, R | None]:
            if batch is None:
                return hidden.sum() * 0.0, None
            share, collected = loss_of(hidden, batch)
            # The schedule divides by the number of micro-batches: it expects means, not shares.
            return share * count, collected

        return output, loss

    results = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter(every),
        model=model,
        num_microbatches=count,
        seq_length=1,
        micro_batch_size=1,
        forward_only=False,
    )
    return results[count - len(batches) :]
