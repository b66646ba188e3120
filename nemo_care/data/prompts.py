"""A sample becomes a prompt: chat template, decoded vision patches, positions."""

import string
from dataclasses import dataclass, replace

import torch
from transformers import Qwen2_5_VLConfig

from nemo_care.data.positions import Grid, mrope_positions
from nemo_care.data.samples import Sample
from nemo_care.data.tokenizer import ChatTokenizer
from nemo_care.data.video import VideoSampling, frames_to_patches, read_image, read_video
from nemo_care.data_config import DataConfig
from nemo_care.errors import InputError

# Our own wording; a recipe replaces it with data.prompt_template.
DEFAULT_TEMPLATE = (
    "{question}\n{options}\n"
    "Think aloud first: write down, step by step, what you observe and how it leads you to an "
    "answer, inside <think> </think>. Then give only the final answer inside <answer> </answer>. "
    "{answer_hint}"
)
ANSWER_HINTS = {
    "multiple choice": "The answer is a single option letter, such as <answer>A</answer>.",
    "numerical": "The answer is a number, such as <answer>3.14</answer>.",
    "OCR": "The answer is the transcribed text.",
    "free-form": "The answer is a short free text.",
    "regression": "The answer is a number, such as <answer>42</answer>.",
}


class PromptTooLong(InputError):
    """A prompt with more tokens than data.max_prompt_tokens."""


@dataclass
class Prompt:
    """One prompt of P tokens, ready for the model.

    `index` is the prompt's place in the training stream or the validation file: the seed of its
    sampling, whichever rank it lands on. `token_ids` is [P], `position_ids` [3, P], `is_vision`
    bool [P] (True at the tokens that stand for a vision feature), `pixel_values`
    [patches, 3 * temporal_patch * patch * patch] and `grid_thw` [items, 3], in order of
    appearance; both None for a text-only prompt.
    """

    index: int
    sample: Sample
    token_ids: torch.Tensor
    position_ids: torch.Tensor
    is_vision: torch.Tensor
    pixel_values: torch.Tensor | None
    grid_thw: torch.Tensor | None

    @property
    def length(self) -> int:
        """P, tokens of the prompt."""
        return len(self.token_ids)

    def continued_positions(self, count: int) -> torch.Tensor:
        """Positions [3, count] of the completion's tokens: text goes on after the prompt."""
        first = int(self.position_ids.max()) + 1
        return torch.arange(first, first + count).expand(3, -1)


def check_template(template: str) -> str:
    """Refuse a prompt template with unknown fields or without the question.

    Raises:
        InputError: names the field.
    """
    fields = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    unknown = fields - {"question", "options", "answer_hint"}
    if unknown or "question" not in fields:
        problem = f"unknown field {{{min(unknown)}}}" if unknown else "{question} is missing"
        raise InputError(
            f"data.prompt_template: {problem}; use {{question}}, {{options}}, {{answer_hint}}"
        )
    return template


class PromptBuilder:
    """Makes prompts for one model."""

    def __init__(self, config: DataConfig, hf: Qwen2_5_VLConfig, tokenizer: ChatTokenizer) -> None:
        """Raises InputError for an unusable template."""
        self.config = config
        self.hf = hf
        self.tokenizer = tokenizer
        self.template = check_template(config.prompt_template or DEFAULT_TEMPLATE)
        video = config.video
        self.sampling = VideoSampling(
            fps=video.fps,
            min_frames=video.min_frames,
            max_frames=video.max_frames,
            min_pixels=video.min_pixels,
            max_pixels=video.max_pixels,
        )
        self.image_sampling = replace(
            self.sampling,
            min_pixels=config.image.min_pixels,
            max_pixels=config.image.max_pixels,
        )

    def build(self, index: int, sample: Sample) -> Prompt:
        """Decode and tokenise.

        Raises:
            UnreadableMedia: a video or image can't be decoded.
            PromptTooLong: more tokens than data.max_prompt_tokens; nothing is ever cut.
        """
        vision = self.hf.vision_config
        pixels: list[torch.Tensor] = []
        grids: list[Grid] = []
        seconds: list[float] = []
        for path in sample.videos:
            video = read_video(path, self.sampling)
            seconds.append(video.seconds_per_grid)
            self._add_patches(video.frames, self.sampling, pixels, grids)
        for path in sample.images:
            seconds.append(0.0)
            self._add_patches(read_image(path), self.image_sampling, pixels, grids)
        token_ids = self._token_ids(sample, grids)
        if len(token_ids) > self.config.max_prompt_tokens:
            raise PromptTooLong(
                f"prompt {sample.sample_id} has {len(token_ids)} tokens, more than "
                f"data.max_prompt_tokens={self.config.max_prompt_tokens}; lower "
                "data.video.max_frames or data.video.max_pixels"
            )
        ids = torch.tensor(token_ids)
        positions = mrope_positions(
            ids,
            grids,
            seconds,
            image_token_id=self.hf.image_token_id,
            video_token_id=self.hf.video_token_id,
            merge_size=vision.spatial_merge_size,
            tokens_per_second=vision.tokens_per_second,
        )
        return Prompt(
            index=index,
            sample=sample,
            token_ids=ids,
            position_ids=positions,
            is_vision=(ids == self.hf.video_token_id) | (ids == self.hf.image_token_id),
            pixel_values=torch.cat(pixels) if pixels else None,
            grid_thw=torch.tensor(grids) if grids else None,
        )

    def _add_patches(
        self,
        frames: torch.Tensor,
        sampling: VideoSampling,
        pixels: list[torch.Tensor],
        grids: list[Grid],
    ) -> None:
        vision = self.hf.vision_config
        patches, grid = frames_to_patches(
            frames,
            sampling,
            patch_size=vision.patch_size,
            merge_size=vision.spatial_merge_size,
            temporal_patch_size=vision.temporal_patch_size,
        )
        pixels.append(patches)
        grids.append(grid)

    def _token_ids(self, sample: Sample, grids: list[Grid]) -> list[int]:
        """The chat with one vision token per merged patch; videos come before images and text."""
        text = self.template.format(
            question=sample.question,
            options="\n".join(f"{letter}. {text}" for letter, text in sample.options.items()),
            answer_hint=ANSWER_HINTS.get(sample.problem_type, ""),
        )
        content: list[dict[str, str]] = [
            *({"type": "video", "video": ""} for _ in sample.videos),
            *({"type": "image", "image": ""} for _ in sample.images),
            {"type": "text", "text": text},
        ]
        chat = self.tokenizer.base.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        counts = iter(t * h * w // self.hf.vision_config.spatial_merge_size**2 for t, h, w in grids)
        expanded: list[int] = []
        for token in self.tokenizer.encode(chat):
            is_vision = token in (self.hf.video_token_id, self.hf.image_token_id)
            expanded.extend([token] * (next(counts, 1) if is_vision else 1))
        return expanded
