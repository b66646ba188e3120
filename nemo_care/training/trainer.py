"""The GRPO-CARE trainer: `fit` is a run, `run_training_step` is the algorithm."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, NoReturn

import torch

from nemo_care.checkpoints.store import sharding_metadata
from nemo_care.data.fingerprints import Fingerprints, changes
from nemo_care.data.samples import Skipped
from nemo_care.data.stream import PromptStream, TooManySkipped
from nemo_care.data.tokenizer import ChatTokenizer
from nemo_care.errors import EnginesLost
from nemo_care.evaluation.results import Results
from nemo_care.evaluation.validation import Validator
from nemo_care.groups.group import Group
from nemo_care.megatron.cpu import compute_device
from nemo_care.models.weights import export_hf
from nemo_care.ranks.memory import GIB, memory_metrics
from nemo_care.ranks.process_groups import Ranks
from nemo_care.ranks.stop_request import StopRequest, cause_and_status, stopped
from nemo_care.recipe.schema import Recipe
from nemo_care.rollouts.generator import Generator
from nemo_care.runs import metrics as m
from nemo_care.runs.files import RunFiles
from nemo_care.scoring.credit import Credit, selection_rate
from nemo_care.scoring.reference import Reference
from nemo_care.scoring.rewards import BaseRewards
from nemo_care.training.checkpointing import Checkpointing
from nemo_care.training.console import Console, completion_to_show
from nemo_care.training.dynamic_sampling import DynamicSampling
from nemo_care.training.finite import BadSteps, finite_or_none
from nemo_care.training.loggers import Loggers, MetricLogger
from nemo_care.training.policy import Policy
from nemo_care.training.records import Row, completion_rows, rollout_metrics
from nemo_care.training.rollout_ahead import Rollouts
from nemo_care.training.step import Step
from nemo_care.training.step_watch import StepWatch


class GRPOCareTrainer:
    """Trains a policy with GRPO-CARE, or with GRPO if the recipe has no bonus."""

    def __init__(
        self,
        recipe: Recipe,
        ranks: Ranks,
        *,
        prompts: PromptStream,
        generator: Generator,
        rewards: BaseRewards,
        reference: Reference | None,
        policy: Policy,
        validator: Validator,
        files: RunFiles,
        tokenizer: ChatTokenizer,
        loggers: Sequence[MetricLogger],
        bad_lines: Sequence[Skipped] = (),
        annotations: Fingerprints | None = None,
        stop: StopRequest | None = None,
    ) -> None:
        """Connect the parts of a run.

        `reference` is None if neither a bonus nor a KL term needs one; `bad_lines` are the lines of
        the annotations that gave no sample; `annotations` are their fingerprints; `stop` is checked
        after each step.
        """
        self.recipe = recipe
        self.ranks = ranks
        self.rewards = rewards
        self.reference = reference
        self.credit = Credit(recipe.algorithm, masks_truncated=recipe.rollout.masks_truncated)
        self.policy = policy
        self.validator = validator
        self.files = files
        self.bad_lines = bad_lines
        self.annotations = annotations or {}
        self.stop = stop or StopRequest()
        self.console = Console(recipe, active=ranks.rank == 0)
        self.loggers = Loggers(loggers, self.console.warn)
        bad_steps = BadSteps()
        self.checkpoints = Checkpointing(recipe, ranks, files, self.console, bad_steps)
        self.watch = StepWatch(recipe, ranks, files, self.console, tokenizer, bad_steps)
        self.rollouts = Rollouts(
            recipe, prompts, generator, self.console, version=lambda: policy.optimizer_steps
        )
        # Records hold their completions' tokens too where there is one.
        self.recorded_tokens = tokenizer if recipe.rollout.record_log_probs else None
        self.sampling = DynamicSampling(recipe, ranks)
        # The number of the last step that has begun.
        self.step = 0

    @property
    def prompts(self) -> PromptStream:
        """The training prompts."""
        return self.rollouts.prompts

    @property
    def generator(self) -> Generator:
        """The generator of completions."""
        return self.rollouts.generator

    # ------------------------------------------------------------------ the algorithm

    def fit(self) -> dict[str, Any]:
        """Train until `trainer.max_steps`, resuming from the run directory's newest checkpoint.

        Returns:
            The run's summary on rank 0, empty on the others.

        Raises:
            RunStopped: a stop was requested, and a checkpoint is saved.
        """
        started = time.perf_counter()
        self.resume()
        if self._validation_is_missing():
            self.run_validation()
        with self.console.steps(self.step), self.checkpoints.completed_in_failure():
            for step in self.steps():
                with self._saved_without_engines():
                    self.run_training_step(step)
                self.record(step)
                self.watch.stop_if_too_many()
                self.save_if_due()
                self.stop_if_asked()
                if self._validation_is_due():
                    self.run_validation()
        return self.finish(time.perf_counter() - started)

    def steps(self) -> Iterator[Step]:
        """Yield the steps that are left to train."""
        last = self.recipe.trainer.max_steps
        while self.step < last:
            self.step += 1
            yield Step(self.step, left=last - self.step, shown=self.console.phase)

    def run_training_step(self, step: Step) -> None:
        """Run one step of GRPO-CARE (arXiv 2506.16141)."""
        with step.timed(m.STEP_TIME):
            # G completions of each prompt, in several rounds with rollout.dynamic_sampling.
            for groups in self.sampling.rounds(step, self.next_rollouts):
                with step.timed(m.REWARD_TIME):
                    self.rewards(groups)
                with step.timed(m.SCORING_TIME):
                    if self.reference is not None:
                        self.reference.score_answers(groups)
                    # Consistency bonus, total reward and advantage.
                    self.credit(groups)
            self.watch.check_answers(step.groups)
            step.metrics[m.SELECTION_RATE] = selection_rate(
                step.groups, self.recipe.algorithm.consistency, self.ranks
            )
            with step.timed(m.UPDATE_TIME):
                # The reference follows the policy after each optimizer step.
                self.policy.update(step, after_step=self.track_policy)
        self.watch.after_update(step)

    def next_rollouts(self, step: Step) -> list[Group]:
        """Sample G completions of each of the next prompts (algorithm step 1)."""
        try:
            return self.rollouts(step)
        except TooManySkipped as error:
            # The run ends here, on all ranks; the user needs the skipped samples to fix them.
            self.checkpoints.wait()
            step.skipped.extend(error.skipped)
            if self.ranks.rank == 0:
                self.files.append_skipped(step.number, [asdict(item) for item in step.skipped])
            raise

    def track_policy(self, step: Step) -> None:
        """Move the reference towards the policy after an optimizer step (algorithm step 8)."""
        if self.reference is not None:
            self.reference.track(
                self.policy.model, self.policy.optimizer_steps, step.metrics[m.SELECTION_RATE]
            )

    # ------------------------------------------------------------------ validation

    def run_validation(self) -> None:
        """Validate on all levels and record the results."""
        if not self.validator.levels:
            return
        try:
            self.rollouts.settle()
            levels, left_out = self.validator.run(between_batches=self.stop_if_asked)
        except EnginesLost as lost:
            self._save_and_stop(f"an engine was lost: {lost}")
        self.ranks.from_rank_zero(lambda: self._record_validation(levels, left_out))

    def _record_validation(
        self, levels: dict[str, Results], left_out: dict[str, list[Skipped]]
    ) -> None:
        """On rank 0: write to the run directory, the loggers and the console."""
        skipped = [
            {"level": level, **asdict(item)} for level, items in left_out.items() for item in items
        ]
        with self.files.writing(f"the validation of step {self.step}"):
            self.files.list_skipped_once(self.step, skipped)
            self.files.append_validation(self.step, levels)
        metrics = {
            m.VALIDATION.of(level, name): float(value)
            for level, results in levels.items()
            for name, value in results.items()
            if isinstance(value, int | float)
        }
        self.loggers.log(m.checked(metrics), self.step)
        self.console.validation(self.step, levels)

    def _validation_is_missing(self) -> bool:
        """Whether one is due but not recorded: at step 0, or after a kill just before it."""
        recorded = self.ranks.from_rank_zero(lambda: self.step in self.files.validations())
        return (self.step == 0 or self._validation_is_due()) and not recorded

    def _validation_is_due(self) -> bool:
        interval = self.recipe.trainer.validation_interval
        last = self.step == self.recipe.trainer.max_steps
        return last or bool(interval and self.step % interval == 0)

    # ------------------------------------------------------------------ records

    def record(self, step: Step) -> None:
        """Write the step's metrics and completions; collective, since rank 0 needs all of them.

        A step is saved after its record is written, so `CHECKPOINT_TIME` is the delay by saving
        since the previous record: mostly the save of the previous step.
        """
        mine = (
            completion_rows(step.groups, self.recipe.evaluation.judge, self.recorded_tokens),
            self.prompts.worker_memory_gib,
            sum(group.prompt.videos_by_pyav for group in step.groups),
            self.frames_gib(step),
        )
        made, peaks, by_pyav, frames = zip(*self.ranks.gather_from_replicas(mine), strict=True)
        rows = sorted(
            (row for rows in made for row in rows),
            key=lambda row: (row["prompt_index"], row["completion_index"]),
        )
        step.metrics[m.EMA_DISTANCE] = None
        if self.reference is not None:
            with step.timed(m.DISTANCE_TIME):
                step.metrics[m.EMA_DISTANCE] = self.reference.distance(self.policy.model)
        step.metrics[m.WORKER_MEMORY] = m.WORKER_MEMORY.reduce(peaks)
        step.metrics[m.MEDIA_MEMORY] = m.MEDIA_MEMORY.reduce(frames)
        step.metrics[m.BY_PYAV] = m.BY_PYAV.reduce(by_pyav)
        step.metrics[m.SKIPPED] = len(step.skipped)
        step.metrics |= memory_metrics()
        # If rank 0 can't write, all ranks must stop.
        self.ranks.from_rank_zero(lambda: self._record(step, rows))

    def frames_gib(self, step: Step) -> float:
        """GiB of the frames that the ranks of this replica hold; all of them call it."""
        prompts = [group.prompt for group in step.groups] + self.rollouts.prompts_ahead
        held = sum(prompt.frame_bytes for prompt in prompts) + self.prompts.frame_bytes
        in_bytes = torch.tensor(float(held), device=compute_device())
        return float(self.ranks.sum_over_model(in_bytes)) / GIB

    def _record(self, step: Step, rows: list[Row]) -> None:
        """On rank 0: write to the run directory, the loggers and the console."""
        step.timing[m.CHECKPOINT_TIME] = self.checkpoints.take_seconds()
        clip = self.recipe.algorithm.consistency.likelihood_clip
        record = m.checked(rollout_metrics(rows, clip) | step.metrics | step.timing)
        record = {name: finite_or_none(value) for name, value in record.items()}
        self.files.append_step(step.number, record, rows, [asdict(item) for item in step.skipped])
        known = {name: float(value) for name, value in record.items() if value is not None}
        self.loggers.log(known, step.number)
        shown = completion_to_show(self.recipe, step.number, rows)
        if shown is not None:
            group = [row for row in rows if row["prompt_index"] == shown["prompt_index"]]
            self.loggers.log_completions(group, step.number)
        self.console.step(step.number, record, rows, step.skipped)
        self.watch.check_signal(step.number, rows)

    # ------------------------------------------------------------------ state

    def state_dict(self, *, is_loading: bool = False) -> dict[str, Any]:
        """Return everything that a resumed run needs, as Megatron sharded state."""
        metadata = sharding_metadata()
        state = {
            "policy": self.policy.sharded_state_dict(metadata, is_loading),
            "trainer": {
                "step": self.step,
                "stream_position": self.rollouts.position,
                "bad_steps": self.watch.bad_steps.state_dict(),
                "architecture": self.policy.model.family.signature(),
                "annotations": self.annotations,
            },
        }
        if self.reference is not None:
            state["reference"] = self.reference.sharded_state_dict(metadata)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a `state_dict`."""
        self.policy.load_state_dict(state["policy"])
        if self.reference is not None:
            self.reference.load_state_dict(state["reference"])
        self.step = state["trainer"]["step"]
        self.prompts.position = state["trainer"]["stream_position"]
        self.watch.bad_steps.load_state_dict(state["trainer"].get("bad_steps", {}))

    def save_if_due(self) -> None:
        """Save at the interval and after the last step.

        Bad steps are not saved; the next good one is saved instead.
        """
        if self.checkpoints.is_due(self.step):
            self.save()

    def stop_if_asked(self) -> None:
        """Save and raise if a stop was requested; all ranks call it after steps and batches.

        The batches are those of a validation. Also completes a save written in the background.

        Raises:
            CheckpointError: a checkpoint could not be written.
            RunStopped: a signal requested it, or trainer.max_time_per_run is over.
        """
        self.checkpoints.complete_if_written()
        request = self.stop.agreed()
        if request is not None:
            self._save_and_stop(*cause_and_status(request))

    @contextmanager
    def _saved_without_engines(self) -> Iterator[None]:
        """If engines are lost before the policy is updated, save the previous step and stop."""
        position = self.rollouts.position
        try:
            yield
        except EnginesLost as lost:
            self.step -= 1
            self.rollouts.go_back(position)
            self._save_and_stop(f"an engine was lost: {lost}")

    def _save_and_stop(self, cause: str, *status: int) -> NoReturn:
        """Save this step unless it is saved, and raise RunStopped."""
        if self.checkpoints.saved_step != self.step:
            self.save()
        self.checkpoints.wait()
        raise stopped(self.step, cause, *status)

    def save(self) -> None:
        """Save the current step; all ranks call it."""
        self.console.phase(m.CHECKPOINT_TIME.short)
        self.checkpoints.save(self.step, self.state_dict)

    def resume(self) -> None:
        """Resume from the newest checkpoint of the run directory, if there is one.

        Raises:
            InputError: see `Checkpointing.resume`.
        """
        if found := self.checkpoints.resume(lambda: self.state_dict(is_loading=True)):
            state, path = found
            self.load_state_dict(state)
            self.console.resumed(self.step, path)
            for change in changes(state["trainer"].get("annotations", {}), self.annotations):
                self.console.warn(change)
        self.ranks.from_rank_zero(self._rewind_records)
        skipped = self.ranks.from_rank_zero(self.files.skipped_in_training)
        self.prompts.count([Skipped(**record) for record in skipped])

    def _rewind_records(self) -> None:
        """On rank 0: drop the records of steps that will be repeated."""
        with self.files.writing(f"the records up to step {self.step}"):
            start = self.files.go_on(self.step)
            self.files.list_skipped_once(self.step, [asdict(item) for item in self.bad_lines])
        self.console.start(start)
        self.console.bad_lines(self.bad_lines)

    def finish(self, seconds: float) -> dict[str, Any]:
        """Complete the last checkpoint, export the trained model, and write the summary."""
        self.checkpoints.wait()
        self.validator.evaluator.close()
        self.generator.close()
        export = self.files.export if self.recipe.checkpoint.export else None
        if export is not None:
            # Replaces an export of an earlier start.
            export_hf(self.policy.model, self.recipe.model.hf_path, export, replace=True)
        if self.ranks.rank != 0:
            return {}
        validations = self.files.validations()
        summary = {
            "steps": self.step,
            "wall_seconds": seconds,
            "checkpoint_seconds": self.checkpoints.total_seconds,
            "export": str(export) if export is not None else None,
            "skipped": self.files.skipped_count(),
            "bad_steps": self.watch.bad_steps.total,
            "start": validations.get(0),
            "end": validations.get(self.step),
        }
        with self.files.writing("the summary"):
            self.files.write_summary(summary)
        return summary
