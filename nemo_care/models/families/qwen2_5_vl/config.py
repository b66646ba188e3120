"""The configuration of a checkpoint, read without Megatron: some commands need nothing else."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from transformers import Qwen2_5_VLConfig

from nemo_care.errors import InputError
from nemo_care.models.families.config_keys import transformers_config
from nemo_care.models.families.patches import PatchSize
from nemo_care.models.families.processor_files import check_processor_files
from nemo_care.models.families.qwen2_5_vl.config_checks import (
    MODEL_TYPE,
    check_stated,
    check_values,
)

# What changes a result, and so has to be equal for the weights of one model to fit another.
_TEXT = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "vocab_size", "rms_norm_eps"),
)
_ROPE = ("rope_theta", "mrope_section")
_VISION = (
    *("depth", "hidden_size", "hidden_act", "intermediate_size", "num_heads", "out_hidden_size"),
    *("patch_size", "spatial_merge_size", "temporal_patch_size", "tokens_per_second"),
    *("window_size", "fullatt_block_indexes"),
)


def read_config(folder: Path, raw: Mapping[str, Any], *, key: str) -> Qwen2_5_VLConfig:
    """transformers' configuration of a directory whose config.json is `raw`.

    `key` is the recipe's key that names it.

    Raises:
        InputError: its files say something that is not computed here (see `config_checks` and
            `processor_files`).
    """

    def refuse(what: str) -> NoReturn:
        raise InputError(f"{key}={folder}: in config.json {what}")

    check_stated(raw, refuse)
    config = transformers_config(Qwen2_5_VLConfig, folder, raw)
    check_values(raw, config, refuse)
    vision = config.vision_config
    patching = PatchSize(vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)
    check_processor_files(folder, patching, "Qwen2.5-VL", key=key)
    return config


def signature(hf: Qwen2_5_VLConfig) -> dict[str, Any]:
    """As `Family.signature`."""
    rope = hf.text_config.rope_parameters
    return {
        "model_type": MODEL_TYPE,
        "tie_word_embeddings": bool(hf.tie_word_embeddings),
        **{f"text_config.{name}": getattr(hf.text_config, name) for name in _TEXT},
        **{f"text_config.rope_parameters.{name}": rope[name] for name in _ROPE},
        **{f"vision_config.{name}": _plain(getattr(hf.vision_config, name)) for name in _VISION},
    }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
