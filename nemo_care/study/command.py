"""The command `nemo-care study`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from nemo_care.errors import InputError
from nemo_care.reporting.processes import Failure, available_cores
from nemo_care.reporting.training_runs import train_runs, training_command
from nemo_care.study.config import check_name, find_study, read_study
from nemo_care.study.results import RESULTS, ResultsFile
from nemo_care.study.runs import check_unchanged, claim, study_runs


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nemo-care study",
        description="Train variants of a recipe with several seeds each, and write tables, "
        "figures and one page of what came out. Runs that are done are not run again, and an "
        "unfinished one goes on from its newest checkpoint.",
    )
    parser.add_argument(
        "--config-name",
        "-cn",
        required=True,
        metavar="STUDY",
        help="a file of recipes/studies/ without .yaml, such as study_miniature",
    )
    parser.add_argument(
        "--config-path",
        "-cp",
        metavar="DIR",
        help="a folder with studies of your own (there or in its studies/) and recipes of your own",
    )
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="runs at the same time (default: one per core)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: runs/STUDY")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="VARIANT", help="train only these variants"
    )
    return parser


def run_study(
    name: str,
    out: Path,
    *,
    config_dir: str | None = None,
    jobs: int | None = None,
    only: Sequence[str] = (),
    train_command: Sequence[str] | None = None,
) -> list[Failure]:
    """Train what is not trained yet.

    Runs lie in `out/runs/VARIANT-seedSEED`, their output in `out/logs/`; `out/results.jsonl` has
    a line for each finished one. `train_command` stands in for `python -m nemo_care.train`.

    Returns the runs that failed: the others go on, and the command line then exits with 1.

    Raises:
        InputError: a study that can't be used, or runs in `out` that were made with other
            overrides.
    """
    if jobs is not None and jobs < 1:
        raise InputError(f"--jobs={jobs}: must be at least 1")
    study = read_study(find_study(name, config_dir))
    for variant in only:
        check_name(study, variant, "--only")
    every = study_runs(study, out, config_dir)
    check_unchanged(every)
    asked = [run for variant, runs in every.items() if variant in (only or every) for run in runs]
    claim(asked)
    results = ResultsFile(out / RESULTS, every)
    results.refresh()
    return train_runs(
        asked,
        training_command(train_command, config_dir),
        out / "logs",
        jobs or available_cores(),
        # A study that is killed leaves what it has.
        ended=lambda run: results.refresh(),
    )


def main(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    from nemo_care.parallel.launch import guarded

    def study() -> None:
        failures = run_study(
            options.config_name,
            options.out or Path("runs") / options.config_name,
            config_dir=options.config_path,
            jobs=options.jobs,
            only=options.only,
        )
        if failures:
            sys.exit(1)

    return guarded(study)
