"""What the Qwen-VL families share: prompts, sizes and the tensors of transformers' own model."""

import copy
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor

from nemo_care.data.patches import Grid
from nemo_care.models.architecture import Architecture, VisionArchitecture
from nemo_care.models.families.patches import PatchSize
from nemo_care.models.family import Family

# What changes a result, and so has to be equal for the weights of one model to fit another.
_TEXT = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("vocab_size", "rms_norm_eps"),
)
_ROPE = ("rope_theta", "mrope_section")
_VISION = (
    *("depth", "hidden_size", "hidden_act", "intermediate_size", "num_heads", "out_hidden_size"),
    *("patch_size", "spatial_merge_size", "temporal_patch_size"),
)


@dataclass(frozen=True)
class QwenVLPrompt:
    """The fields of a `PromptFormat`, without how media are expanded."""

    patching: PatchSize
    vocab_size: int
    eos_token_id: int | list[int] | None
    placeholders: Mapping[str, int]

    @classmethod
    def of(cls, hf: Any, patching: PatchSize, **own: Any) -> Self:
        """Return the format that config.json describes; `own` are a family's further fields."""
        return cls(
            patching,
            vocab_size=hf.text_config.vocab_size,
            eos_token_id=getattr(hf.text_config, "eos_token_id", None),
            placeholders={"video": hf.video_token_id, "image": hf.image_token_id},
            **own,
        )

    def is_vision(self, token_ids: Tensor) -> Tensor:
        """As `PromptFormat.is_vision`."""
        video, image = self.placeholders["video"], self.placeholders["image"]
        return (token_ids == video) | (token_ids == image)


class QwenVLFamily(Family):
    """A Qwen-VL of any size; `hf` is transformers' configuration of it.

    `own_text` and `own_vision` name further keys of text_config and vision_config that are part of
    the `signature`.
    """

    own_text: ClassVar[tuple[str, ...]]
    own_vision: ClassVar[tuple[str, ...]]
    # Attention and rotations of the tower know height and width of a frame only.
    computes_frames_apart = True

    def __init__(self, hf: Any, **sizes: Any) -> None:
        """`hf` is one that `read` has checked, or as good; `sizes` are those of `Architecture` that
        each family reads differently."""
        self.hf = hf
        text, vision = hf.text_config, hf.vision_config
        self.architecture = Architecture(
            layers=text.num_hidden_layers,
            hidden_size=text.hidden_size,
            heads=text.num_attention_heads,
            kv_heads=text.num_key_value_heads,
            vocab_size=text.vocab_size,
            max_positions=text.max_position_embeddings,
            tied=bool(hf.tie_word_embeddings),
            vision=VisionArchitecture(vision.num_heads, vision.intermediate_size),
            **sizes,
        )

    def signature(self) -> dict[str, Any]:
        """As `Family.signature`."""
        text, vision = self.hf.text_config, self.hf.vision_config
        return {
            "model_type": self.model_type,
            "tie_word_embeddings": self.architecture.tied,
            **{f"text_config.{name}": getattr(text, name) for name in (*_TEXT, *self.own_text)},
            **{f"text_config.rope_parameters.{name}": text.rope_parameters[name] for name in _ROPE},
            **{
                f"vision_config.{name}": _plain(getattr(vision, name))
                for name in (*_VISION, *self.own_vision)
            },
        }

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """As `Family.tensor_shapes`: those of transformers' own model."""
        import torch
        from transformers import AutoModelForImageTextToText

        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(copy.deepcopy(self.hf))
        names = self.weights.disk_name
        return {names(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}

    def vision_flops(self, grids: Sequence[Grid]) -> float:
        """As `Family.vision_flops`."""
        vision = self.hf.vision_config
        width, patches = vision.hidden_size, sum(t * h * w for t, h, w in grids)
        embed = 2 * patches * self.prompt.patching.values * width
        blocks = vision.depth * patches * self.block_flops()
        attention = 4 * width * self.attended_pairs(grids)
        return float(embed + blocks + attention) + self.merger_flops(grids)

    @abstractmethod
    def block_flops(self) -> int:
        """Return FLOPs of a patch in the linear layers of a block of the vision tower."""

    @abstractmethod
    def attended_pairs(self, grids: Sequence[Grid]) -> int:
        """Return how many pairs of query and key all blocks of the vision tower have."""

    def merger_flops(self, grids: Sequence[Grid]) -> float:
        """As `Family.merger_flops`: a merger for the features, and one per deep level."""
        vision = self.hf.vision_config
        merged = vision.spatial_merge_size**2 * vision.hidden_size
        tokens = sum(map(self.prompt.patching.tokens, grids))
        merge = 2 * tokens * merged * (merged + vision.out_hidden_size)
        return float((1 + self.architecture.deep_levels) * merge)

    def megatron_settings(self) -> dict[str, Any]:
        """As `Family.megatron_settings`."""
        text = self.hf.text_config
        return {
            "layernorm_epsilon": text.rms_norm_eps,
            "mrope_section": list(text.rope_parameters["mrope_section"]),
        }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
