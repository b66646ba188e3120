"""The origin of a run: commit, versions and machine, one line for each start."""

import os
import platform
import socket
import subprocess
import time
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from nemo_care.process.environment import COMMIT

_CHECKOUT = Path(__file__).resolve().parents[2]
# The only recorded environment variables; others can hold keys.
_JOB = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_JOB_NODELIST", "SLURM_STEP_NODELIST")


def origin() -> dict[str, Any]:
    """Return time, place, commit and packages of this process."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": socket.gethostname(),
        "job": {name: os.environ[name] for name in _JOB if name in os.environ},
        "commit": commit(),
        "python": platform.python_version(),
        "packages": _packages(),
    }


def _packages() -> dict[str, str]:
    """Return name and version of all installed packages."""
    # Each `metadata` reads a file; properties for name and version would read it twice.
    found = (each.metadata for each in distributions())
    return dict(sorted((each["Name"], each["Version"]) for each in found))


def commit() -> str | None:
    """Return the checkout's commit, with "-dirty" if files differ from it; None if unknown."""
    given = COMMIT.value  # slurm/ sets it outside of the container
    if given:
        return given
    command = ["git", "-C", str(_CHECKOUT), "describe", "--always", "--abbrev=40", "--dirty"]
    try:
        done = subprocess.run(
            [*command, "--exclude=*"], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
