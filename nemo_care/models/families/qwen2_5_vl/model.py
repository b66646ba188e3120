"""Qwen2.5-VL on Megatron: Hugging Face's vision tower in front of Megatron's GPTModel."""

from typing import TYPE_CHECKING

import torch
from megatron.core.transformer import TransformerConfig

from nemo_care.models.families.mergers import MergingModel
from nemo_care.models.video_language_model import ModelInputs
from nemo_care.models.vision_tower import vision_tower

if TYPE_CHECKING:
    from nemo_care.models.families.qwen2_5_vl.family import Qwen25VLFamily


class Qwen25VL(MergingModel):
    """This rank's part of a Qwen2.5-VL."""

    def __init__(
        self, family: "Qwen25VLFamily", config: TransformerConfig, backend: str = "auto"
    ) -> None:
        """As `VideoLanguageModel`."""
        hf = family.hf
        super().__init__(
            family,
            config,
            backend,
            position_embedding_type="mrope",
            rotary_base=hf.text_config.rope_parameters["rope_theta"],
        )
        if not self.pre_process:
            return
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
            Qwen2_5_VisionTransformerPretrainedModel,
        )

        self._attach_vision_tower(
            vision_tower(Qwen2_5_VisionTransformerPretrainedModel, hf.vision_config, config)
        )

    def vision_features(self, inputs: ModelInputs) -> torch.Tensor:
        """As `VideoLanguageModel.vision_features`."""
        assert inputs.pixel_values is not None
        pixels = inputs.pixel_values.to(self.visual.dtype)
        return self.visual(pixels, grid_thw=inputs.grid_thw).pooler_output

    @property
    def mergers(self) -> list[torch.nn.Module]:
        """As `MergingModel.mergers`."""
        return [self.visual.merger]
