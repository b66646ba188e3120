"""Qwen3-VL as a `Family`. Megatron is imported only to build a model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from nemo_care.data.patches import Grid
from nemo_care.models.architecture import Experts
from nemo_care.models.families.config_keys import refusing, transformers_config
from nemo_care.models.families.processor_files import check_processor_files
from nemo_care.models.families.qwen3_vl import engine
from nemo_care.models.families.qwen3_vl.config_checks import (
    DENSE,
    EXPERTS,
    NAME,
    Config,
    Kind,
    check_stated,
    check_values,
)
from nemo_care.models.families.qwen3_vl.patches import Qwen3PatchSize
from nemo_care.models.families.qwen3_vl.prompt import Qwen3VLPrompt
from nemo_care.models.families.qwen3_vl.weights import EXPERT_WEIGHTS, WEIGHTS
from nemo_care.models.families.qwen_vl import QwenVLFamily

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig

    from nemo_care.models.families.qwen3_vl.model import Qwen3VL


class Qwen3VLFamily(QwenVLFamily):
    """A Qwen3-VL of any size without experts; `hf` is transformers' configuration of it."""

    kind: ClassVar[Kind] = DENSE
    model_type = DENSE.model_type
    name = NAME
    weights = WEIGHTS
    own_text = ("head_dim", *DENSE.sizes)
    own_vision = ("num_position_embeddings", "deepstack_visual_indexes")
    prompt: Qwen3VLPrompt

    def __init__(self, hf: Config) -> None:
        """`hf` is one that `read` has checked, or as good."""
        text = hf.text_config
        experts = None
        if self.kind is EXPERTS:
            experts = Experts(text.num_experts, text.num_experts_per_tok)
        super().__init__(
            hf,
            head_dim=text.head_dim,
            ffn_size=text.moe_intermediate_size if experts else text.intermediate_size,
            deep_levels=len(hf.vision_config.deepstack_visual_indexes),
            experts=experts,
        )
        self.prompt = Qwen3VLPrompt.of(
            hf,
            Qwen3PatchSize.of(hf.vision_config),
            vision_start=hf.vision_start_token_id,
            vision_end=hf.vision_end_token_id,
        )

    @classmethod
    def read(cls, folder: Path, raw: Mapping[str, Any], *, key: str) -> Self:
        """As `Family.read`."""
        refuse = refusing(folder, key)
        check_stated(raw, cls.kind, refuse)
        hf = transformers_config(cls.kind.config, folder, raw)
        check_values(raw, hf, cls.kind, refuse)
        check_processor_files(folder, Qwen3PatchSize.of(hf.vision_config), NAME, key=key)
        return cls(hf)

    def block_flops(self) -> int:
        """As `QwenVLFamily.block_flops`."""
        vision = self.hf.vision_config
        return (8 * vision.hidden_size + 4 * vision.intermediate_size) * vision.hidden_size

    def attended_pairs(self, grids: Sequence[Grid]) -> int:
        """As `QwenVLFamily.attended_pairs`: within each frame."""
        return self.hf.vision_config.depth * sum(t * (h * w) ** 2 for t, h, w in grids)

    def megatron_settings(self) -> dict[str, Any]:
        """As `Family.megatron_settings`."""
        return super().megatron_settings() | {"qk_layernorm": True}

    def build(self, config: "TransformerConfig", backend: str = "auto") -> "Qwen3VL":
        """As `Family.build`."""
        from nemo_care.models.families.qwen3_vl.model import Qwen3VL

        return Qwen3VL(self, config, backend)

    def processor_files(self, max_pixels: int) -> dict[str, dict[str, Any]]:
        """As `Family.processor_files`."""
        return engine.processor_files(self.prompt.patching, max_pixels)

    def video_fps(self, grid: Grid, seconds_per_grid: float) -> float:
        """As `Family.video_fps`: positions do not depend on times, and texts have seconds."""
        return 1.0

    def frame_numbers(self, times: Sequence[float], count: int) -> list[float]:
        """As `Family.frame_numbers`: the seconds themselves."""
        return list(times)


class Qwen3VLMoeFamily(Qwen3VLFamily):
    """A Qwen3-VL of any size whose layers have experts."""

    kind = EXPERTS
    model_type = EXPERTS.model_type
    name = f"{NAME} with experts"
    weights = EXPERT_WEIGHTS
    own_text = ("head_dim", *EXPERTS.sizes)
    engine_config: ClassVar[Mapping[str, Any]] = {"text_config": {"norm_topk_prob": True}}
