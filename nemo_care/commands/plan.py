"""The command `nemo-care plan`."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

from nemo_care.commands.options import option_parser
from nemo_care.errors import InputError
from nemo_care.megatron.imports import import_lightly
from nemo_care.planning.gpus import DEFAULT_GPU, gpu_names, read_gpu
from nemo_care.process.quiet import quiet_libraries
from nemo_care.process.screen import say

if TYPE_CHECKING:
    from nemo_care.planning.plan import Question
    from nemo_care.planning.work import Efficiency
    from nemo_care.recipe.schema import Recipe

_DESCRIPTION = """Estimate memory, time and communication of a recipe before it is queued.

Every pipeline stage is built without memory, in a fake world with the recipe's number of ranks, and
runs the step's own code. Works on any machine; no GPU is used."""
# The package's choices of the recipe group.
_ROLLOUTS = ("megatron", "vllm", "vllm_async")
_EPILOG = """examples:
  nemo-care plan --config-name tiny_cpu
  nemo-care plan --config-path my_recipes --config-name mine --gpu h200-141gb trainer.num_nodes=4
  nemo-care plan --config-name tiny_cpu --dry-run

All remaining arguments are those of nemo-care train. Exit status: 0 a plan was made (whether the
recipe fits is "fits" with --json); 2 a recipe or layout that can't be used."""


def _parser() -> argparse.ArgumentParser:
    usage = "--config-name RECIPE [--config-path FOLDER] [key=value ...] [options]"
    parser = option_parser("plan", usage, _DESCRIPTION, _EPILOG)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="run a step of one rank of each stage, and reject a recipe that does not fit",
    )
    parser.add_argument(
        "--search",
        action="store_true",
        help="list the layouts that fit, fastest estimate first (takes minutes)",
    )
    parser.add_argument(
        "--compare-rollouts",
        action="store_true",
        help=f"compare time and memory of rollout={', '.join(_ROLLOUTS)}",
    )
    parser.add_argument(
        "--gpus", type=int, help="for --search: number of GPUs (default: the recipe's)"
    )
    parser.add_argument(
        "--limit",
        type=int,
        default=5,
        help="for --search: number of layouts to list (default %(default)s)",
    )
    parser.add_argument(
        "--gpu", default=DEFAULT_GPU, help=f"one of {', '.join(gpu_names())} (default %(default)s)"
    )
    parser.add_argument("--gpu-memory-gib", type=float, help="its memory, if different")
    parser.add_argument(
        "--margin",
        type=float,
        default=0.1,
        help="share of the memory to keep free for fragmentation (default %(default)s)",
    )
    parser.add_argument(
        "--prompt-tokens",
        type=int,
        help="typical prompt length, for the times (default: one full video)",
    )
    parser.add_argument(
        "--completion-tokens",
        type=int,
        help="typical completion length (default: half of the longest)",
    )
    parser.add_argument(
        "--assume",
        action="append",
        default=[],
        metavar="NAME=NUMBER",
        help="an efficiency that the times assume, such as flops=0.5; repeatable",
    )
    return parser


def main(arguments: Sequence[str]) -> int:
    """Run the command line of `nemo-care plan` and return the exit status."""
    from nemo_care.ranks.launch import guarded

    quiet_libraries()
    return guarded(_main, arguments)


def _main(arguments: Sequence[str]) -> None:
    options, rest = _parser().parse_known_args(list(arguments))
    # The fake world uses no GPU, not even one of a login node.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from nemo_care.recipe.compose import compose_recipe

    recipe = compose_recipe(rest)
    if recipe is None:
        return
    import_lightly()
    from nemo_care.planning.advice import remedies
    from nemo_care.planning.plan import Question, make_plan, plan_as_json
    from nemo_care.planning.tables import plan_report, print_report

    if not 0 <= options.margin < 1:
        raise InputError(f"--margin {options.margin}: must be at least 0 and below 1")
    for name in ("prompt_tokens", "completion_tokens"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    question = Question(
        gpu=read_gpu(options.gpu, options.gpu_memory_gib),
        margin=options.margin,
        prompt_tokens=options.prompt_tokens,
        completion_tokens=options.completion_tokens,
        efficiency=_efficiency(options.assume),
    )
    if options.search:
        _search(recipe, question, options)
        return
    if options.compare_rollouts:
        _compare_rollouts(recipe, rest, question, as_json=options.json)
        return
    plan = make_plan(recipe, question, compare=not options.dry_run)
    if options.dry_run:
        from nemo_care.planning.dry_run import dry_run, dry_run_report

        runs = dry_run(plan)
        if options.json:
            say(json.dumps([vars(run) for run in runs]))
        else:
            print_report(dry_run_report(plan, runs))
        return
    advice = remedies(plan)
    if options.json:
        say(json.dumps(plan_as_json(plan, advice)))
    else:
        print_report(plan_report(plan, advice))


def _search(recipe: "Recipe", question: "Question", options: argparse.Namespace) -> None:
    from nemo_care.planning.search import search, search_as_json, search_report
    from nemo_care.planning.tables import print_report

    def show(line: str) -> None:
        say(line, file=sys.stderr)

    found = search(recipe, question, options.gpus, options.limit, show)
    if options.json:
        say(json.dumps(search_as_json(found)))
        return
    gpus = options.gpus or recipe.trainer.world_size
    print_report(search_report(found, question, gpus, recipe.rollout))


def _compare_rollouts(
    recipe: "Recipe", arguments: Sequence[str], question: "Question", *, as_json: bool
) -> None:
    from nemo_care.planning.rollouts import compare_rollouts, comparison_as_json, comparison_report
    from nemo_care.planning.tables import print_report
    from nemo_care.recipe.compose import compose_recipe, recipe_changes

    rest = [argument for argument in arguments if not argument.startswith("rollout=")]
    variants: dict[str, Recipe | InputError] = {}
    chosen = None
    for name in _ROLLOUTS:
        try:
            variant = compose_recipe([*rest, f"rollout={name}"])
        except InputError as error:
            variants[name] = error
            continue
        assert variant is not None, "the recipe was composed, not printed"
        variants[name] = variant
        if all(key.startswith("exp_manager.") for key in recipe_changes(recipe, variant)):
            chosen = name
    found = compare_rollouts(variants, chosen, question)
    if as_json:
        say(json.dumps(comparison_as_json(found)))
    else:
        print_report(comparison_report(found))


def _efficiency(assumptions: Sequence[str]) -> "Efficiency":
    from nemo_care.planning.work import Efficiency

    known = [field.name for field in fields(Efficiency)]
    values = {}
    for item in assumptions:
        name, _, value = item.partition("=")
        if name not in known:
            raise InputError(f"--assume {item}: choose {', '.join(known)}")
        try:
            values[name] = float(value)
        except ValueError:
            raise InputError(f"--assume {item}: {value or 'nothing'} is not a number") from None
        if values[name] <= 0:
            raise InputError(f"--assume {item}: must be above 0")
    return Efficiency(**values)
