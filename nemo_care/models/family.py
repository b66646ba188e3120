"""A model family: everything that is particular to one kind of checkpoint.

A family is a folder in `families/`. All else sees the parts of `Family`, its `Architecture` and
the `VideoLanguageModel` that it builds.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from nemo_care.data.patches import Grid
from nemo_care.data.prompt_format import PromptFormat
from nemo_care.models.architecture import Architecture
from nemo_care.models.weight_table import WeightTable

if TYPE_CHECKING:
    # Some commands need a checkpoint's sizes and prompts, and no Megatron.
    import torch
    from megatron.core.transformer import TransformerConfig

    from nemo_care.models.video_language_model import VideoLanguageModel
    from nemo_care.ranks.process_groups import Layout
    from nemo_care.recipe.model import FP8Config


class Family(ABC):
    """One checkpoint's model, as its family knows it.

    Attributes:
        model_type: what config.json calls the family.
        name: what people call it.
        architecture: the model's sizes.
        prompt: how videos and images are written into a prompt and cut into patches.
        weights: which tensors of a checkpoint fill which parameters.
        computes_frames_apart: whether the vision tower computes each frame of a video (each step
            of its grid) as if it were an image of its own, so that frames can be dealt to ranks.
    """

    model_type: ClassVar[str]
    name: ClassVar[str]
    weights: ClassVar[WeightTable]
    computes_frames_apart: ClassVar[bool] = False
    architecture: Architecture
    prompt: PromptFormat

    @classmethod
    @abstractmethod
    def read(cls, folder: Path, raw: Mapping[str, Any], *, key: str) -> Self:
        """The model of a Hugging Face directory whose config.json is `raw`.

        `key` is the recipe's key that names the folder.

        Raises:
            InputError: config.json or the processor files say something that is not computed here.
        """

    @abstractmethod
    def signature(self) -> dict[str, Any]:
        """What two models must have in common for the weights of one to fit the other.

        By the names of config.json; plain values, which JSON can hold.
        """

    @abstractmethod
    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors of a checkpoint, by their names on disk."""

    @abstractmethod
    def vision_flops(self, grids: Sequence[Grid]) -> float:
        """FLOPs of the vision tower's forward pass on videos and images of these grids."""

    @abstractmethod
    def transformer_config(
        self,
        layout: "Layout",
        dtype: "torch.dtype",
        recompute_granularity: str = "none",
        fp8: "FP8Config | None" = None,
    ) -> "TransformerConfig":
        """Megatron's configuration of the language model.

        `recompute_granularity`: none, selective (the inside of attention) or full (whole layers).
        `fp8`: how the layers compute in 8 bits; None: they don't.

        Raises:
            InputError: the model or the layout does not fit 8-bit products.
        """

    @abstractmethod
    def build(self, config: "TransformerConfig", backend: str = "auto") -> "VideoLanguageModel":
        """This rank's part of the model, without meaningful weights."""

    @abstractmethod
    def processor_files(self, max_pixels: int) -> dict[str, dict[str, Any]]:
        """Files, by name, from which vLLM cuts frames as `prompt.patching` does.

        No frame of up to `max_pixels` may be resized: they come in the size that they shall have.
        """

    @abstractmethod
    def video_fps(self, grid: Grid, seconds_per_grid: float) -> float:
        """The frame rate of a video from which vLLM computes the positions of `prompt.positions`.

        Raises:
            RunFailed: there is none.
        """
