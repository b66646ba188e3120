"""Read the records that a run writes."""

import json
from pathlib import Path


def lines(file: Path) -> list[dict]:
    """Return the objects of a file of JSON lines."""
    return [json.loads(line) for line in file.read_text().split("\n") if line]


def without_timing(records: list[dict]) -> list[dict]:
    """Return the records without values that differ between starts."""
    return [
        {k: v for k, v in r.items() if not k.startswith(("timing/", "memory/"))} for r in records
    ]
