"""What a checkpoint's processor files may say.

Frames are resized, normalised and cut by the family's `PatchSize`, so what these files say has to
be that. How many pixels and frames are used is the recipe's choice (`data.video`, `data.image`).
"""

import json
import math
from pathlib import Path
from typing import Any

from nemo_care.data.checkpoint_files import read_checkpoint_json
from nemo_care.errors import InputError
from nemo_care.models.families.patches import PatchSize

_FILES = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")
# Blocks of processor_config.json that say what the other files say.
_BLOCKS = ("image_processor", "video_processor", "feature_extractor")
_BICUBIC = 3


def processing(patching: PatchSize) -> dict[str, Any]:
    """Return how `patching` normalises and cuts frames, as these files say it."""
    return {
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": patching.mean.flatten().tolist(),
        "image_std": patching.std.flatten().tolist(),
        "patch_size": patching.side,
        "temporal_patch_size": patching.frames,
        "merge_size": patching.merge,
    }


def check_processor_files(folder: Path, patching: PatchSize, family: str, *, key: str) -> None:
    """Refuse processor files that make other pixels of a frame than `patching` does.

    `family` is its name in messages, `key` the recipe's key that names the folder. Missing files
    say nothing.

    Raises:
        InputError: names file, key and value.
    """
    wanted = {
        "do_resize": True,
        "do_convert_rgb": True,
        "do_center_crop": False,
        "do_pad": False,
        "resample": _BICUBIC,
        **processing(patching),
    }
    for name in _FILES:
        file = folder / name
        if not file.is_file():
            continue
        content = read_checkpoint_json(file)
        for block in (content, *(content.get(part) for part in _BLOCKS)):
            if not isinstance(block, dict):
                continue
            for setting, value in wanted.items():
                said = block.get(setting)
                if said is not None and not _equal(said, value):
                    if isinstance(value, list):
                        # As the files have them, without the digits that float32 adds.
                        value = [round(number, 8) for number in value]
                    raise InputError(
                        f"{key}={folder}: {name} says {setting}={json.dumps(said)}; only "
                        f"{json.dumps(value)} is supported, with which {family} was trained"
                    )


def _equal(said: Any, wanted: Any) -> bool:
    if isinstance(wanted, list):
        return (
            isinstance(said, list)
            and len(said) == len(wanted)
            and all(_equal(*pair) for pair in zip(said, wanted, strict=True))
        )
    if isinstance(wanted, float):
        # Written as 0.00392156862745098 or 0.48145466, computed with in float32.
        return isinstance(said, int | float) and math.isclose(said, wanted, rel_tol=1e-6)
    return type(said) is type(wanted) and bool(said == wanted)
