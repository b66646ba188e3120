"""A tiny world and the checkpoint of a tiny model: the whole system as a real run on a laptop.

`examples/miniature/` makes the checkpoint.
"""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint_warm"


def ensure_files(kind: str, root: str) -> None:
    """Write the miniature's files where a data set of that kind has none; others are left alone.

    Raises:
        InputError: something else lies there.
    """
    if kind == "miniature":
        from nemo_care.miniature.files import ensure_world

        ensure_world(root)
