"""The miniature's models: complete, with 280 to 740 thousand parameters, one for each family."""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from nemo_care.files.tensors import usual_mode
from nemo_care.miniature import CHECKPOINT
from nemo_care.miniature.tokenizer import build_tokenizer
from nemo_care.miniature.vocabulary import (
    END,
    IMAGE_PAD,
    PAD,
    TIME_WORDS,
    TOKEN_ID,
    TOKEN_ID_WITH_TIMES,
    VIDEO_PAD,
    WORDS,
)
from nemo_care.models.vision_tower import WINDOW_ATTENTION

TEXT_LAYERS = 4
TEXT_HIDDEN = 64
# Two KV heads allow tensor parallel size 2.
_TEXT = {
    "hidden_size": TEXT_HIDDEN,
    "num_hidden_layers": TEXT_LAYERS,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "bos_token_id": PAD,
    "eos_token_id": END,
    "pad_token_id": PAD,
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "out_hidden_size": TEXT_HIDDEN,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "in_channels": 3,
}
_TOKENS = {
    "image_token_id": IMAGE_PAD,
    "video_token_id": VIDEO_PAD,
    "vision_start_token_id": TOKEN_ID["<|vision_start|>"],
    "vision_end_token_id": TOKEN_ID["<|vision_end|>"],
}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_QWEN3_TEXT = {
    **_TEXT,
    # Queries are wider than the hidden states, as in the published 4B, 32B and both with experts.
    "num_attention_heads": 4,
    "head_dim": 32,
    "vocab_size": len(WORDS) + len(TIME_WORDS),
    "rope_parameters": {**_ROPE, "mrope_section": [6, 5, 5], "mrope_interleaved": True},
}
# Two levels of deep features: each of two pipeline stages has two layers.
_QWEN3_VISION = {
    **_VISION,
    "depth": 3,
    "num_heads": 2,
    "num_position_embeddings": 9,
    "deepstack_visual_indexes": [0, 1],
}
_CONFIGS: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "qwen2_5_vl": (
        transformers.Qwen2_5_VLConfig,
        {
            "text_config": {
                **_TEXT,
                "intermediate_size": 160,
                "num_attention_heads": 2,
                "vocab_size": len(WORDS),
                "rope_parameters": {**_ROPE, "mrope_section": [4, 6, 6]},
            },
            "vision_config": {
                **_VISION,
                "depth": 2,
                "num_heads": 1,
                "window_size": 112,
                "fullatt_block_indexes": [1],
                "tokens_per_second": 2,
            },
            "tie_word_embeddings": False,
        },
    ),
    "qwen3_vl": (
        transformers.Qwen3VLConfig,
        {
            "text_config": {**_QWEN3_TEXT, "intermediate_size": 160},
            "vision_config": _QWEN3_VISION,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3_vl_moe": (
        transformers.Qwen3VLMoeConfig,
        {
            "text_config": {
                **_QWEN3_TEXT,
                "intermediate_size": 160,
                # That of the model without experts, whose weights each expert begins with.
                "moe_intermediate_size": 160,
                "num_experts": 4,
                "num_experts_per_tok": 2,
            },
            "vision_config": _QWEN3_VISION,
            "tie_word_embeddings": False,
        },
    ),
}
MODEL_TYPES = tuple(_CONFIGS)
# The checkpoints that come with the package; each additional family's has its name.
CHECKPOINTS = {
    name: CHECKPOINT if number == 0 else CHECKPOINT.with_name(f"{CHECKPOINT.name}_{name}")
    for number, name in enumerate(MODEL_TYPES)
}


def tiny_config(model_type: str = "qwen2_5_vl") -> PretrainedConfig:
    """Return the miniature's configuration of a family, by its name in config.json."""
    kind, settings = _CONFIGS[model_type]
    return kind(**settings, **_TOKENS)


def build_model(seed: int, model_type: str = "qwen2_5_vl") -> PreTrainedModel:
    """Create a float32 model with random weights.

    Weights are drawn with a standard deviation of fan_in^-1/2, and those that write into the text
    decoder's residual stream are scaled down by its depth. With Hugging Face's 0.02 everywhere, a
    model learned late, or never, to see.
    """
    # Hugging Face's constructor draws from the global generator: restore it afterwards.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForImageTextToText.from_config(
            tiny_config(model_type), attn_implementation="sdpa", dtype=torch.float32
        )
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.dim() >= 2:
                    weight.normal_(0, _standard_deviation(name, weight))
    return _attending_in_batches(model)


def with_experts(dense: PreTrainedModel) -> PreTrainedModel:
    """Return a model with experts that computes what `dense` computes.

    Each expert begins as a copy of its layer's MLP, and the router is random, always the same, as
    in sparse upcycling (arXiv 2212.05055): the weights of a token's experts sum to 1.
    """
    model = build_model(0, f"{dense.config.model_type}_moe")
    given = dict(dense.named_parameters())
    with torch.no_grad():
        for name, weight in model.named_parameters():
            mlp, _, part = name.rpartition("experts.")
            if part == "gate_up_proj":
                halves = [given[f"{mlp}{half}_proj.weight"] for half in ("gate", "up")]
                weight.copy_(torch.cat(halves))
            elif part == "down_proj":
                weight.copy_(given[f"{mlp}down_proj.weight"])
            elif name == "lm_head.weight":
                weight.copy_(dense.get_output_embeddings().weight)
            elif not name.endswith("mlp.gate.weight"):
                weight.copy_(given[name])
    return model


def _standard_deviation(name: str, weight: torch.Tensor) -> float:
    if "embed_tokens" in name:
        return 0.1
    if "lm_head" in name:
        return 0.02
    # An expert's matrix is one of a layer's, in one tensor.
    fan_in = weight.shape[-1] if "experts" in name else weight[0].numel()
    matrix = name.removesuffix(".weight").rpartition(".")[2]
    writes_residual = "visual" not in name and matrix in ("o_proj", "down_proj")
    return (fan_in * (2 * TEXT_LAYERS if writes_residual else 1)) ** -0.5


def _attending_in_batches(model: PreTrainedModel) -> PreTrainedModel:
    """Let the vision tower attend to all frame pairs at once; without it, transformers computes
    them one by one in a Python loop, which would take most of the warm start's time."""
    model.model.visual.config._attn_implementation = WINDOW_ATTENTION
    return model.eval()


def save_checkpoint(model: PreTrainedModel, directory: str | Path) -> None:
    """Write weights, config, generation config and tokenizer as a Hugging Face directory."""
    model.generation_config = GenerationConfig(
        bos_token_id=PAD,
        eos_token_id=END,
        pad_token_id=PAD,
        do_sample=True,
        temperature=1.0,
        max_new_tokens=28,
    )
    with usual_mode(Path(directory) / "model.safetensors"):
        model.save_pretrained(directory)
    timed = model.config.text_config.vocab_size > len(WORDS)
    build_tokenizer(TOKEN_ID_WITH_TIMES if timed else TOKEN_ID).save_pretrained(directory)


def load_checkpoint(directory: str | Path) -> PreTrainedModel:
    """Load a miniature in float32, in evaluation mode."""
    return _attending_in_batches(
        transformers.AutoModelForImageTextToText.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="sdpa"
        )
    )
