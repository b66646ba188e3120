"""The configuration of a checkpoint, read without Megatron: some commands need nothing else."""

from pathlib import Path

from transformers import AutoConfig, Qwen2_5_VLConfig

from nemo_care.errors import InputError
from nemo_care.json_lines import read_object


def read_hf_config(path: str | Path, *, key: str = "model.hf_path") -> Qwen2_5_VLConfig:
    """The configuration of a Hugging Face Qwen2.5-VL checkpoint directory.

    `key` is the recipe's key that names it.

    Raises:
        InputError: the directory is missing or holds another kind of model, or its configuration is
            no JSON.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise InputError(
            f"{key}={path}: no config.json there; give the directory of a Hugging Face "
            "Qwen2.5-VL checkpoint"
        )
    # transformers says of a torn file neither what is wrong nor where.
    read_object(folder / "config.json", remedy="download it again")
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if not isinstance(config, Qwen2_5_VLConfig):
        raise InputError(
            f"{key}={path}: holds a {config.model_type} model; only qwen2_5_vl is supported"
        )
    return config
