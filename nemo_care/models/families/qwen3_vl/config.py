"""The configuration of a checkpoint, read without Megatron: some commands need nothing else."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from nemo_care.errors import InputError
from nemo_care.models.families.config_keys import transformers_config
from nemo_care.models.families.processor_files import check_processor_files
from nemo_care.models.families.qwen3_vl.config_checks import (
    NAME,
    Config,
    Kind,
    check_stated,
    check_values,
)
from nemo_care.models.families.qwen3_vl.patches import Qwen3PatchSize

# What changes a result, and so has to be equal for the weights of one model to fit another.
_TEXT = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "vocab_size", "rms_norm_eps"),
)
_ROPE = ("rope_theta", "mrope_section")
_VISION = (
    *("depth", "hidden_size", "hidden_act", "intermediate_size", "num_heads", "out_hidden_size"),
    *("patch_size", "spatial_merge_size", "temporal_patch_size", "num_position_embeddings"),
)


def patching(hf: Config) -> Qwen3PatchSize:
    """How the vision tower's configuration cuts frames."""
    vision = hf.vision_config
    return Qwen3PatchSize(vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)


def read_config(folder: Path, raw: Mapping[str, Any], kind: Kind, *, key: str) -> Config:
    """transformers' configuration of a directory whose config.json is `raw`.

    `kind` is that of the model, `key` the recipe's key that names it.

    Raises:
        InputError: its files say something that is not computed here (see `config_checks` and
            `processor_files`).
    """

    def refuse(what: str) -> NoReturn:
        raise InputError(f"{key}={folder}: in config.json {what}")

    check_stated(raw, kind, refuse)
    config = transformers_config(kind.config, folder, raw)
    check_values(raw, config, kind, refuse)
    check_processor_files(folder, patching(config), NAME, key=key)
    return config


def signature(hf: Config, kind: Kind) -> dict[str, Any]:
    """As `Family.signature`."""
    text, vision = hf.text_config, hf.vision_config
    return {
        "model_type": kind.model_type,
        "tie_word_embeddings": bool(hf.tie_word_embeddings),
        **{f"text_config.{name}": getattr(text, name) for name in (*_TEXT, *kind.sizes)},
        **{f"text_config.rope_parameters.{name}": text.rope_parameters[name] for name in _ROPE},
        **{f"vision_config.{name}": getattr(vision, name) for name in _VISION},
        "vision_config.deepstack_visual_indexes": list(vision.deepstack_visual_indexes),
    }
