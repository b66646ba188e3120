"""Read the JSON files of a Hugging Face checkpoint folder, which are not trusted."""

import json
from pathlib import Path
from typing import Any

from nemo_care.errors import InputError
from nemo_care.files.json_lines import read_object


def read_checkpoint_json(file: Path) -> dict[str, Any]:
    """Read the JSON object in a file of a checkpoint folder.

    Raises:
        InputError: the file can't be read, is not a JSON object, or names Python code to run.
    """
    content = read_object(file, remedy="copy it from the checkpoint again")
    _refuse_code(content, file)
    return content


def _refuse_code(content: dict[str, Any], file: Path) -> None:
    """Refuse `auto_map`, here or one level down, which names Python classes of the checkpoint.

    transformers would run them, or ask on the terminal whether to run them.
    """
    for block in (content, *content.values()):
        if isinstance(block, dict) and block.get("auto_map"):
            raise InputError(
                f"{file}: auto_map names Python code of the checkpoint "
                f"({json.dumps(block['auto_map'])}), which is never run; if transformers' own "
                "classes fit the model, remove auto_map from the file"
            )
