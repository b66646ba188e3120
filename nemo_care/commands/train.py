"""The command `nemo-care train`, which makes a trainer from a recipe and runs it.

    nemo-care train --config-name tiny_cpu trainer.max_steps=20
    python -m nemo_care.train --config-name tiny_cpu trainer.devices=2 \
        model.tensor_model_parallel_size=2
    torchrun --nproc-per-node 8 -m nemo_care.train --config-name MY_RECIPE --config-path MY_FOLDER
"""

from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_care.commands.start import Command, start
from nemo_care.errors import AlreadyDone, InputError
from nemo_care.process.screen import console
from nemo_care.recipe.compose import read_recipe, recipe_changes
from nemo_care.recipe.schema import Recipe, recipe_yaml, seconds_of

Changes = dict[str, list[Any]]

if TYPE_CHECKING:
    from nemo_care.data.sources import RunData
    from nemo_care.ranks.process_groups import Ranks


def main(arguments: Sequence[str]) -> int:
    """Run the command line of `nemo-care train` and return the exit status."""
    return start(_COMMAND, arguments)


def _check(recipe: Recipe) -> "RunData":
    from nemo_care.checks.recipe import check_training_inputs
    from nemo_care.training.experiment import check_loggers, run_directory

    folder = run_directory(recipe.exp_manager)
    check_loggers(recipe.exp_manager)
    data = check_training_inputs(recipe)
    _check_folder(recipe, folder)
    return data


def _check_folder(recipe: Recipe, folder: Path) -> None:
    """Reject a folder in which this recipe can't train, before anything in it is overwritten.

    Raises:
        AlreadyDone: the run is finished.
        InputError: the run is finished, with a different recipe; it can't resume with this recipe;
            or the folder is not a run's, or holds what trainer.resume=never or lost checkpoints
            protect from being replaced.
    """
    from nemo_care.checkpoints.store import list_checkpoints
    from nemo_care.runs.directory import check_run_directory
    from nemo_care.runs.files import RunFiles
    from nemo_care.training.checkpointing import refuse_lost_checkpoints, refuse_old_run

    refuse_old_run(recipe, RunFiles.checkpoints_of(folder))
    check_run_directory(folder)
    refuse_lost_checkpoints(folder)
    checkpoints = list_checkpoints(RunFiles.checkpoints_of(folder))
    changes = _changes(checkpoints[-1], recipe) if checkpoints else None
    if changes is not None:
        _refuse_fixed(changes, checkpoints[-1])
        _refuse_finished(recipe, changes, folder, checkpoints[-1])


def _refuse_fixed(changes: Changes, checkpoint: Path) -> None:
    """Reject a change that needs state which the checkpoint does not have."""
    before, now = changes.get("model.freeze", [[], []])
    if set(before) != set(now):
        shown, trained = (f"[{', '.join(parts)}]" for parts in (now, before))
        raise InputError(
            f"model.freeze={shown}, but {checkpoint} was trained with {trained} and has optimizer "
            "state and moving averages of what was trained only: keep it, or begin a new run "
            "(model.hf_path) from what `nemo-care export` makes of that one"
        )


def _refuse_finished(recipe: Recipe, changes: Changes, folder: Path, newest: Path) -> None:
    from nemo_care.checkpoints.store import step_of

    steps = step_of(newest)
    if not (folder / "summary.json").is_file() or steps < recipe.trainer.max_steps:
        return
    is_done = f"the run in {folder} is finished with {steps} steps"
    ways = (
        f"trainer.max_steps above {steps} continues it, another exp_manager.explicit_log_dir "
        "or exp_manager.name begins a new one"
    )
    others = {key: pair for key, pair in changes.items() if key != "trainer.max_steps"}
    if others:
        shown = "; ".join(f"{key}: {old} -> {new}" for key, (old, new) in others.items())
        raise InputError(
            f"{is_done}, so nothing would be done with another recipe ({shown}): {ways}"
        )
    raise AlreadyDone(f"{is_done}: {ways}")


def _changes(checkpoint: Path, recipe: Recipe) -> Changes | None:
    """Return the keys that differ from the recipe of a checkpoint, except the run's directory.

    None if the checkpoint's recipe can't be read: resuming verifies it and reports the fault.
    """
    try:
        before = read_recipe(checkpoint / "recipe.yaml")
    except InputError:
        return None
    changes = recipe_changes(before, recipe)
    return {key: pair for key, pair in changes.items() if not key.startswith("exp_manager.")}


def _train(recipe: Recipe, ranks: "Ranks", checked: "RunData | None") -> None:
    """Train on one rank, from start to end."""
    with ExitStack() as held:
        _train_in(recipe, ranks, checked, held)


def _train_in(recipe: Recipe, ranks: "Ranks", checked: "RunData | None", held: ExitStack) -> None:
    """Train on one rank; `held` keeps the run directory locked on rank 0."""
    from nemo_care.checkpoints.store import checkpoint_path
    from nemo_care.data.decoding import DecodingWorkers
    from nemo_care.data.sources import RunData
    from nemo_care.ranks.stop_request import StopRequest
    from nemo_care.runs.directory import hold_run_directory
    from nemo_care.runs.files import RunFiles, Start
    from nemo_care.runs.origin import origin
    from nemo_care.training.build import build_trainer
    from nemo_care.training.experiment import run_directory, start_experiment

    loggers: list = []

    def begin() -> Path:
        folder = run_directory(recipe.exp_manager)
        held.enter_context(hold_run_directory(folder, "train"))
        # Another run can have ended here since the check.
        _check_folder(recipe, folder)
        _, made = start_experiment(recipe.exp_manager)
        loggers.extend(made)
        return folder

    files = RunFiles(ranks.from_rank_zero(begin))
    files.start = Start(
        origin() if ranks.rank == 0 else {},
        recipe_yaml(recipe),
        lambda step: _changes(checkpoint_path(files.checkpoints, step), recipe) or {},
    )
    limit = recipe.trainer.max_time_per_run
    stop = StopRequest(None if limit is None else seconds_of(limit))
    stop.catch_signals()
    workers = DecodingWorkers.of(recipe.data, leads=ranks.is_model_leader)
    with closing(workers):
        data = RunData.on_every_rank(
            ranks, checked, lambda: RunData.read(recipe.data, seed=recipe.trainer.seed)
        )
        assert data.training is not None
        trainer = build_trainer(
            recipe,
            ranks,
            files,
            loggers,
            training=data.training,
            levels=data.levels,
            workers=workers,
            stop=stop,
        )
        summary = trainer.fit()
    if ranks.rank == 0:
        _show_end(files.folder, summary)


def _show_end(folder: Path, summary: dict[str, Any]) -> None:
    """Print the table start against end, and where the files are."""
    from nemo_care.reporting.tables import validation_table

    screen = console(soft_wrap=True)
    if summary["start"] and summary["end"]:
        screen.print(validation_table(summary["start"], summary["end"]))
    if summary["skipped"]:
        screen.print(f"{summary['skipped']} samples skipped, see {folder / 'skipped.jsonl'}")
    if summary["bad_steps"]:
        screen.print(f"{summary['bad_steps']} steps left out, see {folder / 'bad_steps'}")
    if summary["export"]:
        screen.print(f"trained checkpoint (Hugging Face): {summary['export']}")
    screen.print(f"{summary['steps']} steps done; run directory: {folder}")


_COMMAND = Command(
    name="train",
    purpose="""\
Train a policy with GRPO-CARE. A run resumes from the newest checkpoint of its run directory.
When asked to stop (SIGTERM, SIGUSR1, trainer.max_time_per_run), it saves and exits with status 75;
the same command resumes it.""",
    examples=(
        "trainer.max_steps=500",
        "trainer.devices=2 model.tensor_model_parallel_size=2",
        "algorithm.consistency.margin=0",
        "exp_manager.explicit_log_dir=runs/mine",
    ),
    check=_check,
    run=_train,
)
