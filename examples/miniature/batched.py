"""Compute batches of the miniature's one prompt layout on Hugging Face's model.

Hugging Face's vision tower processes frame pairs one by one in a Python loop, which would take most
of the warm start's time. Every video here has the same grid and fits one attention window, so all
of them are computed in one batched attention.
"""

import functools

import torch
from torch import Tensor
from torch.nn import functional
from transformers.vision_utils import get_vision_position_ids

from nemo_care.miniature.vocabulary import IMAGE_PAD, VIDEO_PAD, encode
from nemo_care.miniature.world import GRID, SECONDS_PER_GRID, VIDEO_TOKENS, Question
from nemo_care.models.families.patches import PatchSize
from nemo_care.models.families.positions import mrope_positions
from tiny_model import TinyModel

_BEFORE_VIDEO = encode("<|im_start|> user <|vision_start|>")
_VIDEO = slice(len(_BEFORE_VIDEO), len(_BEFORE_VIDEO) + VIDEO_TOKENS)


def prompt_token_ids(question: Question) -> list[int]:
    """Return the prompt as written by the chat template, with expanded video placeholders: [P]."""
    return [
        *_BEFORE_VIDEO,
        *[VIDEO_PAD] * VIDEO_TOKENS,
        *encode(f"<|vision_end|> {question.text} <|im_end|> <|im_start|> assistant"),
    ]


def patches(frames: Tensor) -> Tensor:
    """Cut uint8 videos [N, T, SIDE, SIDE, 3] into patches [N, patches of a video, values].

    The frames of all videos are cut as one long video: no temporal patch spans two of them.
    """
    return PatchSize().patches(frames.flatten(0, 1)).unflatten(0, (len(frames), -1))


@functools.lru_cache
def prompt_positions(length: int) -> Tensor:
    """Return the mRoPE positions [3, length] of a sequence; all of the miniature's begin alike."""
    token_ids = torch.tensor(_BEFORE_VIDEO + [VIDEO_PAD] * VIDEO_TOKENS)
    text = torch.zeros(length - len(token_ids), dtype=torch.long)
    return mrope_positions(
        torch.cat([token_ids, text]),
        [GRID],
        [SECONDS_PER_GRID],
        image_token_id=IMAGE_PAD,
        video_token_id=VIDEO_PAD,
    )


def vision_features(model: TinyModel, pixel_values: Tensor) -> Tensor:
    """Compute `model.model.visual`: [N, patches, values] -> [N, VIDEO_TOKENS, H]."""
    tower = model.model.visual
    count = len(pixel_values)
    kernel = tower.patch_embed.proj.weight
    hidden = functional.linear(pixel_values, kernel.flatten(1))
    hidden = hidden.view(count * GRID[0], GRID[1] * GRID[2], -1)  # [frame pairs, patches, hidden]
    grid = torch.tensor([[1, *GRID[1:]]])
    position_ids = get_vision_position_ids(grid, tower.spatial_merge_size)
    cos, sin = tower.rotary_pos_emb(hidden, position_ids)
    for block in tower.blocks:
        attention = block.attn
        qkv = attention.qkv(block.norm1(hidden))
        qkv = qkv.view(*hidden.shape[:2], 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        hidden = hidden + attention.proj(mixed.transpose(1, 2).reshape(hidden.shape))
        hidden = hidden + block.mlp(block.norm2(hidden))
    return tower.merger(hidden.flatten(0, 1)).view(count, VIDEO_TOKENS, -1)


def _rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat([-second, first], dim=-1) * sin


def completion_logits(
    model: TinyModel,
    pixel_values: Tensor,
    token_ids: Tensor,
    completion_tokens: int,
) -> Tensor:
    """Return the logits that predict the last `completion_tokens` tokens of each sequence.

    Args:
        model: the miniature.
        pixel_values: [N, patches, values].
        token_ids: [N, S], prompt and completion, padded on the right.
        completion_tokens: C.

    Returns:
        [N, C, V].
    """
    language_model = model.model.language_model
    embeddings = language_model.embed_tokens(token_ids[:, :-1])
    features = vision_features(model, pixel_values)
    embeddings = torch.cat(
        [embeddings[:, : _VIDEO.start], features, embeddings[:, _VIDEO.stop :]], dim=1
    )
    count, length = embeddings.shape[:2]
    positions = prompt_positions(length)[:, None].expand(3, count, length)
    hidden = language_model(
        inputs_embeds=embeddings, position_ids=positions, use_cache=False
    ).last_hidden_state
    return model.lm_head(hidden[:, -completion_tokens:])
