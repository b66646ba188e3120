"""Qwen3-VL on Megatron: Hugging Face's vision tower in front of Megatron's GPTModel."""

from typing import TYPE_CHECKING

import torch
from megatron.core.transformer import TransformerConfig

from nemo_care.models.families.mergers import MergingModel
from nemo_care.models.families.qwen3_vl.rotary import InterleavedRotary
from nemo_care.models.video_language_model import ModelInputs
from nemo_care.models.vision_tower import vision_tower

if TYPE_CHECKING:
    from nemo_care.models.families.qwen3_vl.family import Qwen3VLFamily


class Qwen3VL(MergingModel):
    """This rank's part of a Qwen3-VL."""

    def __init__(
        self, family: "Qwen3VLFamily", config: TransformerConfig, backend: str = "auto"
    ) -> None:
        """As `VideoLanguageModel`."""
        hf = family.hf
        super().__init__(family, config, backend, position_embedding_type="mrope")
        rope = hf.text_config.rope_parameters
        self.language_model.rotary_pos_emb = InterleavedRotary(
            family.architecture.head_dim, rope["rope_theta"], rope["mrope_section"]
        )
        if not self.pre_process:
            return
        from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

        self._attach_vision_tower(vision_tower(Qwen3VLVisionModel, hf.vision_config, config))

    def vision_features(self, inputs: ModelInputs) -> torch.Tensor:
        """As `VideoLanguageModel.vision_features`."""
        assert inputs.pixel_values is not None
        pixels = inputs.pixel_values.to(self.visual.dtype)
        output = self.visual(pixels, grid_thw=inputs.grid_thw)
        return torch.cat([output.pooler_output, *output.deepstack_features], dim=1)

    @property
    def mergers(self) -> list[torch.nn.Module]:
        """As `MergingModel.mergers`."""
        return [self.visual.merger, *self.visual.deepstack_merger_list]
