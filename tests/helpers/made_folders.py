"""Checkpoint folders that differ from the miniature's in a chosen respect."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MISSING = object()


def copied(checkpoint: Path, folder: Path) -> Path:
    """Copy a checkpoint folder, so that a test can change it."""
    shutil.copytree(checkpoint, folder)
    return folder


def change_json(file: Path, **values: Any) -> None:
    """Set keys, in dotted names with `__` for the dot; MISSING removes one."""
    content = json.loads(file.read_text()) if file.exists() else {}
    for path, value in values.items():
        *blocks, key = path.split("__")
        block = content
        for name in blocks:
            block = block.setdefault(name, {})
        if value is MISSING:
            block.pop(key)
        else:
            block[key] = value
    file.write_text(json.dumps(content))


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Let `change` alter the tensors of a folder with one file."""
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def flat_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return the layout of published checkpoints: text keys at the top, names of transformers 4."""
    text, vision = dict(config["text_config"]), dict(config["vision_config"])
    rope = text.pop("rope_parameters")
    for key in ("model_type", "layer_types"):
        text.pop(key)
    for key in ("model_type", "rope_parameters"):
        vision.pop(key)
    vision["in_chans"], vision["spatial_patch_size"] = vision.pop("in_channels"), 14
    return {
        **{key: value for key, value in config.items() if key not in ("text_config", "dtype")},
        **text,
        "torch_dtype": "float32",
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
        "vision_config": vision,
    }


def doubled_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return the layout of late releases of transformers 4: flat, repeated in text_config."""
    flat = flat_config(config)
    rope = {**flat["rope_scaling"], "type": "default", "rope_type": "default"}
    text = {
        **{key: value for key, value in config["text_config"].items() if key != "rope_parameters"},
        "architectures": config["architectures"],
        "image_token_id": None,
        "rope_scaling": rope,
        "rope_theta": flat["rope_theta"],
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "video_token_id": None,
        "vision_start_token_id": flat["vision_start_token_id"],
    }
    return {**flat, "rope_scaling": rope, "sliding_window": 32768, "text_config": text}


def split_weights(folder: Path, parts: int = 2) -> dict[str, str]:
    """Split the one file of a folder into shards with an index; return the index's weight_map."""
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(weights)
    weight_map = {}
    for number in range(parts):
        file = f"model-{number + 1:05d}-of-{parts:05d}.safetensors"
        shard = {name: weights[name] for name in names[number::parts]}
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: Any) -> None:
    """Write an index with this weight_map."""
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
