"""Make checkpoints, prompts and groups of a given size, with random weights and tokens."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from nemo_care.data.prompts import Prompt
from nemo_care.data.samples import Sample
from nemo_care.groups.group import Completion, Group
from nemo_care.miniature.tokenizer import build_tokenizer
from nemo_care.miniature.vocabulary import SPECIAL_TOKENS, TAGS, UNKNOWN
from nemo_care.models.families.positions import mrope_positions
from nemo_care.planning.shapes import Lengths

WORDS = (*SPECIAL_TOKENS, *TAGS, UNKNOWN, "user", "assistant")
PATCH, MERGE, TEMPORAL_PATCH = 14, 2, 2
# Tokens from a completion's end at which its answer begins and ends.
ANSWER_FROM_END = (8, 4)


@dataclass(frozen=True)
class Size:
    """A model's shape; the defaults take seconds per pass on a CPU."""

    hidden: int = 512
    intermediate: int = 1536
    layers: int = 8
    heads: int = 8
    key_heads: int = 2
    vocabulary: int = 32768
    vision_hidden: int = 128
    vision_depth: int = 4


def hf_config(size: Size) -> Qwen2_5_VLConfig:
    """Return the Hugging Face configuration of that shape."""
    section = size.hidden // size.heads // 2
    return Qwen2_5_VLConfig(
        text_config={
            "hidden_size": size.hidden,
            "intermediate_size": size.intermediate,
            "num_hidden_layers": size.layers,
            "num_attention_heads": size.heads,
            "num_key_value_heads": size.key_heads,
            "vocab_size": size.vocabulary,
            "max_position_embeddings": 32768,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [section // 4, 3 * section // 8, 3 * section // 8],
            },
            "bos_token_id": 0,
            "eos_token_id": WORDS.index("<|im_end|>"),
            "pad_token_id": 0,
        },
        vision_config={
            "depth": size.vision_depth,
            "hidden_size": size.vision_hidden,
            "intermediate_size": 2 * size.vision_hidden,
            "num_heads": size.vision_hidden // 32,
            "out_hidden_size": size.hidden,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": TEMPORAL_PATCH,
            "window_size": 112,
            "fullatt_block_indexes": [size.vision_depth - 1],
            "tokens_per_second": 2,
        },
        tie_word_embeddings=False,
        image_token_id=WORDS.index("<|image_pad|>"),
        video_token_id=WORDS.index("<|video_pad|>"),
        vision_start_token_id=WORDS.index("<|vision_start|>"),
        vision_end_token_id=WORDS.index("<|vision_end|>"),
    )


def write_checkpoint(folder: Path, size: Size) -> None:
    """Write a Hugging Face directory with random float32 weights and a word tokenizer."""
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(hf_config(size)).float()
    model.generation_config.eos_token_id = WORDS.index("<|im_end|>")
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)
    words = [*WORDS, *(f"w{number}" for number in range(size.vocabulary - len(WORDS)))]
    build_tokenizer({word: number for number, word in enumerate(words)}).save_pretrained(folder)


def video_grid(prompt_tokens: int) -> tuple[int, int, int]:
    """Return the patches (time, height, width) of a 224 x 224 video that fills half of a prompt."""
    return prompt_tokens // 128, 16, 16


def lengths(prompt_tokens: int, completion_tokens: int) -> Lengths:
    """Return the lengths of the same prompt, for counting its FLOPs."""
    t, h, w = grid = video_grid(prompt_tokens)
    return Lengths(prompt_tokens, completion_tokens, t * h * w // MERGE**2, (grid,))


def video_prompt(config: Qwen2_5_VLConfig, prompt_tokens: int, index: int = 0) -> Prompt:
    """Make a prompt of exactly `prompt_tokens` tokens, half of them of a video of noise."""
    generator = torch.Generator().manual_seed(index)
    grid = video_grid(prompt_tokens)
    count = grid[0] * grid[1] * grid[2] // MERGE**2
    text = torch.randint(
        len(WORDS), config.text_config.vocab_size, (prompt_tokens - count - 8,), generator=generator
    )
    ids = torch.cat([torch.full((8,), 1), torch.full((count,), config.video_token_id), text])
    return Prompt(
        index=index,
        sample=Sample(str(index), "", "A"),
        token_ids=ids,
        position_ids=mrope_positions(
            ids,
            [grid],
            [1.0],
            image_token_id=config.image_token_id,
            video_token_id=config.video_token_id,
        ),
        is_vision=ids == config.video_token_id,
        frames=(noise((TEMPORAL_PATCH * grid[0], PATCH * grid[1], PATCH * grid[2], 3), generator),),
        grid_thw=torch.tensor([grid]),
        seconds_per_grid=(1.0,),
    )


def noise(shape: tuple[int, ...], generator: torch.Generator | None = None) -> torch.Tensor:
    """Frames uint8 of any shape."""
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def with_noise(prompt: Prompt) -> Prompt:
    """The prompt with frames of noise, in the shapes that its frames have."""
    return replace(prompt, frames=tuple(noise(tuple(f.shape)) for f in prompt.frames))


def given_group(prompt: Prompt, tokens: int, group_size: int, vocabulary: int) -> Group:
    """Make completions of random tokens, each with an answer near its end."""
    generator = torch.Generator().manual_seed(prompt.index)
    return Group(
        prompt,
        [
            Completion(
                token_ids=torch.randint(len(WORDS), vocabulary, (tokens,), generator=generator),
                log_probs=torch.zeros(tokens),
                text="",
                ended=False,
                answer_span=answer_span(tokens),
            )
            for _ in range(group_size)
        ],
    )


def answer_span(tokens: int) -> tuple[int, int]:
    """Return the position of the answer in a completion of `tokens` tokens."""
    begin, end = ANSWER_FROM_END
    return tokens - begin, tokens - end
