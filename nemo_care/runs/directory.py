"""Folders that a run can write to: new ones, and directories of earlier runs."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from nemo_care import __version__
from nemo_care.errors import InputError
from nemo_care.files.json_lines import complete_lines, replace_file
from nemo_care.process.os_errors import is_unusable_place, naming
from nemo_care.runs.lock import LOCK, run_lock

MARKER = "nemo_care_run.json"
# What can exist before a run's first start: slurm/'s logs, a study's file, and the remains of a
# start that was killed at once.
_BEFORE = {"slurm", "study.json", LOCK, MARKER + ".partial"}
_REMEDY = "choose another exp_manager.explicit_log_dir or exp_manager.name"


def is_run_directory(folder: Path) -> bool:
    """Whether a run of nemo-care made this folder: by its marker, or by older versions' files.

    Older versions wrote `starts.jsonl`, or a checkpoint with a manifest.
    """
    if (folder / MARKER).is_file():
        return True
    try:
        starts = complete_lines(folder / "starts.jsonl")
        if starts and {"commit", "packages"} <= set(starts[0]):
            return True
    except (ValueError, TypeError, OSError):
        pass
    return any(folder.glob("checkpoints/step_*/manifest.json"))


def check_run_directory(folder: Path) -> None:
    """Reject a folder that is neither new nor a run's; nothing is written.

    Raises:
        InputError: names the folder and its contents.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise InputError(f"{folder} is a file, where the run directory should be: {_REMEDY}")
    if is_run_directory(folder):
        return
    foreign = sorted(path.name for path in folder.iterdir() if path.name not in _BEFORE)
    if foreign:
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        raise InputError(
            f"{folder} is not a run directory of nemo-care ({MARKER} is missing) and not empty "
            f"({', '.join(foreign[:3])}{more}): {_REMEDY}"
        )


@contextmanager
def hold_run_directory(folder: Path, command: str) -> Iterator[None]:
    """Lock a run directory for this process, and mark it as one; creates it if missing.

    Raises:
        InputError: it is not a run's (see `check_run_directory`), is in use (`run_lock`), or can't
        be written to.
    """
    check_run_directory(folder)
    with ExitStack() as held:
        try:
            with naming(folder):
                folder.mkdir(parents=True, exist_ok=True)
                held.enter_context(run_lock(folder, command))
                if not (folder / MARKER).exists():
                    _mark(folder, has_saved=False)
        except OSError as error:
            # A full disk, for example, is no reason to choose another folder.
            if not is_unusable_place(error):
                raise
            raise InputError(
                f"{folder} can't be written to: {error.strerror}; {_REMEDY}"
            ) from error
        yield


def _mark(folder: Path, *, has_saved: bool) -> None:
    about = {"format": 1, "nemo_care": __version__, "has_saved": has_saved}
    replace_file(folder / MARKER, json.dumps(about) + "\n")


def has_saved(folder: Path) -> bool:
    """Whether the run has ever completed a checkpoint, according to its marker."""
    try:
        return bool(json.loads((folder / MARKER).read_bytes())["has_saved"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def mark_saved(folder: Path) -> None:
    """Record that the run has completed a checkpoint, so that it never starts anew."""
    if not has_saved(folder):
        _mark(folder, has_saved=True)
