"""Qwen2.5-VL as a `Family`. Megatron is imported only to build a model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from transformers import Qwen2_5_VLConfig

from nemo_care.data.patches import Grid
from nemo_care.models.families.config_keys import refusing, transformers_config
from nemo_care.models.families.patches import PatchSize
from nemo_care.models.families.processor_files import check_processor_files
from nemo_care.models.families.qwen2_5_vl import engine
from nemo_care.models.families.qwen2_5_vl.config_checks import (
    MODEL_TYPE,
    NAME,
    check_stated,
    check_values,
)
from nemo_care.models.families.qwen2_5_vl.prompt import Qwen25VLPrompt
from nemo_care.models.families.qwen2_5_vl.weights import WEIGHTS
from nemo_care.models.families.qwen_vl import QwenVLFamily

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig

    from nemo_care.models.families.qwen2_5_vl.model import Qwen25VL


class Qwen25VLFamily(QwenVLFamily):
    """A Qwen2.5-VL of any size; `hf` is transformers' configuration of it."""

    model_type = MODEL_TYPE
    name = NAME
    weights = WEIGHTS
    own_text = ("intermediate_size",)
    own_vision = ("tokens_per_second", "window_size", "fullatt_block_indexes")
    prompt: Qwen25VLPrompt

    def __init__(self, hf: Qwen2_5_VLConfig) -> None:
        """`hf` is one that `read` has checked, or as good."""
        text, vision = hf.text_config, hf.vision_config
        super().__init__(
            hf,
            head_dim=text.hidden_size // text.num_attention_heads,
            ffn_size=text.intermediate_size,
        )
        self.prompt = Qwen25VLPrompt.of(
            hf, PatchSize.of(vision), tokens_per_second=vision.tokens_per_second
        )

    @classmethod
    def read(cls, folder: Path, raw: Mapping[str, Any], *, key: str) -> Self:
        """As `Family.read`."""
        refuse = refusing(folder, key)
        check_stated(raw, refuse)
        hf = transformers_config(Qwen2_5_VLConfig, folder, raw)
        check_values(raw, hf, refuse)
        check_processor_files(folder, PatchSize.of(hf.vision_config), NAME, key=key)
        return cls(hf)

    def block_flops(self) -> int:
        """As `QwenVLFamily.block_flops`."""
        vision = self.hf.vision_config
        return (8 * vision.hidden_size + 6 * vision.intermediate_size) * vision.hidden_size

    def attended_pairs(self, grids: Sequence[Grid]) -> int:
        """As `QwenVLFamily.attended_pairs`: in windows, and in some blocks per frame."""
        vision = self.hf.vision_config
        window = (vision.window_size // vision.patch_size) ** 2
        whole = len(vision.fullatt_block_indexes)
        # A window at the edge of a frame is smaller.
        windowed = sum(t * h * w * min(window, h * w) for t, h, w in grids)
        framed = sum(t * (h * w) ** 2 for t, h, w in grids)
        return (vision.depth - whole) * windowed + whole * framed

    def megatron_settings(self) -> dict[str, Any]:
        """As `Family.megatron_settings`."""
        return super().megatron_settings() | {"add_qkv_bias": True}

    def build(self, config: "TransformerConfig", backend: str = "auto") -> "Qwen25VL":
        """As `Family.build`."""
        from nemo_care.models.families.qwen2_5_vl.model import Qwen25VL

        return Qwen25VL(self, config, backend)

    def processor_files(self, max_pixels: int) -> dict[str, dict[str, Any]]:
        """As `Family.processor_files`."""
        return engine.processor_files(self.prompt.patching, max_pixels)

    def video_fps(self, grid: Grid, seconds_per_grid: float) -> float:
        """As `Family.video_fps`."""
        return engine.video_fps(self.prompt, grid, seconds_per_grid)
