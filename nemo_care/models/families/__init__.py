"""The model families, looked up by a checkpoint's `model_type`: a folder and a line each."""

from pathlib import Path

from nemo_care.data.checkpoint_files import read_checkpoint_json
from nemo_care.errors import InputError
from nemo_care.models.families.qwen2_5_vl.family import Qwen25VLFamily
from nemo_care.models.families.qwen3_vl.family import Qwen3VLFamily, Qwen3VLMoeFamily
from nemo_care.models.family import Family

FAMILIES: dict[str, type[Family]] = {
    family.model_type: family for family in (Qwen25VLFamily, Qwen3VLFamily, Qwen3VLMoeFamily)
}


def read_family(path: str | Path, *, key: str = "model.hf_path") -> Family:
    """The model of a Hugging Face checkpoint directory, as its family knows it.

    `key` is the recipe's key that names it. Megatron is not imported.

    Raises:
        InputError: the directory is missing, holds a model of no supported family, or its files
            say something that is not computed here.
    """
    folder = Path(path)
    file = folder / "config.json"
    if not file.is_file():
        names = ", ".join(family.name for family in FAMILIES.values())
        raise InputError(
            f"{key}={path}: no config.json there; give the directory of a Hugging Face checkpoint "
            f"({names})"
        )
    raw = read_checkpoint_json(file)
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise InputError(
            f"{key}={path}: model_type in config.json is {kind}; supported: {', '.join(FAMILIES)}"
        )
    return FAMILIES[kind].read(folder, raw, key=key)
