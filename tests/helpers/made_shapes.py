"""A small model's configuration and recipes for plans; no weights."""

import json
from pathlib import Path

from nemo_care.recipe.schema import Recipe

# With the numbers of tensor-parallel ranks and stages that a test builds.
PACKAGED = {
    "Qwen2.5-VL-3B-Instruct": (2, 2),
    "Qwen2.5-VL-7B-Instruct": (1, 4),
    "Qwen3-VL-2B-Instruct": (2, 2),
}
# The tokens of a prompt and of a completion.
LENGTHS = (320, 32)
SMALL = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 1024,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
    "tie_word_embeddings": False,
    "image_token_id": 1000,
    "video_token_id": 1001,
    "vision_config": {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 4,
        "out_hidden_size": 256,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [1],
    },
}


def write_small_shape(folder: Path) -> Path:
    """Write a directory with only config.json."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SMALL))
    return folder


def plan_recipe(hf_path: str, tensor: int, pipeline: int, granularity: str = "none") -> Recipe:
    """Return a recipe of one replica."""
    recipe = Recipe()
    recipe.trainer.max_steps = 4
    recipe.trainer.devices = tensor * pipeline
    recipe.model.hf_path = str(hf_path)
    recipe.model.tensor_model_parallel_size = tensor
    recipe.model.pipeline_model_parallel_size = pipeline
    recipe.model.sequence_parallel = tensor > 1
    recipe.model.recompute_granularity = granularity
    # In bf16, a CPU's kernels use additional memory.
    recipe.model.precision.dtype = "fp32"
    recipe.algorithm.group_size = 4
    recipe.algorithm.prompts_per_step = 4
    recipe.rollout.max_completion_tokens = LENGTHS[1]
    recipe.data.max_prompt_tokens = LENGTHS[0]
    recipe.data.train.root = recipe.data.validation.root = "nowhere"
    return recipe
