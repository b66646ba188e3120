"""Command lines of small runs, and checks of refused input."""

from pathlib import Path


def world_overrides(world: Path) -> list[str]:
    parts, keys = ("train", "validation"), ("kind=jsonl", f"root={world}")
    return [f"data.{part}.{key}" for part in parts for key in keys]


def assert_refused(result: tuple[int | str, ...], *parts: str) -> None:
    """Check that a command, whose status and stderr come first and last, was refused in a line."""
    status, *_, err = result
    assert isinstance(err, str)
    assert status == 2
    message = [line for line in err.splitlines() if line.startswith("nemo-care: ")]
    assert len(message) == 1
    assert "Traceback" not in err
    for part in parts:
        assert part in message[0]
