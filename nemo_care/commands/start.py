"""How a command starts its ranks: compose a recipe, check it, and run it on every rank.

    nemo-care COMMAND --config-name RECIPE [key=value ...]
    python -m nemo_care COMMAND ...                  the same
    torchrun --nproc-per-node 8 -m nemo_care COMMAND ...

Started by hand with more than one device, the process starts the ranks itself. Started by
torchrun, or by srun with one task per rank, it is one of them. Started by srun with one task per
machine (as slurm/ does), it starts the ranks of its machine and joins the other starters.
"""

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_care.errors import AlreadyDone, InputError, RunStopped
from nemo_care.megatron.imports import import_lightly
from nemo_care.process.environment import RESOLVED_RECIPE
from nemo_care.process.handover import hand_over, take_over
from nemo_care.process.quiet import quiet_libraries
from nemo_care.process.screen import say
from nemo_care.ranks.gpu_variables import set_gpu_variables
from nemo_care.recipe.compose import compose_recipe, read_recipe, recipe_names
from nemo_care.recipe.schema import Recipe, recipe_yaml

if TYPE_CHECKING:
    from nemo_care.data.sources import RunData
    from nemo_care.ranks.environment import RankEnvironment
    from nemo_care.ranks.process_groups import Ranks
    from nemo_care.ranks.slurm import Node

# What the starter's check has read of the annotations, stored beside the recipe.
_DATA = "data.pickle"


@dataclass(frozen=True)
class Command:
    """A subcommand that runs on ranks.

    `name` is the subcommand's name. `check` runs before any rank starts: it raises an InputError
    for what can't work, and returns the samples that it has read. `run` does the work of one rank;
    rank 0 gets those samples, unless the check ran on another machine. `compose` makes the recipe
    from the command line; ranks that this command starts get that recipe, and `rank_arguments` as
    their command line.
    """

    name: str
    purpose: str
    examples: Sequence[str]
    check: Callable[[Recipe], "RunData | None"]
    run: Callable[[Recipe, "Ranks", "RunData | None"], None]
    compose: Callable[[list[str]], Recipe | None] = compose_recipe
    rank_arguments: Sequence[str] = ()


def start(command: Command, arguments: Sequence[str]) -> int:
    """Run the command line of `nemo-care COMMAND` and return the exit status."""
    if {"-h", "--help"} & set(arguments):
        say(_help(command))
        return 0
    set_gpu_variables()
    quiet_libraries()
    import_from_working_directory()
    from nemo_care.ranks.launch import guarded

    return guarded(_main, command, list(arguments), unwinds=False)


def import_from_working_directory() -> None:
    """Let a recipe name reward functions in the working directory, however the command is started.

    With `python -m`, and therefore torchrun and our own ranks, the import path begins with that
    directory; with `nemo-care` it begins with the folder of the command.
    """
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)


def _help(command: Command) -> str:
    examples = "\n".join(f"                          {example}" for example in command.examples)
    usage = "--config-name RECIPE [--config-path FOLDER] [key=value ...]"
    return f"""usage: nemo-care {command.name} {usage}

{command.purpose}

  --config-name RECIPE  one of {", ".join(recipe_names())}, or a recipe of FOLDER
  --config-path FOLDER  a folder with your own recipes, which can inherit these
  --cfg job             print the resolved recipe and stop (all of its keys)
  key=value             override a key, for example
{examples}
  GROUP=FILE            choose another file of a group, or add one with +:
                          data=video_r1 layout=7b_1x8_h100 +ablation=grpo

All keys with types, defaults and ranges: python -m nemo_care.recipe.docs (docs/recipe.md).
Exit status: 0 done; 1 failed; 2 a recipe or input that can't be used; 75 stopped by SIGTERM or
SIGUSR1, 130 by Ctrl-C, 129 by SIGHUP."""


def _main(command: Command, arguments: list[str]) -> None:
    from nemo_care.ranks.environment import RankEnvironment
    from nemo_care.ranks.open_files import allow_open_files
    from nemo_care.ranks.slurm import node_to_start

    environment = RankEnvironment.read()
    resolved = RESOLVED_RECIPE.value
    if environment is not None and resolved is not None:
        file = Path(resolved)
        import_lightly()
        data = take_over(file.with_name(_DATA)) if environment.rank == 0 else None
        _run_rank(command, read_recipe(file), environment, data, checked=True)
        return
    recipe = command.compose(arguments)
    if recipe is None:
        return
    import_lightly()  # takes seconds, so errors of the command line come first
    trainer = recipe.trainer
    # Before the ranks start, because they inherit it.
    allow_open_files(trainer.world_size)
    node = node_to_start(trainer.devices, trainer.num_nodes)
    if node is not None:
        data = None
        # The other machines' ranks wait for those of the first.
        if node.place == 0:
            # The ranks of all machines find out together whether it is already done.
            with suppress(AlreadyDone):
                data = command.check(recipe)
        with _for_ranks(recipe, data):
            del data  # the starter only waits and needs no samples
            _start_ranks(command, recipe, node)
        return
    if environment is not None:
        _run_rank(command, recipe, environment, None, checked=False)
        return
    if trainer.num_nodes > 1:
        raise InputError(
            f"trainer.num_nodes={trainer.num_nodes}: start the run on several machines with "
            "slurm/, srun or torchrun; this command alone starts only one machine's ranks"
        )
    data = command.check(recipe)
    if trainer.devices == 1:
        _run_rank(command, recipe, RankEnvironment(0, 1, 0), data, checked=True)
        return
    with _for_ranks(recipe, data):
        del data
        _start_ranks(command, recipe)


@contextmanager
def _for_ranks(recipe: Recipe, data: "RunData | None") -> Iterator[None]:
    """Hand the recipe and data to this machine's ranks, which need not read them again."""
    with tempfile.TemporaryDirectory(prefix="nemo-care-") as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_text(recipe_yaml(recipe))
        if data is not None:
            hand_over(data, file.with_name(_DATA))
            del data
        os.environ[RESOLVED_RECIPE.name] = str(file)
        yield


def _start_ranks(command: Command, recipe: Recipe, node: "Node | None" = None) -> None:
    """Start the ranks on this machine."""
    from nemo_care.ranks.launch import start_ranks

    program = ["-m", "nemo_care", command.name, *command.rank_arguments]
    status = start_ranks(recipe.trainer.devices, program, node)
    if status:
        sys.exit(status)


def _run_rank(
    command: Command,
    recipe: Recipe,
    environment: "RankEnvironment",
    data: "RunData | None",
    *,
    checked: bool,
) -> None:
    """Run one rank, from start to end.

    `checked`: the process that started this rank has checked the recipe's inputs and may have read
    `data` of them. With torchrun and srun no process has.
    """
    from nemo_care.checks.recipe import check_world_size
    from nemo_care.ranks.process_groups import Layout, Ranks

    check_world_size(recipe, environment.world_size)
    ranks = Ranks(Layout.of(recipe), environment, cpu_threads=recipe.trainer.cpu_threads)
    try:
        if not checked:
            # The files are the same for all ranks, so rank 0 reads them.
            data = _checked_by_one(command, recipe, ranks)
        command.run(recipe, ranks, data)
    except (RunStopped, AlreadyDone):
        # All ranks end together: one that exits with open groups can crash.
        ranks.close()
        raise
    ranks.close()


def _checked_by_one(command: Command, recipe: Recipe, ranks: "Ranks") -> "RunData | None":
    """Check the recipe's inputs on rank 0, which alone gets the data that was read."""
    data: list[RunData | None] = [None]

    def check() -> None:
        data[0] = command.check(recipe)

    ranks.from_rank_zero(check)
    return data[0]
