"""Entry of a training run: a recipe becomes a trainer.

    nemo-care train --config-name tiny_cpu trainer.max_steps=20
    python -m nemo_care.train --config-name tiny_cpu trainer.devices=2 \
        model.tensor_model_parallel_size=2
    torchrun --nproc-per-node 8 -m nemo_care.train --config-name MY_RECIPE --config-path MY_FOLDER
"""

import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_care.config import Recipe, recipe_yaml, seconds_of
from nemo_care.recipes import changed_keys, read_recipe
from nemo_care.start import Command, start

if TYPE_CHECKING:
    from nemo_care.parallel.process_groups import Ranks


def train(arguments: Sequence[str]) -> int:
    """Run the command line of `nemo-care train`; returns the exit status."""
    return start(_COMMAND, arguments)


def _check(recipe: Recipe) -> None:
    from nemo_care.algorithms.checkpointing import refuse_old_run
    from nemo_care.experiment import check_loggers, run_directory
    from nemo_care.preflight import check_training_inputs
    from nemo_care.run_files import RunFiles

    check_loggers(recipe.exp_manager)
    check_training_inputs(recipe)
    # Before anything of that run is written over.
    refuse_old_run(recipe, RunFiles.checkpoints_of(run_directory(recipe.exp_manager)))


def _train(recipe: Recipe, ranks: "Ranks") -> None:
    """Train as one rank, from start to end."""
    from nemo_care.algorithms.build import build_trainer
    from nemo_care.data.decoding import DecodingWorkers
    from nemo_care.data.sources import read_levels, read_training
    from nemo_care.experiment import start_experiment
    from nemo_care.origin import origin
    from nemo_care.parallel.stop_request import StopRequest
    from nemo_care.run_files import RunFiles

    loggers: list = []

    def begin() -> Path:
        folder, made = start_experiment(recipe.exp_manager)
        loggers.extend(made)
        return folder

    files = RunFiles(ranks.from_rank_zero(begin))
    limit = recipe.trainer.max_time_per_run
    stop = StopRequest(None if limit is None else seconds_of(limit))
    stop.catch_signals()
    workers = DecodingWorkers.of(recipe.data, leads=ranks.is_model_leader)

    def write_start() -> None:
        _tell_changes(files.recipe, recipe)
        with files.writing("recipe.yaml and starts.jsonl"):
            files.write_recipe(recipe_yaml(recipe))
            files.append_start(origin())

    ranks.from_rank_zero(write_start)
    with closing(workers):
        trainer = build_trainer(
            recipe,
            ranks,
            files,
            loggers,
            training=read_training(recipe.data, seed=recipe.trainer.seed),
            levels=read_levels(recipe.data, seed=recipe.trainer.seed),
            workers=workers,
            stop=stop,
        )
        summary = trainer.fit()
    if ranks.rank == 0:
        _show_end(files.folder, summary)


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
    if summary["bad_steps"]:
        console.print(f"{summary['bad_steps']} steps left out, see {folder / 'bad_steps'}")
    if summary["export"]:
        console.print(f"trained checkpoint (Hugging Face): {summary['export']}")
    console.print(f"{summary['steps']} steps done; run directory: {folder}")


_COMMAND = Command(
    name="train",
    purpose="""\
Train a policy with GRPO-CARE. A run goes on after the newest checkpoint of its run directory.
Asked to stop (SIGTERM, SIGUSR1, trainer.max_time_per_run), it saves and exits with status 75; the
same command goes on from there.""",
    examples=(
        "trainer.max_steps=500",
        "trainer.devices=2 model.tensor_model_parallel_size=2",
        "algorithm.consistency.margin=0",
        "exp_manager.explicit_log_dir=runs/mine",
    ),
    check=_check,
    run=_train,
)

if __name__ == "__main__":
    from nemo_care.parallel.launch import leave

    leave(train(sys.argv[1:]))
