"""The inputs of a plan: the model's shape, and the lengths of prompts and completions."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from nemo_care.data.media import MediaSettings
from nemo_care.data.patches import Grid
from nemo_care.data.prompts import Prompt
from nemo_care.data.samples import Sample
from nemo_care.errors import InputError
from nemo_care.groups.group import Completion, Group
from nemo_care.models.architecture import Architecture
from nemo_care.models.families import read_family
from nemo_care.models.family import Family
from nemo_care.recipe.schema import Recipe

_CONFIGURATIONS = Path(__file__).parent / "configurations"
# Tokens of the chat template, the question, its options and the answer's form.
_TEXT_TOKENS = 256
# The answer's letter is this many tokens from a completion's end, with the tags around it.
_ANSWER_FROM_END = (5, 3)
_COMMON_FRAME = (1080, 1920)


@dataclass(frozen=True)
class ModelShape:
    """A model as its family describes it, and the source of its configuration."""

    family: Family
    source: str

    @property
    def architecture(self) -> Architecture:
        """The model's sizes."""
        return self.family.architecture


def read_model_shape(hf_path: str) -> ModelShape:
    """Read the configuration in `model.hf_path`, or the public one of the same folder name.

    Raises:
        InputError: neither exists.
    """
    if (Path(hf_path) / "config.json").is_file():
        return ModelShape(read_family(hf_path), f"{hf_path}/config.json")
    packaged = _CONFIGURATIONS / Path(hf_path).name
    if not packaged.is_dir():
        names = ", ".join(sorted(folder.name for folder in _CONFIGURATIONS.iterdir()))
        raise InputError(
            f"model.hf_path={hf_path}: no config.json there, and no public configuration is called "
            f"{Path(hf_path).name}; give a checkpoint's directory or a path that ends in one of "
            f"{names}"
        )
    return ModelShape(read_family(packaged), f"public configuration of {packaged.name}")


@dataclass(frozen=True)
class Lengths:
    """A prompt of P tokens, some of them for the videos in `grids`, and C per completion."""

    prompt: int
    completion: int
    vision: int
    grids: tuple[Grid, ...]

    @property
    def patches(self) -> int:
        """Patches of all videos of the prompt."""
        return sum(t * h * w for t, h, w in self.grids)

    @property
    def prompt_only(self) -> "Lengths":
        """The prompt without completions."""
        return replace(self, completion=0)

    @property
    def text_only(self) -> "Lengths":
        """As many tokens, none of them of a video."""
        return replace(self, vision=0, grids=())


def frame_bytes(lengths: Lengths, family: Family) -> int:
    """Bytes of the resized frames of one prompt, uint8."""
    return sum(math.prod(family.prompt.patching.frame_shape(grid)) for grid in lengths.grids)


def lengths_of(recipe: Recipe, family: Family, prompt: int, completion: int) -> Lengths:
    """Return a prompt of some text and videos, each as large as the recipe allows."""
    patching = family.prompt.patching
    media = MediaSettings.of(recipe.data, patching)
    _, height, width = patching.grid(patching.frames, *_COMMON_FRAME, media.video_pixels)
    room = prompt - min(_TEXT_TOKENS, prompt // 2)
    steps = room // patching.tokens((1, height, width))
    longest = max(media.frames.max_frames // patching.frames, 1)
    counts = [longest] * (steps // longest) + ([steps % longest] if steps % longest else [])
    grids = tuple((count, height, width) for count in counts)
    return Lengths(prompt, completion, sum(map(patching.tokens, grids)), grids)


def longest_lengths(recipe: Recipe, family: Family) -> Lengths:
    """Return the longest prompt and completions that the recipe allows."""
    return lengths_of(
        recipe, family, recipe.data.max_prompt_tokens, recipe.rollout.max_completion_tokens
    )


def typical_lengths(
    recipe: Recipe, family: Family, prompt: int | None, completion: int | None
) -> Lengths:
    """Return the lengths for time estimates: as given, or one full video and half of C."""
    patching = family.prompt.patching
    media = MediaSettings.of(recipe.data, patching)
    grid = patching.grid(media.frames.max_frames, *_COMMON_FRAME, media.video_pixels)
    one_video = patching.tokens(grid)
    longest = recipe.data.max_prompt_tokens
    return lengths_of(
        recipe,
        family,
        prompt or min(one_video + min(_TEXT_TOKENS, one_video), longest),
        completion or max(recipe.rollout.max_completion_tokens // 2, 1),
    )


def made_prompt(lengths: Lengths, family: Family, index: int) -> Prompt:
    """Make a prompt of these lengths; its frames are on `meta`."""
    return Prompt(
        index=index,
        sample=Sample(str(index), "", ""),
        token_ids=torch.zeros(lengths.prompt, dtype=torch.long),
        position_ids=torch.arange(lengths.prompt).expand(3, -1),
        is_vision=torch.arange(lengths.prompt) < lengths.vision,
        frames=tuple(
            torch.empty(family.prompt.patching.frame_shape(grid), dtype=torch.uint8, device="meta")
            for grid in lengths.grids
        ),
        grid_thw=torch.tensor(lengths.grids) if lengths.grids else None,
    )


def made_group(lengths: Lengths, family: Family, index: int, size: int) -> Group:
    """Make a group of these lengths whose completions all have a short answer."""
    count = lengths.completion
    begin, end = (max(count - distance, 0) for distance in _ANSWER_FROM_END)
    completions = [
        Completion(
            token_ids=torch.zeros(count, dtype=torch.long),
            log_probs=torch.zeros(count),
            text="",
            ended=True,
            answer_span=(begin, end) if begin < end else None,
        )
        for _ in range(size)
    ]
    ones = torch.ones(size)
    return Group(
        made_prompt(lengths, family, index),
        completions,
        rewards={"accuracy": ones, "format": ones},
        base_reward=ones,
        advantage=ones,
    )
