"""Checks of each step's numbers: bad steps are stored and reported; too many end the run."""

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from nemo_care.data.tokenizer import ChatTokenizer
from nemo_care.errors import RunFailed
from nemo_care.groups.files import StoredGroup, write_groups
from nemo_care.groups.group import Completion, Group
from nemo_care.objective.bonuses import BONUSES
from nemo_care.ranks.process_groups import Ranks
from nemo_care.recipe.evaluation import judged_by
from nemo_care.recipe.schema import Recipe
from nemo_care.runs import metrics as m
from nemo_care.runs.files import RunFiles
from nemo_care.runs.metric import Metric
from nemo_care.training.console import Console
from nemo_care.training.finite import NAMES, BadSteps, NotFinite, asked_of_reference
from nemo_care.training.records import Row
from nemo_care.training.step import Step

# Interval of steps between repeated warnings of a large difference or an idle bonus.
_REPEAT_AFTER = 50
# The bonus is idle if, over this number of steps, it distinguished completions in at most this
# share of the groups that gave it a choice.
_IDLE_STEPS = 20
_IDLE_RATE = 0.05
# Nothing is learnt if the rewards in every group were all equal over this number of steps.
_SILENT_STEPS = 10
# The share of answers that may lack a likelihood in the first step that has answers.
_MAX_UNSCORED = 0.05
# Number of tokens shown of a completion in this error: the last ones, where the answer is.
_SHOWN_TOKENS = 60
# Per rank. Backward propagates a NaN towards the input: the last ones are nearest to its origin.
_PARAMETERS = 50


class StepWatch:
    """Checks each step's numbers after its update."""

    def __init__(
        self,
        recipe: Recipe,
        ranks: Ranks,
        files: RunFiles,
        console: Console,
        tokenizer: ChatTokenizer,
        bad_steps: BadSteps,
    ) -> None:
        """Count bad steps in `bad_steps`."""
        self.recipe = recipe
        self.ranks = ranks
        self.files = files
        self.console = console
        self.tokenizer = tokenizer
        self._answers_seen = False
        self._silent_steps = 0
        self.bad_steps = bad_steps
        # Steps with too large a difference, by staleness.
        self._differences: Counter[int] = Counter()
        self._selection_rates: deque[float] = deque(maxlen=_IDLE_STEPS)
        self._idle_steps = 0

    def after_update(self, step: Step) -> None:
        """Count the step, store its inputs if it was left out, and check its numbers. Collective.

        Raises:
            RunFailed: see `check_differences`.
        """
        self.bad_steps.note(step.number, bad=step.not_finite is not None)
        if step.not_finite is not None:
            self._store(step, step.not_finite)
        step.metrics[m.BAD_STEP] = int(step.not_finite is not None)
        step.metrics[m.BAD_STEPS] = self.bad_steps.total
        self.check_differences(step)
        self.check_selection(step.number, step.metrics[m.SELECTION_RATE])

    def _store(self, step: Step, bad: NotFinite) -> None:
        """Write the groups of all replicas, and where what was not finite."""
        stored: list[StoredGroup] = []
        if self.ranks.is_loss_leader:
            stored = [
                self._marked(group, own)
                for group, own in zip(step.trained, bad.log_probs, strict=True)
            ]
        rank = {
            "rank": self.ranks.rank,
            "replica": self.ranks.data_rank,
            "parameters": list(bad.parameters[-_PARAMETERS:]),
            "parameters_not_finite": len(bad.parameters),
        }
        everyone = self.ranks.gather_on_rank_zero((rank, stored))
        # If rank 0 can't write, all ranks must stop.
        self.ranks.from_rank_zero(lambda: self._write(step, bad, everyone))

    def _write(
        self,
        step: Step,
        bad: NotFinite,
        everyone: Sequence[tuple[dict[str, Any], list[StoredGroup]]],
    ) -> None:
        """On rank 0: write to the run directory and the console."""
        replicas = [of_rank["replica"] for of_rank, _ in everyone]
        not_finite: list[dict[str, Any]] = [
            {
                "what": kind,
                "first_rank": first,
                "replica": None if first is None else replicas[first],
            }
            for kind, first in bad.first.items()
        ]
        about = {
            "step": step.number,
            "update": bad.update,
            "optimizer_steps": step.optimizer_steps + bad.update,
            "not_finite": not_finite,
            "gradients": [
                of_rank for of_rank, _ in everyone if of_rank["parameters_not_finite"] > 0
            ],
        }
        parts = [group for _, of_rank in everyone for group in of_rank]
        file = self.files.bad_step(step.number)
        with self.files.writing(f"the inputs of step {step.number}, which was left out,"):
            write_groups(file, sorted(parts, key=lambda group: group.prompt_index), about)
        in_a_row = len(self.bad_steps.in_a_row)
        self.console.bad_step(step.number, why(not_finite), in_a_row, file)

    def _marked(self, group: Group, log_probs: Sequence[torch.Tensor]) -> StoredGroup:
        """Return the group, marked with what is not finite of each completion."""
        stored = StoredGroup.of(group, log_probs)
        all_tokens = self.recipe.algorithm.kl_coefficient > 0
        for number, (completion, record) in enumerate(
            zip(group.completions, stored.record["completions"], strict=True)
        ):
            vectors = {"rollout": completion.log_probs, "policy": log_probs[number]}
            if group.reference_log_probs is not None:
                scored = group.reference_log_probs[number]
                vectors["reference"] = asked_of_reference(completion, scored, all_tokens=all_tokens)
            record["not_finite"] = [
                name for name, values in vectors.items() if not bool(values.isfinite().all())
            ]
        return stored

    def stop_if_too_many(self) -> None:
        """Fail if too many steps in a row were bad; called after recording the step.

        Raises:
            RunFailed: more than trainer.max_bad_steps in a row were left out.
        """
        row, allowed = self.bad_steps.in_a_row, self.recipe.trainer.max_bad_steps
        if len(row) <= allowed:
            return
        steps = f"steps {row[0]} to {row[-1]}" if len(row) > 1 else f"step {row[0]}"
        raise RunFailed(
            f"{steps} had to be left out because of numbers that are not finite, more in a row "
            f"than trainer.max_bad_steps={allowed}. Their inputs, and where numbers were not "
            f"finite, are in {self.files.bad_steps}. The weights are those from before these "
            f"steps. Look at one with: nemo-care replay {self.files.folder} --step {row[-1]}. "
            "The same command as before resumes from the newest checkpoint; to get past these "
            "steps, try a lower optimizer.lr or optimizer.clip_grad, "
            "model.precision.dtype=fp32, or an older checkpoint (remove newer ones)"
        )

    def check_differences(self, step: Step) -> None:
        """Compare rollout, scoring and update on the same tokens, all from before this update.

        Before the run's first update, all three used the same weights. Later, the rollout may have
        used weights from s optimizer steps before, which makes a difference by itself: completions
        of each staleness s are compared with 1 + s times the bound, as if an optimizer step moved
        the policy by as much as sampler and trainer may differ. In a bad step, there is something
        to compare only after its first update.

        Raises:
            RunFailed: they differ by more than the bounds before the policy was ever updated.
        """
        if step.not_finite is not None and step.not_finite.update == 0:
            return
        if step.optimizer_steps == 0:
            self._check_first_step(step.metrics)
            return
        for staleness, difference in self._differences_of(step.metrics):
            bound = (1 + staleness) * self.recipe.rollout.max_logprob_difference
            if difference is not None and difference > bound:
                if self._differences[staleness] % _REPEAT_AFTER == 0:
                    self.console.difference(
                        step.number, difference, bound, staleness, again=_REPEAT_AFTER
                    )
                self._differences[staleness] += 1

    @staticmethod
    def _differences_of(metrics: Mapping[Metric, float | None]) -> list[tuple[int, float | None]]:
        """Return the differences of rollout and training, by staleness."""
        found = [
            (int(of_class.label), value)
            for name, value in metrics.items()
            if (of_class := m.ROLLOUT_DIFFERENCE_BY_STALENESS.match(name))
        ]
        return found or [(0, metrics[m.ROLLOUT_DIFFERENCE])]

    def check_selection(self, step: int, rate: float | None) -> None:
        """Warn if the bonus no longer distinguishes accurate completions.

        `rate`: the share of groups in which it did, None if no group gave it a choice.
        """
        if rate is None or not BONUSES[self.recipe.algorithm.consistency.kind].selects:
            return
        self._selection_rates.append(rate)
        mean = sum(self._selection_rates) / len(self._selection_rates)
        if len(self._selection_rates) < _IDLE_STEPS or mean > _IDLE_RATE:
            self._idle_steps = 0
            return
        if self._idle_steps % _REPEAT_AFTER == 0:
            self.console.idle_bonus(step, mean, _IDLE_STEPS, again=_REPEAT_AFTER)
        self._idle_steps += 1

    def check_answers(self, groups: Sequence[Group]) -> None:
        """Check that the first answers of the run have a likelihood; collective.

        Nothing is checked if nothing uses likelihoods.

        Raises:
            RunFailed: over all replicas, the tokens of more than 5% of the answers were not found.
        """
        has_bonus = self.recipe.algorithm.consistency.bonus_coefficient > 0
        is_wanted = has_bonus or judged_by(self.recipe.evaluation, "likelihood")
        if self._answers_seen or not is_wanted:
            return
        answered = [c for group in groups for c in group.completions if c.has_answer]
        unscored = [completion for completion in answered if completion.is_unscored]
        example = self._shown(unscored[0]) if unscored else None
        everyone = self.ranks.gather_from_replicas((len(answered), len(unscored), example))
        total = sum(answers for answers, _, _ in everyone)
        missing = sum(count for _, count, _ in everyone)
        self._answers_seen = total > 0
        if missing > _MAX_UNSCORED * total:
            first = next(shown for _, _, shown in everyone if shown is not None)
            raise RunFailed(
                f"{missing} of {total} well-formed answers of the first step that has any got no "
                "likelihood, because none of their tokens was found: with this tokenizer no such "
                f"completion could get a bonus. One of them is {first}. Use the tokenizer files "
                "that were published with the checkpoint of model.hf_path. If they are in use "
                "already, report it: their decoder does not reproduce the text token by token"
            )

    def _shown(self, completion: Completion) -> str:
        """Return a completion with its last tokens."""
        tokens = self.tokenizer.base.convert_ids_to_tokens(completion.token_ids.tolist())
        more = "... " if len(tokens) > _SHOWN_TOKENS else ""
        return f"{completion.text!r}, its tokens: {more}{tokens[-_SHOWN_TOKENS:]}"

    def check_signal(self, step: int, rows: Sequence[Row]) -> None:
        """Warn if the rewards in every group of the last steps were all equal.

        `rows` are the step's completions of all replicas, on rank 0.
        """
        if any(row["advantage"] != 0 for row in rows):
            self._silent_steps = 0
            return
        self._silent_steps += 1
        if self._silent_steps % _REPEAT_AFTER == _SILENT_STEPS:
            self.console.no_signal(step, rows, self._silent_steps, again=_REPEAT_AFTER)

    def _check_first_step(self, metrics: Mapping[Metric, float | None]) -> None:
        bounds = [
            (
                "rollout and training",
                metrics[m.ROLLOUT_DIFFERENCE],
                "rollout.max_logprob_difference",
                self.recipe.rollout.max_logprob_difference,
            ),
            # The reference starts as the policy. There is no value if no completion has an answer.
            (
                "the scoring pass and training",
                metrics[m.REFERENCE_DIFFERENCE] or 0.0,
                "algorithm.reference.max_logprob_difference",
                self.recipe.algorithm.reference.max_logprob_difference,
            ),
        ]
        for passes, difference, key, bound in bounds:
            if not (difference is not None and difference <= bound):
                raise RunFailed(
                    f"log-probabilities of {passes} differ by {difference:.4f} on average in the "
                    f"first step, more than {key}={bound}: weights or positions are wrong on one "
                    "side"
                )


def why(not_finite: Sequence[Mapping[str, Any]]) -> str:
    """Return a phrase for what was not finite, and where first."""
    parts = []
    for item in not_finite:
        name = NAMES.get(item["what"], item["what"])
        if item["first_rank"] is None:
            parts.append(f"the norm of {name} (on all ranks)")
        else:
            parts.append(f"{name} (first on rank {item['first_rank']}, replica {item['replica']})")
    return ", ".join(parts)
