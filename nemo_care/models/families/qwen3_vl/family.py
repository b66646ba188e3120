"""Qwen3-VL as a `Family`. Megatron is imported only to build a model."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from nemo_care.data.patches import Grid
from nemo_care.models.architecture import Architecture, Experts, VisionArchitecture
from nemo_care.models.families.qwen3_vl import engine
from nemo_care.models.families.qwen3_vl.config import read_config, signature
from nemo_care.models.families.qwen3_vl.config_checks import DENSE, EXPERTS, NAME, Config, Kind
from nemo_care.models.families.qwen3_vl.prompt import Qwen3VLPrompt
from nemo_care.models.families.qwen3_vl.weights import EXPERT_WEIGHTS, WEIGHTS
from nemo_care.models.family import Family

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig

    from nemo_care.models.families.qwen3_vl.model import Qwen3VL


class Qwen3VLFamily(Family):
    """A Qwen3-VL of any size without experts; `hf` is transformers' configuration of it."""

    kind: ClassVar[Kind] = DENSE
    model_type = DENSE.model_type
    name = NAME
    weights = WEIGHTS
    computes_frames_apart = True
    prompt: Qwen3VLPrompt

    def __init__(self, hf: Config) -> None:
        """`hf` is one that `read` has checked, or as good."""
        self.hf = hf
        self.prompt = Qwen3VLPrompt.of(hf)
        text, vision = hf.text_config, hf.vision_config
        experts = None
        if self.kind is EXPERTS:
            experts = Experts(text.num_experts, text.num_experts_per_tok)
        self.architecture = Architecture(
            layers=text.num_hidden_layers,
            hidden_size=text.hidden_size,
            head_dim=text.head_dim,
            heads=text.num_attention_heads,
            kv_heads=text.num_key_value_heads,
            ffn_size=text.moe_intermediate_size if experts else text.intermediate_size,
            vocab_size=text.vocab_size,
            max_positions=text.max_position_embeddings,
            tied=bool(hf.tie_word_embeddings),
            vision=VisionArchitecture(vision.num_heads, vision.intermediate_size),
            deep_levels=len(vision.deepstack_visual_indexes),
            experts=experts,
        )

    @classmethod
    def read(cls, folder: Path, raw: Mapping[str, Any], *, key: str) -> Self:
        """As `Family.read`."""
        return cls(read_config(folder, raw, cls.kind, key=key))

    def signature(self) -> dict[str, Any]:
        """As `Family.signature`."""
        return signature(self.hf, self.kind)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """As `Family.tensor_shapes`: those of Hugging Face's own model."""
        import torch
        import transformers

        whole = getattr(transformers, self.kind.architecture)
        with torch.device("meta"):
            model = whole._from_config(copy.deepcopy(self.hf))
        return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}

    def vision_flops(self, grids: Sequence[Grid]) -> float:
        """As `Family.vision_flops`: attention within each frame, and a merger per deep level."""
        vision = self.hf.vision_config
        width, patches = vision.hidden_size, sum(t * h * w for t, h, w in grids)
        embed = 2 * patches * self.prompt.patching.values * width
        block = patches * (8 * width + 4 * vision.intermediate_size) * width
        attention = 4 * width * sum(t * (h * w) ** 2 for t, h, w in grids)
        return float(embed + vision.depth * (block + attention)) + self.merger_flops(grids)

    def merger_flops(self, grids: Sequence[Grid]) -> float:
        """As `Family.merger_flops`."""
        vision = self.hf.vision_config
        merged = vision.spatial_merge_size**2 * vision.hidden_size
        tokens = sum(map(self.prompt.patching.tokens, grids))
        merge = 2 * tokens * merged * (merged + vision.out_hidden_size)
        return float((1 + self.architecture.deep_levels) * merge)

    def megatron_settings(self) -> dict[str, Any]:
        """As `Family.megatron_settings`."""
        text = self.hf.text_config
        return {
            "qk_layernorm": True,
            "layernorm_epsilon": text.rms_norm_eps,
            "mrope_section": list(text.rope_parameters["mrope_section"]),
        }

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
    engine_config: ClassVar[Mapping[str, Any]] = {"text_config": {"norm_topk_prob": True}}
