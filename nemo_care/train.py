"""Entry of a training run: a recipe becomes ranks, the ranks become a trainer.

    nemo-care train --config-name tiny_cpu trainer.max_steps=20
    python -m nemo_care.train --config-name tiny_cpu trainer.devices=2 \
        model.tensor_model_parallel_size=2
    torchrun --nproc-per-node 8 -m nemo_care.train --config-name MY_RECIPE --config-path MY_FOLDER

Started by hand with more than one device, the process starts the ranks itself. Started by torchrun
or srun, it is one of them.
"""

import os
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_care.config import Recipe
from nemo_care.errors import InputError
from nemo_care.quiet import quiet_libraries
from nemo_care.recipes import (
    changed_keys,
    compose_recipe,
    read_recipe,
    recipe_names,
    save_recipe,
)

if TYPE_CHECKING:
    from nemo_care.parallel.process_groups import RankEnvironment

# Tells a rank that this command started where the resolved recipe lies.
_RESOLVED = "NEMO_CARE_RESOLVED_RECIPE"


def train(arguments: Sequence[str]) -> int:
    """Run the command line of `nemo-care train`; returns the exit status."""
    if {"-h", "--help"} & set(arguments):
        print(_help())
        return 0
    quiet_libraries()
    _import_from_working_directory()
    from nemo_care.parallel.launch import guarded

    return guarded(_main, list(arguments))


def _import_from_working_directory() -> None:
    """Let a recipe name rewards that lie where the command is started, however it is started.

    `python -m`, and so torchrun and our own ranks, begin their path there; the command
    `nemo-care` begins it with the folder that holds the command.
    """
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)


def _help() -> str:
    return f"""usage: nemo-care train --config-name RECIPE [--config-path FOLDER] [key=value ...]

Train a policy with GRPO-CARE. A run goes on after the newest checkpoint of its run directory.

  --config-name RECIPE  one of {", ".join(recipe_names())}, or a recipe of FOLDER
  --config-path FOLDER  a folder with recipes of your own, which may inherit ours
  --cfg job             print the resolved recipe and stop (all of its keys)
  key=value             override a key, for example
                          trainer.max_steps=500
                          trainer.devices=2 model.tensor_model_parallel_size=2
                          algorithm.consistency.margin=0
                          exp_manager.explicit_log_dir=runs/mine
  GROUP=FILE            take another file of a group, or with + before it one more:
                          data=video_r1 layout=7b_1x8_h100 +ablation=grpo

All keys with types, defaults and ranges: python -m nemo_care.recipe_docs (docs/recipe.md).
Exit status: 0 done; 1 failed; 2 a recipe or input that can't be used."""


def _main(arguments: list[str]) -> None:
    from nemo_care.parallel.process_groups import RankEnvironment
    from nemo_care.preflight import check_inputs

    environment = RankEnvironment.read()
    if environment is not None and _RESOLVED in os.environ:
        run_rank(read_recipe(Path(os.environ[_RESOLVED])), environment, checked=True)
        return
    recipe = compose_recipe(arguments)
    if recipe is None:
        return
    if environment is not None:
        run_rank(recipe, environment, checked=False)
        return
    if recipe.trainer.num_nodes > 1:
        raise InputError(
            f"trainer.num_nodes={recipe.trainer.num_nodes}: start the ranks of several machines "
            "with torchrun or srun; this command starts those of one"
        )
    check_inputs(recipe)
    if recipe.trainer.devices == 1:
        run_rank(recipe, RankEnvironment(0, 1, 0), checked=True)
        return
    _start(recipe)


def _start(recipe: Recipe) -> None:
    """Start the ranks on this machine; they read the resolved recipe instead of composing it."""
    import tempfile

    from nemo_care.parallel.launch import start_ranks

    with tempfile.TemporaryDirectory(prefix="nemo-care-") as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_text(save_recipe(recipe))
        os.environ[_RESOLVED] = str(file)
        status = start_ranks(recipe.trainer.devices, ["-m", "nemo_care.train"])
    if status:
        sys.exit(status)


def run_rank(recipe: Recipe, environment: "RankEnvironment", *, checked: bool) -> None:
    """Train as one rank, from start to end.

    `checked`: the process that started this rank has run `check_inputs`; torchrun and srun have
    not.
    """
    from nemo_care.algorithms.build import build_trainer
    from nemo_care.data.decoding import DecodingWorkers
    from nemo_care.data.sources import read_levels, read_training
    from nemo_care.experiment import start_experiment
    from nemo_care.parallel.process_groups import Ranks
    from nemo_care.preflight import check_inputs, check_world_size, layout_of
    from nemo_care.run_files import RunFiles

    check_world_size(recipe, environment.world_size)
    ranks = Ranks(layout_of(recipe), environment, cpu_threads=recipe.trainer.cpu_threads)
    if not checked:
        # The files are the same for all ranks, so one of them looks.
        ranks.from_rank_zero(lambda: check_inputs(recipe))
    loggers: list = []

    def start() -> Path:
        folder, made = start_experiment(recipe.exp_manager)
        loggers.extend(made)
        return folder

    files = RunFiles(ranks.from_rank_zero(start))
    workers = DecodingWorkers.of(recipe.data, leads=ranks.is_model_leader)
    if ranks.rank == 0:
        _tell_changes(files.recipe, recipe)
        files.write_recipe(save_recipe(recipe))
    with closing(workers):
        trainer = build_trainer(
            recipe,
            ranks,
            files,
            loggers,
            training=read_training(recipe.data, seed=recipe.trainer.seed),
            levels=read_levels(recipe.data, seed=recipe.trainer.seed),
            workers=workers,
        )
        summary = trainer.fit()
    if ranks.rank == 0:
        _show_end(files.folder, summary)
    ranks.close()


def _tell_changes(old: Path, recipe: Recipe) -> None:
    """Say which keys differ from those that the run in this directory began with."""
    if not old.is_file():
        return
    changes = changed_keys(read_recipe(old), recipe)
    if changes:
        print(f"recipe changed since this run was last started: {'; '.join(changes)}")


def _show_end(folder: Path, summary: dict[str, Any]) -> None:
    """The table start against end, and where things lie."""
    from rich.console import Console

    from nemo_care.reporting.tables import validation_table

    # Paths may hold brackets, which are no markup.
    console = Console(soft_wrap=True, highlight=False, markup=False)
    if summary["start"] and summary["end"]:
        console.print(validation_table(summary["start"], summary["end"]))
    if summary["skipped"]:
        console.print(f"{summary['skipped']} samples skipped, see {folder / 'skipped.jsonl'}")
    if summary["export"]:
        console.print(f"trained checkpoint (Hugging Face): {summary['export']}")
    console.print(f"{summary['steps']} steps done; run directory: {folder}")


if __name__ == "__main__":
    sys.exit(train(sys.argv[1:]))
