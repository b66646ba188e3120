"""The miniature's model: complete, with about 280 thousand parameters."""

from pathlib import Path

import torch
from transformers import GenerationConfig
from transformers import Qwen2_5_VLConfig as TinyConfig
from transformers import Qwen2_5_VLForConditionalGeneration as TinyModel

from nemo_care.files.tensors import usual_mode
from nemo_care.miniature.tokenizer import build_tokenizer
from nemo_care.miniature.vocabulary import END, IMAGE_PAD, PAD, TOKEN_ID, VIDEO_PAD, WORDS

TEXT_LAYERS = 4
TEXT_HIDDEN = 64


def tiny_config() -> TinyConfig:
    """Return the miniature's configuration, whose two KV heads allow tensor parallel size 2."""
    return TinyConfig(
        text_config={
            "hidden_size": TEXT_HIDDEN,
            "intermediate_size": 160,
            "num_hidden_layers": TEXT_LAYERS,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "vocab_size": len(WORDS),
            "max_position_embeddings": 256,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [4, 6, 6],
            },
            "bos_token_id": PAD,
            "eos_token_id": END,
            "pad_token_id": PAD,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 1,
            "out_hidden_size": TEXT_HIDDEN,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
            "in_channels": 3,
        },
        tie_word_embeddings=False,
        image_token_id=IMAGE_PAD,
        video_token_id=VIDEO_PAD,
        vision_start_token_id=TOKEN_ID["<|vision_start|>"],
        vision_end_token_id=TOKEN_ID["<|vision_end|>"],
    )


def build_model(seed: int) -> TinyModel:
    """Create a float32 model with random weights.

    Weights are drawn with a standard deviation of fan_in^-1/2, and those that write into the text
    decoder's residual stream are scaled down by its depth. With Hugging Face's 0.02 everywhere a
    decoder's residual stream are scaled down by its depth. With Hugging Face's 0.02 everywhere, a
    """
    # Hugging Face's constructor draws from the global generator: restore it afterwards.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = TinyModel(tiny_config()).float()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.dim() >= 2:
                    weight.normal_(0, _standard_deviation(name, weight))
    model.config._attn_implementation = "sdpa"
    return model.eval()


def _standard_deviation(name: str, weight: torch.Tensor) -> float:
    if "embed_tokens" in name:
        return 0.1
    if "lm_head" in name:
        return 0.02
    fan_in = weight[0].numel()
    writes_residual = "visual" not in name and name.split(".")[-2] in ("o_proj", "down_proj")
    return (fan_in * (2 * TEXT_LAYERS if writes_residual else 1)) ** -0.5


def save_checkpoint(model: TinyModel, directory: str | Path) -> None:
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
    build_tokenizer().save_pretrained(directory)


def load_checkpoint(directory: str | Path) -> TinyModel:
    """Load a miniature in float32, in evaluation mode."""
    return TinyModel.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
