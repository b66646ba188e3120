"""A tiny random Qwen3-VL, without experts or with them, with the miniature's words."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    GenerationConfig,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from nemo_care.miniature.tokenizer import build_tokenizer
from nemo_care.miniature.vocabulary import END, IMAGE_PAD, PAD, TOKEN_ID, VIDEO_PAD, WORDS

DEEP_LEVELS = 3
FUSED = (".mlp.experts.gate_up_proj", ".mlp.experts.down_proj")
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48}


def tiny_qwen3_config(experts=None, **top) -> Qwen3VLConfig | Qwen3VLMoeConfig:
    """Queries wider than the hidden states, and layers enough for the deep features on the first of
    two stages. A frame of 28 x 28 pixels becomes 2 x 2 vision tokens. `experts` are keys of
    text_config, such as `EXPERTS`."""
    kind = Qwen3VLMoeConfig if experts else Qwen3VLConfig
    return kind(
        architectures=[f"Qwen3VL{'Moe' if experts else ''}ForConditionalGeneration"],
        text_config={
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2 * DEEP_LEVELS,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "vocab_size": len(WORDS),
            "max_position_embeddings": 256,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
            "bos_token_id": PAD,
            "eos_token_id": END,
            "pad_token_id": PAD,
            **(experts or {}),
        },
        vision_config={
            "depth": 4,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 64,
            "patch_size": 7,
            "num_position_embeddings": 9,
            "deepstack_visual_indexes": [0, 1, 3],
        },
        image_token_id=IMAGE_PAD,
        video_token_id=VIDEO_PAD,
        vision_start_token_id=TOKEN_ID["<|vision_start|>"],
        vision_end_token_id=TOKEN_ID["<|vision_end|>"],
        **top,
    )


def write_tiny_qwen3(folder: Path, experts=None, seed=0, **top) -> Path:
    """A checkpoint in which every parameter, norms and biases too, is random and matters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        whole = Qwen3VLMoeForConditionalGeneration if experts else Qwen3VLForConditionalGeneration
        model = whole(tiny_qwen3_config(experts, **top)).float()
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                # A matrix, or one for each expert.
                inputs = parameter.shape[-1] if "experts" in name else parameter[0].numel()
                deviation = inputs**-0.5
                torch.nn.init.normal_(parameter, std=0.3 if "embed" in name else deviation)
            else:
                torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
                if "norm" in name and name.endswith("bias"):
                    parameter.data -= 1
    model.generation_config = GenerationConfig(eos_token_id=END, pad_token_id=PAD)
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def rewritten(
    source: Path, folder: Path, change: Callable[[torch.Tensor], torch.Tensor], **config
) -> Path:
    """A copy whose tensors of experts are changed, and keys of config.json set."""
    shutil.copytree(source, folder)
    tensors = load_file(source / "model.safetensors")
    changed = {
        name: change(tensor).contiguous() if name.endswith(FUSED) else tensor
        for name, tensor in tensors.items()
    }
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    raw = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(raw))
    return folder
