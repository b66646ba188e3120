"""Every environment variable of this project that Python and the recipes read.

    python -m nemo_care.process.environment > docs/environment.md

Those of the batch scripts are in docs/slurm.md.
"""

import os
from dataclasses import dataclass

from nemo_care.process.screen import say


@dataclass(frozen=True)
class Variable:
    """A variable's name, what it does, and what happens where it is not set."""

    name: str
    meaning: str
    default: str

    def __str__(self) -> str:
        """Its name."""
        return self.name

    @property
    def value(self) -> str | None:
        """Its value now; None where it is not set."""
        return os.environ.get(self.name)

    @property
    def is_on(self) -> bool:
        """Whether it is set to 1."""
        return self.value == "1"


MODELS = Variable(
    "NEMO_CARE_MODELS", "folder of the checkpoints that `recipes/model/` names", "`models`"
)
DATA = Variable("NEMO_CARE_DATA", "folder of the data sets that `recipes/data/` names", "`data`")
VERBOSE = Variable(
    "NEMO_CARE_VERBOSE", "1: show the warnings and information of the libraries", "hidden"
)
CPU = Variable(
    "NEMO_CARE_CPU", "1: this machine takes part in runs without GPUs", "GPUs are required"
)
VLLM_KEY = Variable(
    "NEMO_CARE_VLLM_KEY",
    "secret that trainers and engines on other machines share (`rollout.vllm.hosts`)",
    "a new one for each run; required with `rollout.vllm.hosts`",
)
RANK_LOGS = Variable(
    "NEMO_CARE_RANK_LOGS", "folder for a file with the output of each rank", "the screen"
)
COMMIT = Variable(
    "NEMO_CARE_COMMIT", "the commit that a run records, where git can't be asked", "git's answer"
)
STARTER = Variable(
    "NEMO_CARE_STARTER",
    "set by a starting process for the processes that must not outlive it: its process id",
    "a process lives as long as it likes",
)
RESOLVED_RECIPE = Variable(
    "NEMO_CARE_RESOLVED_RECIPE",
    "set by the command for the ranks that it starts: the file of the resolved recipe",
    "the command line is composed",
)
VARIABLES = (MODELS, DATA, VERBOSE, CPU, VLLM_KEY, RANK_LOGS, COMMIT, STARTER, RESOLVED_RECIPE)


def page() -> str:
    """docs/environment.md."""
    rows = (f"| `{each}` | {each.meaning} | {each.default} |" for each in VARIABLES)
    return "\n".join(
        [
            "# Environment variables",
            "",
            "`make docs` writes this page from `nemo_care/process/environment.py`. The batch",
            "scripts have more: see [slurm.md](slurm.md).",
            "",
            "| name | meaning | not set |",
            "| --- | --- | --- |",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    say(page(), end="")
