"""All environment variables of this project that Python and the recipes read.

    python -m nemo_care.process.environment > docs/environment.md

Those of the batch scripts are in docs/slurm.md.
"""

import os
from dataclasses import dataclass

from nemo_care.process.screen import say


@dataclass(frozen=True)
class Variable:
    """A variable's name, its meaning, and the behaviour if it is not set."""

    name: str
    meaning: str
    default: str

    def __str__(self) -> str:
        """Return its name."""
        return self.name

    @property
    def value(self) -> str | None:
        """Its current value; None if it is not set."""
        return os.environ.get(self.name)

    @property
    def is_on(self) -> bool:
        """Whether it is set to 1."""
        return self.value == "1"


MODELS = Variable(
    "NEMO_CARE_MODELS", "folder of the checkpoints that `recipes/model/` names", "`models`"
)
DATA = Variable("NEMO_CARE_DATA", "folder of the data sets that `recipes/data/` names", "`data`")
VERBOSE = Variable("NEMO_CARE_VERBOSE", "1: show warnings and information from libraries", "hidden")
CPU = Variable("NEMO_CARE_CPU", "1: allow runs without GPUs on this machine", "GPUs are required")
RANK_LOGS = Variable(
    "NEMO_CARE_RANK_LOGS", "folder for a file with the output of each rank", "the screen"
)
INTERFACE = Variable(
    "NEMO_CARE_INTERFACE",
    "network interface for gloo and NCCL's sockets",
    "gloo and NCCL choose; wrongly on some machines with several networks",
)
COMMIT = Variable(
    "NEMO_CARE_COMMIT", "the commit that a run records, if git is not available", "git's answer"
)
STARTER = Variable(
    "NEMO_CARE_STARTER",
    "set by a parent process for children that must not outlive it: its process id",
    "a process can outlive its parent",
)
RESOLVED_RECIPE = Variable(
    "NEMO_CARE_RESOLVED_RECIPE",
    "set by the command for its ranks: the file of the resolved recipe",
    "the recipe is composed from the command line",
)
VARIABLES = (
    MODELS, DATA, VERBOSE, CPU, RANK_LOGS, INTERFACE, COMMIT, STARTER, RESOLVED_RECIPE
)  # fmt: skip


def page() -> str:
    """Return docs/environment.md."""
    rows = (f"| `{each}` | {each.meaning} | {each.default} |" for each in VARIABLES)
    return "\n".join(
        [
            "# Environment variables",
            "",
            "`make docs` writes this page from `nemo_care/process/environment.py`. The batch",
            "scripts read more: see [slurm.md](slurm.md).",
            "",
            "| name | meaning | not set |",
            "| --- | --- | --- |",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    say(page(), end="")
