"""Train several runs from the command line; shared by `compare` and `study`."""

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from nemo_care.errors import InputError
from nemo_care.experiments.processes import Failure, Job, last_lines, run_jobs
from nemo_care.process.screen import one_line, printable
from nemo_care.runs.reader import last_step, read_summary

_OWN_KEYS = {
    "trainer.seed": "--seeds",
    "exp_manager.explicit_log_dir": "--out",
    "exp_manager.exp_dir": "--out",
}
# What Hydra reads as a plain value; anything else has to be quoted.
_PLAIN = re.compile(r"[\w/\-+.@:%]+")


@dataclass(frozen=True)
class TrainingRun:
    """One run: a recipe with overrides and a seed, in its own directory."""

    recipe: str
    overrides: tuple[str, ...]
    """Hydra overrides, without seed and run directory."""
    seed: int
    folder: Path
    """Absolute: a run can change its working directory before it reads the path."""
    steps: int | None = None
    """Requested number of steps; None: the recipe decides, and any end counts."""

    @property
    def name(self) -> str:
        """The run's name on the screen and in logs."""
        return self.folder.name

    def is_done(self) -> bool:
        """Whether it has reached the requested end."""
        return self.missing() is None

    def missing(self) -> str | None:
        """Return why it has not reached the requested end, None if it has."""
        summary = read_summary(self.folder)
        if summary is None:
            return "the command ended without writing summary.json"
        if self.steps not in (None, summary.get("steps")):
            return f"ended with {summary.get('steps')} steps instead of {self.steps}"
        return None

    def arguments(self) -> list[str]:
        """Arguments for `nemo-care train`."""
        return [
            "--config-name",
            self.recipe,
            f"trainer.seed={self.seed}",
            f"exp_manager.explicit_log_dir={quoted(str(self.folder))}",
            *self.overrides,
        ]


def key_of(override: str) -> str:
    """Return the recipe key of an override."""
    return override.split("=", 1)[0].lstrip("+~")


def quoted(text: str) -> str:
    """Quote a value for Hydra's override grammar."""
    if _PLAIN.fullmatch(text):
        return text
    return "'" + re.sub(r"(\\*)'", r"\1\1\\'", text) + "'"


def refuse_own_keys(overrides: Sequence[str], command: str, remedies: dict[str, str]) -> None:
    """Reject overrides of keys that the command sets for each run.

    `remedies` replaces the default remedies, which name options of `compare`.

    Raises:
        InputError: an override of the seed or the run directory.
    """
    for override in overrides:
        key = key_of(override)
        if key in _OWN_KEYS:
            remedy = (_OWN_KEYS | remedies)[key]
            raise InputError(f"{override}: {command} sets {key} for each run; use {remedy}")


def training_command(given: Sequence[str] | None, config_dir: str | None) -> list[str]:
    """Return the start of each run's command; `given` replaces `python -m nemo_care.train`."""
    command = list(given or (sys.executable, "-m", "nemo_care.train"))
    return [*command, "--config-path", str(Path(config_dir).absolute())] if config_dir else command


def train_runs(
    runs: Sequence[TrainingRun],
    command: Sequence[str],
    logs: Path,
    jobs: int,
    ended: Callable[[], object],
) -> list[Failure]:
    """Train the unfinished runs, at most `jobs` at once; a failing run does not stop the rest.

    The same command in the same directory resumes from the newest checkpoint there. `command` is
    the result of `training_command`; each run's output is written to `logs`. `ended` is called
    after each run that finishes now.

    Returns the runs that failed.
    """
    waiting = [run for run in runs if not run.is_done()]
    by_name = {run.name: run for run in waiting}
    queue = [
        Job(run.name, [*command, *run.arguments()], logs / f"{run.name}.log") for run in waiting
    ]
    failures: list[Failure] = []
    with tqdm(
        total=len(runs),
        initial=len(runs) - len(waiting),
        desc="runs",
        unit="run",
        disable=None,  # a log file gets only the lines below
    ) as bar:

        def tick(names: list[str]) -> None:
            steps = (f"{name} step {last_step(by_name[name].folder)}" for name in names)
            bar.set_postfix_str(one_line(", ".join(steps)))

        def done(job: Job, failure: Failure | None) -> None:
            run = by_name[job.name]
            wrong = None if failure else run.missing()
            if wrong:
                failure = Failure(job.name, 0, job.log, [*last_lines(job.log), wrong])
            if failure:
                failures.append(failure)
                lines = "".join(f"\n    {line}" for line in failure.last_lines)
                said = f"failed (exit status {failure.status}), log {failure.log}{lines}"
            else:
                said = f"done, {last_step(run.folder)} steps"
                ended()
            tqdm.write(printable(f"{job.name}: {said}"), file=sys.stderr)
            bar.update()

        run_jobs(queue, jobs, tick=tick, done=done)
    return failures
