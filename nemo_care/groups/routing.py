"""Where the tokens of a micro-batch's rows are, and the experts recorded for them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core import parallel_state

from nemo_care.megatron.cpu import compute_device
from nemo_care.models.architecture import UNRECORDED
from nemo_care.models.expert_routing import TrainingPass
from nemo_care.models.video_language_model import VideoLanguageModel


@dataclass(frozen=True)
class Span:
    """The tokens [start, stop) of a row: a prompt or a completion.

    `experts` int16 [tokens, layers, top_k] are those recorded for them, if any were.
    """

    row: int
    start: int
    stop: int
    experts: torch.Tensor | None = None


def training_pass(
    spans: Sequence[Span], shape: torch.Size, model: VideoLanguageModel, *, replay: bool
) -> TrainingPass:
    """Return the routing of rows [B, S] for this rank's stage and its part of the sequence.

    It counts the tokens of the spans; what is not in any, such as padding, goes where the router
    sends it. With `replay`, recorded experts are used.
    """
    counted = torch.zeros(shape)
    recorded = None
    first, count = model.first_layer, len(model.language_model.decoder.layers)
    for span in spans:
        counted[span.row, span.start : span.stop] = 1
        if not replay or span.experts is None:
            continue
        own = span.experts[:, first : first + count]
        if recorded is None:
            recorded = own.new_full((*shape, *own.shape[1:]), UNRECORDED)
        recorded[span.row, span.start : span.stop] = own
    return TrainingPass(
        _of_this_rank(counted, model),
        None if recorded is None else _of_this_rank(recorded, model),
    )


def _of_this_rank(values: torch.Tensor, model: VideoLanguageModel) -> torch.Tensor:
    """Return [B, S, ...] in the order of hidden states [S, B, H], as sequence parallelism cuts."""
    flat = values.transpose(0, 1).flatten(0, 1)
    if model.config.sequence_parallel:
        size = parallel_state.get_tensor_model_parallel_world_size()
        flat = flat.chunk(size)[parallel_state.get_tensor_model_parallel_rank()]
    return flat.to(compute_device())
