"""A tiny world and checkpoints of tiny models, for real runs of the whole system on a laptop.

`examples/miniature/` makes the checkpoints.
"""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint_warm"


def ensure_files(kind: str, root: str) -> None:
    """Write the miniature's files if a data set of that kind has none; other kinds are ignored.

    Raises:
        InputError: the folder contains something else.
    """
    if kind == "miniature":
        from nemo_care.miniature.files import ensure_world

        ensure_world(root)
