"""The records that a run writes, as tests read them."""

import json
from pathlib import Path


def lines(file: Path) -> list[dict]:
    """The objects of a file of JSON lines."""
    return [json.loads(line) for line in file.read_text().split("\n") if line]


def without_timing(records: list[dict]) -> list[dict]:
    """Without what differs from one start to the next."""
    return [
        {k: v for k, v in r.items() if not k.startswith(("timing/", "memory/"))} for r in records
    ]
