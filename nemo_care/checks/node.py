"""Check whether this machine can take part in a run; a batch job runs it on each node.

    python -m nemo_care.checks.node --config-name RECIPE [key=value ...]

runs the probes of `checks/probes.py` for nodes: the GPUs (count, ECC errors, memory in use, an
all-reduce among them), host memory, decoding, and access to the recipe's checkpoint and data. Exit
status 0: it can; 1: it can't, with a line for each reason; 2: the recipe can't be used on any
machine.
"""

import argparse
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from nemo_care.checks.probes import NODE, Situation, found_by
from nemo_care.errors import InputError
from nemo_care.files.json_lines import replace_file
from nemo_care.process.environment import CPU
from nemo_care.process.quiet import quiet_libraries
from nemo_care.process.screen import one_line, say
from nemo_care.recipe.compose import compose_recipe
from nemo_care.recipe.schema import Recipe


def problems_of(recipe: Recipe) -> list[str]:
    """Return the reasons why this machine can't take part in a run."""
    if CPU.is_on:
        say(f"{CPU}=1: the GPUs are not checked")
    return list(found_by(NODE, Situation(recipe)))


def _shared_folder(folder: Path) -> list[str]:
    """Check that the file which the batch job has written into the folder is visible here."""
    canary = folder / "canary"
    try:
        written = canary.read_text().strip()
    except OSError as error:
        return [f"the run directory's file system is not shared with this machine: {error}"]
    job = f"{os.environ['SLURM_JOB_ID']}.{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    return [] if written == job else [f"{canary} is stale here: {written} instead of {job}"]


def main(arguments: Sequence[str]) -> int:
    """Check this machine and return the exit status."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("-h", "--help", action="store_true")
    # A folder on the shared file system with the file "canary"; gets a file named after this node.
    parser.add_argument("--verdict", type=Path)
    options, rest = parser.parse_known_args(arguments)
    if options.help:
        say(__doc__)
        return 0
    quiet_libraries()
    name = os.environ.get("SLURMD_NODENAME", socket.gethostname())

    def report(verdict: str) -> None:
        say(one_line(f"{name}: {verdict}"), file=sys.stdout if verdict == "ok" else sys.stderr)
        if options.verdict is not None:
            replace_file(options.verdict / name, verdict + "\n")

    try:
        recipe = compose_recipe(rest)
    except InputError as error:
        report(f"recipe: {error}")
        return 2
    if recipe is None:
        return 0
    try:
        problems = _shared_folder(options.verdict) if options.verdict is not None else []
        problems = problems or problems_of(recipe)
    except Exception as error:
        # Anything that fails here would fail the run.
        report(f"{type(error).__name__}: {error}")
        raise
    report("; ".join(problems) or "ok")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
