"""Megatron's GPTModel, as the language model of a video-language model uses it."""

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel

from nemo_care.models.decoding_cache import DecodingCache, PromptPass, Rotation
from nemo_care.models.segments import PackedSegments


class LanguageModel(GPTModel):
    """GPTModel that stops before its output layer, which runs on chosen positions only.

    While completions are sampled, the cache rotates queries and keys: Megatron's attention would
    compute the same cosines and sines in every layer, once for queries and once for keys.
    """

    def _preprocess(
        self,
        *args: Any,
        packed_seq_params: PackedSegments | DecodingCache | None = None,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        hidden, angles, *others = super()._preprocess(
            *args, packed_seq_params=packed_seq_params, **kwargs
        )
        # A family that rotates neighbours, or a part of a head, is left to Megatron.
        whole = angles is not None and angles.shape[-1] == self.config.kv_channels
        if (
            isinstance(packed_seq_params, DecodingCache | PromptPass)
            and whole
            and not self.config.rotary_interleaved
        ):
            packed_seq_params.rotation = Rotation(angles, self.config.params_dtype)
            angles = None
        return (hidden, angles, *others)

    def _postprocess(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states
