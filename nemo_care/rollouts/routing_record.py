"""Record the experts that tokens go to while a batch of completions is decoded."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from nemo_care.models.architecture import UNRECORDED
from nemo_care.models.decoding_cache import PromptPass
from nemo_care.models.expert_routing import RecordedPass, of_all_stages
from nemo_care.models.video_language_model import ModelInputs


class RoutingRecord:
    """Collects the experts of this stage's layers, token by token, on the compute device."""

    def __init__(self, rows: int, max_tokens: int) -> None:
        """Of `rows` completions (N) of at most `max_tokens` (C_max)."""
        self._shape = (rows, max_tokens)
        self._passes: list[RecordedPass] = []
        self._prompts: list[torch.Tensor] = []
        self._completions: torch.Tensor | None = None

    def recorded(self, inputs: ModelInputs) -> ModelInputs:
        """Return the inputs of a pass whose experts are recorded."""
        self._passes.append(RecordedPass())
        return replace(inputs, routing=self._passes[-1])

    def add_prompts(self, passes: Sequence[PromptPass]) -> None:
        """Keep the experts of the prompts, whose `passes` have been forwarded in order."""
        for packed, recorded in zip(passes, self._passes, strict=True):
            experts = recorded.experts()
            self._prompts += [experts[s.start : s.stop] for s in packed.segments]
        self._passes.clear()
        last = self._prompts[-1]
        self._completions = last.new_full((*self._shape, *last.shape[1:]), UNRECORDED)

    def add_tokens(self, rows: torch.Tensor, step: int) -> None:
        """Keep the experts of a token, the number `step` of these `rows`, just forwarded."""
        assert self._completions is not None
        self._completions[rows, step] = self._passes.pop().experts()[: len(rows)]

    def results(self) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Return the experts of all layers, in CPU memory; collective over the stages.

        Of B prompts int16 [P, layers, top_k] each, of N completions [N, C_max, layers, top_k].
        """
        assert self._completions is not None
        prompts = of_all_stages(torch.cat(self._prompts)).cpu()
        lengths = [len(experts) for experts in self._prompts]
        # Each has its own memory, since a group can be sent to another replica.
        of_prompts = [experts.clone() for experts in prompts.split(lengths)]
        return of_prompts, of_all_stages(self._completions).cpu()
