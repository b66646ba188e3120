"""The command `nemo-care study`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from nemo_care.errors import InputError
from nemo_care.experiments.config import check_name, find_study, read_study
from nemo_care.experiments.docs import read_page, update_docs
from nemo_care.experiments.findings import Findings
from nemo_care.experiments.page import BLOCKS, publish, show
from nemo_care.experiments.processes import Failure
from nemo_care.experiments.results import check_results, read_results
from nemo_care.experiments.runs import check_unchanged, claim, study_runs, train_variants
from nemo_care.experiments.training_runs import training_command
from nemo_care.process.cores import available_cores
from nemo_care.process.screen import say


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nemo-care study",
        description="Train variants of a recipe with several seeds each, and write tables, "
        "figures and a page of the results: study.html, study.md, study.json, and results.jsonl "
        "with all numbers of each run. Completed runs are not repeated, and an unfinished run "
        "resumes from its newest checkpoint.",
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
        help="a folder with your own studies (there or in its studies/) and recipes",
    )
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="number of concurrent runs (default: one per core)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: runs/STUDY")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="VARIANT", help="train only these variants"
    )
    parser.add_argument(
        "--results",
        type=Path,
        metavar="FILE",
        help="train nothing: make tables and figures from this results.jsonl",
    )
    parser.add_argument(
        "--docs",
        type=Path,
        metavar="FILE",
        help="a Markdown file whose blocks <!-- study:NAME --> ... <!-- /study:NAME --> get the "
        f"new tables ({', '.join(BLOCKS)}); figures and results are written beside it",
    )
    return parser


def run_study(
    name: str,
    out: Path,
    *,
    config_dir: str | None = None,
    jobs: int | None = None,
    only: Sequence[str] = (),
    results_file: Path | None = None,
    docs: Path | None = None,
    train_command: Sequence[str] | None = None,
) -> list[Failure]:
    """Train what is not trained yet of a study, or read its results, and publish them.

    Runs are in `out/runs/VARIANT-seedSEED`. `train_command` replaces
    `python -m nemo_care.train`.

    Returns the runs that failed. The remaining runs continue; the command line then exits with 1.

    Raises:
        InputError: a study, results, a page or a variant's recipe that can't be used, or runs in
        `out` were made with other overrides.
    """
    file = find_study(name, config_dir)
    study = read_study(file)
    if docs is not None:
        read_page(docs)  # reports a fault now, not after hours
    failures: list[Failure] = []
    if results_file is not None:
        results = read_results(results_file)
        check_results(study, results, results_file)
    else:
        if jobs is not None and jobs < 1:
            raise InputError(f"--jobs={jobs}: must be at least 1")
        for variant in only:
            check_name(study, variant, "--only")
        every = study_runs(study, out, config_dir)
        check_unchanged(every)
        chosen = only or every
        asked = [run for variant, runs in every.items() if variant in chosen for run in runs]
        claim(asked)
        command = training_command(train_command, config_dir)
        results, failures = train_variants(every, asked, command, out, jobs or available_cores())
    if not results:
        say("no run is complete yet", file=sys.stderr)
        return failures
    findings = Findings(study, results)
    page = publish(findings, out, file.read_text(encoding="utf-8"))
    if docs is not None:
        update_docs(docs, findings)
    show(findings)
    for written in (docs, page):
        if written is not None:
            say(written)
    return failures


def main(arguments: Sequence[str]) -> int:
    """Run the command line and return the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.results and (options.only or options.jobs):
        parser.error("--results trains nothing: omit --only and --jobs")
    from nemo_care.ranks.launch import guarded

    def study() -> None:
        failures = run_study(
            options.config_name,
            options.out or Path("runs") / options.config_name,
            config_dir=options.config_path,
            jobs=options.jobs,
            only=options.only,
            results_file=options.results,
            docs=options.docs,
        )
        if failures:
            sys.exit(1)

    return guarded(study)
