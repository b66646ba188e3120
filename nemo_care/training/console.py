"""What a run prints: a progress bar, sampled completions, and a table at the end.

In a log file, where a progress bar would print every state, each step has a line instead.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nemo_care.data.samples import Skipped
from nemo_care.objective.statistics import mean_of_known
from nemo_care.process.screen import console, one_line, plain, printable
from nemo_care.recipe.schema import Recipe
from nemo_care.runs import metrics as m

_SHOWN = {
    "reward": m.TOTAL_REWARD,
    "acc": m.ACCURACY,
    "p": m.ANSWER_LIKELIHOOD,
    "bonus": m.BONUS_RATE,
}


class Console:
    """Prints on rank 0 and is silent on the others."""

    def __init__(self, recipe: Recipe, *, active: bool) -> None:
        """Print only if `active`, which is true on one rank."""
        self.recipe = recipe
        self.active = active
        self._in_log = not sys.stderr.isatty()
        self._bar: tqdm | None = None

    def _print(self, text: Any) -> None:
        if self.active:
            # tqdm's own writer keeps the bar below the text.
            with tqdm.external_write_mode():
                console(soft_wrap=True).print(text)

    def warn(self, text: str) -> None:
        """Print a warning."""
        self._print(plain(text, style="yellow"))

    @contextmanager
    def steps(self, done: int) -> Iterator[None]:
        """Show a progress bar over all optimizer steps, of which `done` are complete."""
        self._bar = tqdm(
            total=self.recipe.trainer.max_steps,
            initial=done,
            unit="step",
            disable=self._in_log or not self.active,
            dynamic_ncols=True,
        )
        try:
            yield
        finally:
            self._bar.close()
            self._bar = None

    def phase(self, name: str) -> None:
        """Show the current phase."""
        if self._bar is not None and name != m.STEP_TIME.short:
            self._bar.set_description(f"{name:<10}")

    def step(
        self,
        step: int,
        metrics: Mapping[str, Any],
        rows: Sequence[Mapping[str, Any]],
        skipped: Sequence[Skipped],
    ) -> None:
        """Show a finished step, and from time to time one of its completions."""
        for item in skipped:
            self.warn(one_line(f"skipped sample {item.sample_id}: {item.reason}"))
        values = {
            short: f"{metrics[name]:.2f}"
            for short, name in _SHOWN.items()
            if metrics.get(name) is not None
        }
        if self._in_log:
            shown = ", ".join(f"{name} {value}" for name, value in values.items())
            of = self.recipe.trainer.max_steps
            self._print(f"step {step} of {of}: {shown}, {metrics[m.STEP_TIME]:.1f} s")
        if self._bar is not None:
            self._bar.set_postfix(values, refresh=False)
            self._bar.update()
        completion = completion_to_show(self.recipe, step, rows)
        if completion is not None:
            self._completion(step, completion)

    def _completion(self, step: int, row: Mapping[str, Any]) -> None:
        shown = {"accuracy": ("accuracy", ".2f"), "format": ("format", ".0f")}
        shown |= {key: (key, ".2f") for key in row if m.OWN_REWARD.match(key)}
        shown["answer_likelihood"] = ("p", ".2f")
        parts = [
            f"{name} {row[key]:{form}}"
            for key, (name, form) in shown.items()
            if row[key] is not None
        ]
        parts.append(f"bonus {row['bonus']:.2f}")
        head = f"step {step}, prompt {row['prompt_id']} ({', '.join(parts)}): "
        self._print(
            plain(one_line(head), style="dim").append(printable(row["completion"]), "not dim")
        )

    def bad_lines(self, bad_lines: Sequence[Skipped]) -> None:
        """Report unusable lines of the annotations; a large file may have thousands."""
        if bad_lines:
            text = f"skipped {len(bad_lines)} lines of the annotations; the first: "
            self.warn(one_line(text + bad_lines[0].reason))

    def bad_step(self, step: int, why: str, in_a_row: int, file: Path) -> None:
        """Report that a step was left out."""
        text = f"step {step} is left out, not finite: {why}; {in_a_row} in a row; inputs: {file}"
        self.warn(text)

    def difference(
        self, step: int, difference: float, bound: float, staleness: int, again: int
    ) -> None:
        """Warn that rollout and training disagree; repeated every `again` such steps.

        `bound` is that of completions whose weights are `staleness` optimizer steps older.
        """
        limit = f"rollout.max_logprob_difference={bound / (1 + staleness):g}"
        if staleness:
            limit = (
                f"{bound:g}, {1 + staleness} times {limit}, for weights that are {staleness} "
                "optimizer step(s) older"
            )
        text = (
            f"step {step}: log-probabilities of rollout and training differ by {difference:.4f} on "
            f"average, more than {limit} (repeated every {again} such steps; metric "
            f"{m.ROLLOUT_DIFFERENCE})"
        )
        self.warn(text)

    def uncorrected_rollouts(self) -> None:
        """Warn that completions of older weights are treated as the current policy's."""
        text = (
            "rollout.asynchronous: completions come from weights before the last update, and "
            "nothing corrects for it; rollout.importance_sampling.enabled=true (with "
            f"rollout.temperature=1) weights their tokens (metric {m.STALENESS})"
        )
        self.warn(text)

    def idle_bonus(self, step: int, rate: float, steps: int, again: int) -> None:
        """Warn that the consistency bonus no longer selects."""
        text = (
            f"step {step}: in the last {steps} steps the bonus distinguished accurate completions "
            f"in {rate:.0%} of the groups. Either their reasoning supports the answer by now, or "
            "the reference is equally sure of an answer whatever the reasoning: a validation's "
            f"consistency rate and forced-reasoning probe show which (metric {m.SELECTION_RATE}; "
            f"repeated every {again} such steps)"
        )
        self.warn(text)

    def no_signal(
        self, step: int, rows: Sequence[Mapping[str, Any]], steps: int, again: int
    ) -> None:
        """Warn that the rewards within every group have been equal for some steps."""
        rewards = mean_of_known([row["reward"] for row in rows])
        text = (
            f"step {step}: in the last {steps} steps no group had a signal: all completions of a "
            f"prompt got the same reward ({_rate(rewards)} on average in this step), so nothing "
            "was learnt. Look at the completions in the run's rollouts/: can their answers match "
            "the solutions, and are the questions neither too easy nor too hard? A higher "
            "rollout.temperature or algorithm.group_size makes completions differ more (metric "
            f"{m.WITHOUT_SIGNAL}; repeated every {again} such steps)"
        )
        self.warn(text)

    def resumed(self, step: int, checkpoint: Path) -> None:
        """Report where the run resumes."""
        self._print(plain(f"resumed after step {step} from {checkpoint}"))

    def start(self, start: Mapping[str, Any]) -> None:
        """Report what this start changes, and which records of earlier steps are missing."""
        step = start["after_step"]
        changed = "; ".join(
            f"{key}: {old} -> {new}" for key, (old, new) in start["changed"].items()
        )
        if changed and step < self.recipe.trainer.max_steps:
            self._print(plain(f"recipe changed from step {step + 1} on: {changed}"))
        elif changed:
            text = f"no step is left to train, so changes of the recipe have no effect: {changed}"
            self.warn(text)
        if start["missing_steps"]:
            text = (
                "metrics.jsonl lacks steps before the checkpoint: "
                f"{_ranges(start['missing_steps'])}; a crash of the machine may have lost them"
            )
            self.warn(text)

    def damaged(self, reason: str, aside: Path) -> None:
        """Report that a checkpoint is unusable."""
        text = f"damaged checkpoint, the one before it is tried; set aside as {aside.name}: "
        self._print(plain(text + reason, style="bold red"))

    def validation(self, step: int, levels: Mapping[str, Mapping[str, Any]]) -> None:
        """Show a validation on one line."""
        parts = []
        for level, result in levels.items():
            text = f"{level} accuracy {_rate(result['accuracy'])}"
            if result["consistency_rate"] is not None:
                text += f" consistency {_rate(result['consistency_rate'])}"
            parts.append(text)
        self._print(one_line(f"validation after step {step}: {'; '.join(parts)}"))


def completion_to_show(
    recipe: Recipe, step: int, rows: Sequence[Mapping[str, Any]]
) -> Mapping[str, Any] | None:
    """One of the step's completions where it is time to show one, by chance; otherwise None."""
    every = recipe.trainer.show_completion_every
    if not (every and rows and (step == 1 or step % every == 0)):
        return None
    return rows[(step * 31) % len(rows)]


def _ranges(numbers: Sequence[int]) -> str:
    """Return ascending numbers as "3, 5 to 8"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ", ".join(" to ".join(map(str, part)) for part in parts)


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
