"""Compute batches of the miniature's one prompt layout on Hugging Face's model.

The layout is the family's: its prompt format places the video's tokens and numbers the positions.
"""

import functools
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nemo_care.data.media import Media
from nemo_care.data.prompt_format import PromptFormat
from nemo_care.miniature.vocabulary import encode
from nemo_care.miniature.world import FRAMES, FRAMES_PER_SECOND, GRID, SECONDS_PER_GRID
from nemo_care.models.families import FAMILIES
from tiny_model import tiny_config

_VIDEO = Media(
    grids=[GRID],
    seconds_per_grid=[SECONDS_PER_GRID],
    prompt_times=[tuple(frame / FRAMES_PER_SECOND for frame in range(FRAMES))],
)


@functools.lru_cache
def prompt_format(model_type: str) -> PromptFormat:
    """Return how the miniature of a family represents its video in a prompt."""
    raw = tiny_config(model_type).to_diff_dict()
    return FAMILIES[model_type].read(Path(__file__).parent, raw, key="tiny_config").prompt


@functools.lru_cache
def _before_question(model_type: str) -> tuple[int, ...]:
    chat = encode("<|im_start|> user <|vision_start|> <|video_pad|> <|vision_end|>")
    return tuple(prompt_format(model_type).expanded(chat, _VIDEO, encode))


def prompt_token_ids(model_type: str, question: str) -> list[int]:
    """Return the prompt as written by the chat template and expanded by the family: [P]."""
    return [
        *_before_question(model_type),
        *encode(f"{question} <|im_end|> <|im_start|> assistant"),
    ]


def patches(model_type: str, frames: Tensor) -> Tensor:
    """Cut uint8 videos [N, T, SIDE, SIDE, 3] into patches [N, patches of a video, values].

    The frames of all videos are cut as one long video: no temporal patch spans two of them.
    """
    patching = prompt_format(model_type).patching
    return patching.patches(frames.flatten(0, 1)).unflatten(0, (len(frames), -1))


@functools.lru_cache
def prompt_positions(model_type: str, length: int) -> Tensor:
    """Return the mRoPE positions [3, length] of a sequence; all of the miniature's begin alike."""
    token_ids = torch.tensor(_before_question(model_type))
    text = torch.zeros(length - len(token_ids), dtype=torch.long)
    return prompt_format(model_type).positions(torch.cat([token_ids, text]), _VIDEO)


def completion_logits(
    model: PreTrainedModel,
    pixel_values: Tensor,
    token_ids: Tensor,
    completion_tokens: int,
) -> Tensor:
    """Return the logits that predict the last `completion_tokens` tokens of each sequence.

    Args:
        model: the miniature of a family.
        pixel_values: [N, patches, values].
        token_ids: [N, S], prompt and completion, padded on the right.
        completion_tokens: C.

    Returns:
        [N, C, V].
    """
    count, length = len(token_ids), token_ids.shape[1] - 1
    positions = prompt_positions(model.config.model_type, length)
    return model(
        input_ids=token_ids[:, :-1],
        position_ids=positions[:, None].expand(3, count, length),
        pixel_values_videos=pixel_values.flatten(0, 1),
        # One long video: each frame pair is computed alone, and its positions are given.
        video_grid_thw=torch.tensor([[count * GRID[0], *GRID[1:]]]),
        use_cache=False,
        logits_to_keep=completion_tokens,
    ).logits
