"""Models whose vision tower has mergers, which can run without it.

A merger turns the states of the patches of a vision token, which are next to each other, into the
token's features. With a frozen tower and trained mergers, only the latter run more than once.
"""

from abc import abstractmethod

import torch

from nemo_care.models.video_language_model import ModelInputs, VideoLanguageModel


class MergingModel(VideoLanguageModel):
    """A model with a vision tower of transformers; its features are those of all mergers, one
    beside the other."""

    @property
    @abstractmethod
    def mergers(self) -> list[torch.nn.Module]:
        """The tower's mergers, in the order of the features."""

    def merger_inputs(self, inputs: ModelInputs) -> torch.Tensor:
        """As `VideoLanguageModel.merger_inputs`."""

        def not_merged(states: torch.Tensor) -> torch.Tensor:
            """One row for the patches of each token, of states [patches, M]."""
            return states.reshape(len(states) // self.visual.spatial_merge_unit, -1)

        for merger in self.mergers:
            merger.forward = not_merged
        try:
            return self.vision_features(inputs)
        finally:
            for merger in self.mergers:
                del merger.forward

    def merged(self, states: torch.Tensor) -> torch.Tensor:
        """As `VideoLanguageModel.merged`."""
        parts = states.chunk(len(self.mergers), dim=1)
        of_patches = [x.reshape(len(x) * self.visual.spatial_merge_unit, -1) for x in parts]
        return torch.cat(
            [merger(own) for merger, own in zip(self.mergers, of_patches, strict=True)], dim=1
        )
