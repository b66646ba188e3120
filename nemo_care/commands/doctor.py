"""The command `nemo-care doctor`."""

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict

from nemo_care.checks.fit import Fit, fit_of, missing_mandatory, start_plan
from nemo_care.checks.machine import FOUND, Finding, Machine, examine
from nemo_care.commands.options import option_parser
from nemo_care.errors import InputError
from nemo_care.process.quiet import quiet_libraries
from nemo_care.process.screen import one_line, say

CAN_RUN, CAN_NOT = 0, 2
_DESCRIPTION = """Check this machine for nemo-care: packages, GPUs, kernels, memory, disk, Slurm.

With a recipe, also check whether a training run of it could start here, and what to change if not.
Nothing is written and no rank is started."""
_EPILOG = """examples:
  nemo-care doctor
  nemo-care doctor --config-name tiny_cpu
  nemo-care doctor --json --config-path my_recipes --config-name mine trainer.devices=8

All remaining arguments are those of nemo-care train. Exit status: 0 it can run (without a recipe:
everything that all runs need is there); 2 it can't, with a line for each reason; 1 the command
itself failed."""


def _parser() -> argparse.ArgumentParser:
    usage = "[--json] [--config-name RECIPE [--config-path FOLDER] [key=value ...]]"
    parser = option_parser("doctor", usage, _DESCRIPTION, _EPILOG)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.add_argument(
        "--no-plan",
        action="store_true",
        help="skip the recipe's memory and disk (the slowest part)",
    )
    return parser


def main(arguments: Sequence[str]) -> int:
    """Run the command line of `nemo-care doctor` and return the exit status."""
    options, rest = _parser().parse_known_args(list(arguments))
    quiet_libraries()
    # Packages may print when they are imported.
    with redirect_stdout(sys.stderr):
        machine = examine()
        problems = missing_mandatory(machine)
        fit = None
        if rest:
            fit = Fit(problems=problems) if problems else _fit(machine, rest, not options.no_plan)
            problems = fit.problems
    if options.json:
        say(json.dumps(_record(machine, fit, problems)))
    else:
        _show(machine, fit, problems)
    return CAN_NOT if problems else CAN_RUN


def _fit(machine: Machine, rest: Sequence[str], plans: bool) -> Fit:
    from nemo_care.commands.start import import_from_working_directory
    from nemo_care.recipe.compose import compose_recipe

    # A recipe can name reward functions from the working directory.
    import_from_working_directory()
    try:
        recipe = compose_recipe(rest)
        if recipe is None:
            raise InputError("--cfg only prints a recipe: omit it, or use nemo-care train")
    except InputError as error:
        return Fit(problems=[str(error)])
    return fit_of(recipe, machine, rest, start_plan if plans else None)


def _record(machine: Machine, fit: Fit | None, problems: Sequence[str]) -> dict[str, object]:
    """Return the results as plain values; the keys are part of the command's contract."""
    return {
        "can_run": not problems,
        "problems": list(problems),
        "findings": [asdict(finding) for finding in machine.findings],
        "gpus": [asdict(gpu) for gpu in machine.gpus],
        "recipe": None
        if fit is None
        else {"warnings": fit.warnings, "facts": fit.facts, "plan": fit.plan},
    }


def _show(machine: Machine, fit: Fit | None, problems: Sequence[str]) -> None:
    width = max(len(finding.name) for finding in machine.findings)
    group = ""
    for finding in machine.findings:
        if finding.group != group:
            group = finding.group
            say(f"\n{group}")
        say(_line(finding, width))
    say()
    if fit is not None:
        for fact in fit.facts:
            say(one_line(fact))
        for warning in fit.warnings:
            say(one_line(f"warning: {warning}"))
        say("this recipe can run here" if not problems else "this recipe can't run here:")
    elif problems:
        say("no recipe can run here:")
    else:
        say("everything that all runs need is here")
    for problem in problems:
        say(one_line(f"  {problem}"))


def _line(finding: Finding, width: int) -> str:
    line = f"  {finding.state:<8}{finding.name:<{width}}  {finding.detail}"
    if finding.state == FOUND or not finding.remedy:
        return line
    return f"{line}\n{'':>{width + 12}}{finding.remedy}"
