"""The interface of a model family: everything specific to one kind of checkpoint.

A family is a folder in `families/`. All other code uses the parts of `Family`, its `Architecture`
and the `VideoLanguageModel` that it builds.
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
    # Some commands need a checkpoint's sizes and prompts, but not Megatron.
    from megatron.core.transformer import TransformerConfig

    from nemo_care.models.video_language_model import VideoLanguageModel


class Family(ABC):
    """One checkpoint's model, described by its family.

    Attributes:
        model_type: the family's name in config.json.
        name: the family's name in messages.
        architecture: the model's sizes.
        prompt: how videos and images are represented in a prompt and cut into patches.
        weights: which tensors of a checkpoint fill which parameters.
        computes_frames_apart: whether the vision tower computes each frame of a video (each step
            of its grid) as if it were an image of its own, so that frames can be dealt to ranks.
        engine_config: keys of config.json that vLLM needs and transformers does not write.
    """

    model_type: ClassVar[str]
    name: ClassVar[str]
    weights: ClassVar[WeightTable]
    computes_frames_apart: ClassVar[bool] = False
    engine_config: ClassVar[Mapping[str, Any]] = {}
    architecture: Architecture
    prompt: PromptFormat

    @classmethod
    @abstractmethod
    def read(cls, folder: Path, raw: Mapping[str, Any], *, key: str) -> Self:
        """Read the model of a Hugging Face directory whose config.json is `raw`.

        `key` is the recipe key that names the folder.

        Raises:
            InputError: config.json or the processor files require something not implemented.
        """

    @abstractmethod
    def signature(self) -> dict[str, Any]:
        """Return what two models must have in common for the weights of one to fit the other.

        The keys are those of config.json; the values can be written as JSON.
        """

    @abstractmethod
    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all tensors of a checkpoint, by their names on disk."""

    @abstractmethod
    def vision_flops(self, grids: Sequence[Grid]) -> float:
        """Return FLOPs of the vision tower's forward pass on videos and images of these grids."""

    def merger_flops(self, grids: Sequence[Grid]) -> float:
        """Return the mergers' part of `vision_flops`; 0 for a tower without mergers."""
        return 0.0

    @abstractmethod
    def megatron_settings(self) -> dict[str, Any]:
        """Return arguments of Megatron's `TransformerConfig` that only this family sets."""

    @abstractmethod
    def build(self, config: "TransformerConfig", backend: str = "auto") -> "VideoLanguageModel":
        """Build this rank's part of the model, without meaningful weights."""

    @abstractmethod
    def processor_files(self, max_pixels: int) -> dict[str, dict[str, Any]]:
        """Return files, by name, that make vLLM cut frames as `prompt.patching` does.

        Frames of up to `max_pixels` must not be resized, because they have their final size.
        """

    @abstractmethod
    def video_fps(self, grid: Grid, seconds_per_grid: float) -> float:
        """Return the frame rate with which vLLM computes the positions of `prompt.positions`.

        Raises:
            RunFailed: there is no such rate.
        """

    def frame_numbers(self, times: Sequence[float], count: int) -> list[float]:
        """Return the numbers by which vLLM gets the time of a video's frames, in its frame rate.

        `times` are the seconds of the frames since the first, `count` the number of frames.
        """
        return list(range(count))
