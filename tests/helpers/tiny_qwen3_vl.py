"""A tiny random Qwen3-VL, without experts or with them, with the miniature's words."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, GenerationConfig

from nemo_care.miniature.tokenizer import build_tokenizer
from nemo_care.miniature.vocabulary import END, PAD, WORDS
from tiny_model import tiny_config

DEEP_LEVELS = 3
FUSED = (".mlp.experts.gate_up_proj", ".mlp.experts.down_proj")
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48}


def tiny_qwen3_config(experts=None, *, tie_word_embeddings=False):
    """The miniature's with a third level of deep features, layers enough for them on the first of
    two stages, and frames of 28 x 28 pixels as 2 x 2 vision tokens. `experts` are keys of
    text_config, such as `EXPERTS`."""
    config = tiny_config("qwen3_vl_moe" if experts else "qwen3_vl")
    config.architectures = [f"Qwen3VL{'Moe' if experts else ''}ForConditionalGeneration"]
    config.tie_word_embeddings = tie_word_embeddings
    sizes = {
        "vocab_size": len(WORDS),
        "intermediate_size": 96,
        "num_hidden_layers": 2 * DEEP_LEVELS,
    }
    config.text_config.update(sizes | (experts or {}))
    config.vision_config.update(
        {
            "depth": 4,
            "intermediate_size": 48,
            "patch_size": 7,
            "deepstack_visual_indexes": [0, 1, 3],
        }
    )
    return config


def write_tiny_qwen3(folder: Path, experts=None, seed=0, **settings) -> Path:
    """A checkpoint in which every parameter, norms and biases too, is random and matters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = tiny_qwen3_config(experts, **settings)
        model = AutoModelForImageTextToText.from_config(config).float()
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
