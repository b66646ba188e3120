"""Read the JSON files of a Hugging Face checkpoint folder, which anybody may have written."""

import json
from pathlib import Path
from typing import Any

from nemo_care.errors import InputError


def read_checkpoint_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file of a checkpoint folder.

    Raises:
        InputError: the file can't be read, holds something else, or names Python code to run.
    """
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise InputError(f"{file}: can't be read ({error.strerror})") from error
    # UnicodeDecodeError and JSONDecodeError are ValueErrors; RecursionError: nested too deeply.
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{file}: not a JSON file ({first_line(error)}); copy it from the checkpoint again"
        ) from error
    if not isinstance(content, dict):
        raise InputError(
            f"{file}: holds a JSON {type(content).__name__} where an object is needed; copy it "
            "from the checkpoint again"
        )
    _refuse_code(content, file)
    return content


def _refuse_code(content: dict[str, Any], file: Path) -> None:
    """Refuse `auto_map`, here or one level down, by which a checkpoint brings classes of its own.

    transformers would run them, or ask on the terminal whether it should.
    """
    for block in (content, *content.values()):
        if isinstance(block, dict) and block.get("auto_map"):
            raise InputError(
                f"{file}: auto_map names Python code of the checkpoint's own "
                f"({json.dumps(block['auto_map'])}), which is never run; if transformers' own "
                "classes fit the model, remove auto_map from the file"
            )


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, else its kind."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
