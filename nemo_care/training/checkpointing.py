"""When a run saves, how long it waits for a save, and where it resumes."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from nemo_care.checkpoints.store import (
    check_writable,
    list_checkpoints,
    list_damaged,
    load_checkpoint,
    remove_left_overs,
    set_aside,
    step_of,
)
from nemo_care.checkpoints.writer import PendingCheckpoint
from nemo_care.errors import CheckpointError, DamagedCheckpoint, InputError, RunFailed
from nemo_care.ranks.process_groups import Ranks
from nemo_care.recipe.schema import Recipe, recipe_yaml
from nemo_care.runs.directory import has_saved
from nemo_care.runs.files import RunFiles
from nemo_care.training.console import Console
from nemo_care.training.finite import BadSteps

State = dict[str, Any]


def refuse_old_run(recipe: Recipe, checkpoints: Path) -> None:
    """Refuse to start in the directory of an existing run, if the recipe says so.

    Raises:
        InputError: the folder has a checkpoint, complete or damaged, and trainer.resume=never.
    """
    if recipe.trainer.resume != "never":
        return
    if list_checkpoints(checkpoints) or list_damaged(checkpoints):
        raise InputError(
            f"{checkpoints.parent} already holds a run and trainer.resume=never: choose another "
            "exp_manager.name or exp_manager.explicit_log_dir, or remove it"
        )


def refuse_lost_checkpoints(run: Path) -> None:
    """Refuse to start over in a run directory that has results but no checkpoint to resume from.

    A run that ended before its first checkpoint has only records, and starts over.

    Raises:
        InputError: lists what a new run would replace.
    """
    checkpoints = RunFiles.checkpoints_of(run)
    if list_checkpoints(checkpoints) or list_damaged(checkpoints):
        return
    results = [name for name in ("summary.json", "export") if (run / name).exists()]
    if has_saved(run) or not checkpoints.is_dir():
        results += [name for name in ("metrics.jsonl", "validation.jsonl") if (run / name).exists()]
    if results:
        raise InputError(
            f"{run} holds results of a run ({', '.join(results)}) whose checkpoints are gone, so "
            "that it can't resume: choose another exp_manager.name or "
            "exp_manager.explicit_log_dir, or remove it"
        )


class Checkpointing:
    """The checkpoints of one run. All ranks call its methods, at the same points."""

    def __init__(
        self,
        recipe: Recipe,
        ranks: Ranks,
        files: RunFiles,
        console: Console,
        bad_steps: BadSteps,
    ) -> None:
        """Report unusable checkpoints on `console`.

        The weights of bad steps may be bad themselves, so a checkpoint that is completed during bad
        steps removes no older one.
        """
        self.recipe = recipe
        self.ranks = ranks
        self.files = files
        self.console = console
        self.saved_step = 0
        self.bad_steps = bad_steps
        self.total_seconds = 0.0
        self._seconds = 0.0
        self._pending: PendingCheckpoint | None = None

    # ------------------------------------------------------------------ saving

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is due: an interval or the whole run is complete.

        Bad steps postpone an interval's checkpoint.
        """
        interval = self.recipe.checkpoint.save_interval
        due = step // interval > self.saved_step // interval and not self.bad_steps.in_a_row
        return due or step == self.recipe.trainer.max_steps

    @property
    def is_under_way(self) -> bool:
        """Whether a save is in progress."""
        return self._pending is not None

    def save(self, step: int, make_state: Callable[[], State]) -> None:
        """Save the current state; with checkpoint.asynchronous, it is written in the background.

        Waits for a previous save that is still in progress.

        Raises:
            CheckpointError: this save or the previous one failed; on all ranks.
        """
        with self._held_up():
            self._complete()
            self._pending = PendingCheckpoint(
                self.files.checkpoints, step, make_state(), recipe=recipe_yaml(self.recipe)
            )
            self.saved_step = step
            if not self.recipe.checkpoint.asynchronous:
                self._complete()

    def complete_if_written(self) -> None:
        """Complete the save in progress if all ranks have written; called between two steps.

        Raises:
            CheckpointError: a rank could not write; on all ranks.
        """
        if self._pending is None:
            return
        with self._held_up():
            if self._pending.is_written():
                self._complete()

    def wait(self) -> None:
        """Complete the save in progress, however long it takes.

        Raises:
            CheckpointError: a rank could not write; on all ranks.
        """
        with self._held_up():
            self._complete()

    @contextmanager
    def completed_in_failure(self) -> Iterator[None]:
        """Complete the save in progress, of an earlier step, if a check of the run ends it.

        RunFailed is raised on all ranks alike, so all of them wait here.
        """
        try:
            yield
        except RunFailed:
            with suppress(CheckpointError):
                self.wait()
            raise

    def _complete(self) -> None:
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        config = self.recipe.checkpoint
        keep_last = 0 if self.bad_steps.in_a_row else config.keep_last
        # Every step up to a checkpoint must have its records, even after a power failure.
        self.ranks.from_rank_zero(self.files.sync)
        pending.finish(keep_last=keep_last, keep_every=config.keep_every)
        self.ranks.from_rank_zero(self.files.mark_saved)

    @contextmanager
    def _held_up(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - started
            self._seconds += seconds
            self.total_seconds += seconds

    def take_seconds(self) -> float:
        """Return the seconds for which saving has delayed the run since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    # ------------------------------------------------------------------ resuming

    def resume(self, make_state: Callable[[], State]) -> tuple[State, Path] | None:
        """Return the state and the path of the newest undamaged checkpoint.

        Damaged ones are reported on the console and in damaged_checkpoints.jsonl, and renamed.

        Returns:
            None if the run has no checkpoint yet.

        Raises:
            InputError: the folder is not writable; there is a checkpoint, but the recipe says
                trainer.resume=never; all checkpoints are damaged, or missing (see
                `refuse_lost_checkpoints`).
        """
        folder = self.files.checkpoints
        # Must come before the folder of checkpoints is created.
        self.ranks.from_rank_zero(lambda: refuse_lost_checkpoints(self.files.folder))
        check_writable(folder)
        self.ranks.from_rank_zero(lambda: refuse_old_run(self.recipe, folder))
        found, aside = self.ranks.from_rank_zero(self._look)
        for path in reversed(found):
            try:
                state = load_checkpoint(path, make_state)
            except DamagedCheckpoint as damage:
                set_it_aside = partial(self._set_aside, path, str(damage))
                aside.append(self.ranks.from_rank_zero(set_it_aside))
            else:
                self.saved_step = step_of(path)
                return state, path
        if aside:
            raise InputError(
                f"no checkpoint of {folder} can be used; damaged: "
                f"{', '.join(path.name for path in sorted(aside))}. Restore one (as step_...), "
                f"or remove {self.files.folder} to start over"
            )
        return None

    def _look(self) -> tuple[list[Path], list[Path]]:
        remove_left_overs(self.files.checkpoints)
        return list_checkpoints(self.files.checkpoints), list_damaged(self.files.checkpoints)

    def _set_aside(self, path: Path, reason: str) -> Path:
        """On rank 0: report the damage, on the console and in the run, and rename the folder."""
        aside = set_aside(path)
        self.files.append_damaged(path.name, reason, aside.name)
        self.console.damaged(reason, aside)
        return aside
