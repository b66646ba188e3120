"""Qwen2.5-VL as a `Family`. Megatron is imported only to build a model."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from transformers import Qwen2_5_VLConfig

from nemo_care.data.patches import Grid
from nemo_care.models.architecture import Architecture, VisionArchitecture
from nemo_care.models.families.qwen2_5_vl import engine
from nemo_care.models.families.qwen2_5_vl.config import read_config, signature
from nemo_care.models.families.qwen2_5_vl.config_checks import MODEL_TYPE
from nemo_care.models.families.qwen2_5_vl.prompt import Qwen25VLPrompt
from nemo_care.models.families.qwen2_5_vl.weights import WEIGHTS
from nemo_care.models.family import Family

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig

    from nemo_care.models.families.qwen2_5_vl.model import Qwen25VL


class Qwen25VLFamily(Family):
    """A Qwen2.5-VL of any size; `hf` is transformers' configuration of it."""

    model_type = MODEL_TYPE
    name = "Qwen2.5-VL"
    weights = WEIGHTS
    # Windows, whole attention and rotations know height and width of a frame only.
    computes_frames_apart = True
    prompt: Qwen25VLPrompt

    def __init__(self, hf: Qwen2_5_VLConfig) -> None:
        """`hf` is one that `read` has checked, or as good."""
        self.hf = hf
        self.prompt = Qwen25VLPrompt.of(hf)
        text, vision = hf.text_config, hf.vision_config
        self.architecture = Architecture(
            layers=text.num_hidden_layers,
            hidden_size=text.hidden_size,
            head_dim=text.hidden_size // text.num_attention_heads,
            heads=text.num_attention_heads,
            kv_heads=text.num_key_value_heads,
            ffn_size=text.intermediate_size,
            vocab_size=text.vocab_size,
            max_positions=text.max_position_embeddings,
            tied=bool(hf.tie_word_embeddings),
            vision=VisionArchitecture(vision.num_heads, vision.intermediate_size),
        )

    @classmethod
    def read(cls, folder: Path, raw: Mapping[str, Any], *, key: str) -> Self:
        """As `Family.read`."""
        return cls(read_config(folder, raw, key=key))

    def signature(self) -> dict[str, Any]:
        """As `Family.signature`."""
        return signature(self.hf)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """As `Family.tensor_shapes`: those of Hugging Face's own model."""
        import torch
        from transformers import Qwen2_5_VLForConditionalGeneration

        with torch.device("meta"):
            model = Qwen2_5_VLForConditionalGeneration._from_config(copy.deepcopy(self.hf))
        names = self.weights.disk_name
        return {names(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}

    def vision_flops(self, grids: Sequence[Grid]) -> float:
        """As `Family.vision_flops`: attention in windows, in some blocks per frame."""
        vision = self.hf.vision_config
        width, patches = vision.hidden_size, sum(t * h * w for t, h, w in grids)
        embed = 2 * patches * self.prompt.patching.values
        block = 8 * width + 6 * vision.intermediate_size
        window = (vision.window_size // vision.patch_size) ** 2
        whole = len(vision.fullatt_block_indexes)
        # A window at the edge of a frame is smaller.
        windowed = sum(t * h * w * min(window, h * w) for t, h, w in grids)
        framed = sum(t * (h * w) ** 2 for t, h, w in grids)
        attention = 4 * width * ((vision.depth - whole) * windowed + whole * framed)
        blocks = vision.depth * patches * block * width
        return float(embed * width + blocks + attention) + self.merger_flops(grids)

    def merger_flops(self, grids: Sequence[Grid]) -> float:
        """As `Family.merger_flops`."""
        vision = self.hf.vision_config
        merged = vision.spatial_merge_size**2 * vision.hidden_size
        tokens = sum(map(self.prompt.patching.tokens, grids))
        return float(2 * tokens * merged * (merged + vision.out_hidden_size))

    def megatron_settings(self) -> dict[str, Any]:
        """As `Family.megatron_settings`."""
        text = self.hf.text_config
        return {
            "add_qkv_bias": True,
            "layernorm_epsilon": text.rms_norm_eps,
            "mrope_section": list(text.rope_parameters["mrope_section"]),
        }

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
