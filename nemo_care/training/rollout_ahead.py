"""The groups of each sampling round; with rollout.asynchronous, engines work ahead.

While the trainer rewards, scores and updates on a round's groups, the engines then sample the next
rounds' prompts, with the weights from before that update: off-policy by one step, or by up to
rollout.max_staleness.
M. Noukhovitch et al., "Asynchronous RLHF: Faster and More Efficient Off-Policy RL for Language
Models", arXiv 2410.18252.

The order is: collect the oldest round in flight; if it was the last one, update the engines'
weights and submit the next max_staleness rounds together; and only then return the collected
groups. Weights change only while no completion is being sampled, so each completion, and everything
that an engine caches for it, comes from one set of weights. The first of these rounds is trained
one step later, the last one max_staleness steps later. Prompts come in the order of the training
stream, as they do without this option.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_care.data.prompts import Prompt
from nemo_care.data.samples import Skipped
from nemo_care.data.stream import PromptStream, TooManySkipped
from nemo_care.groups.group import Group
from nemo_care.recipe.schema import Recipe
from nemo_care.rollouts.generator import BackgroundGenerator, Generator, Sampling
from nemo_care.runs import metrics as m
from nemo_care.training.console import Console
from nemo_care.training.step import Step

# Separates training's random numbers from those of validation.
_SEED_DOMAIN = 0


@dataclass
class _Round:
    """A round of prompts that is being sampled.

    `position` is the stream's before the prompts were drawn, `version` the weights', `begun` the
    generator's handle for them. `groups` is set if they were collected early, `too_many` if there
    are no prompts.
    """

    position: int
    version: int
    prompts: Sequence[Prompt] = ()
    skipped: Sequence[Skipped] = ()
    begun: Any = None
    groups: list[Group] | None = None
    too_many: TooManySkipped | None = None


class Rollouts:
    """Draws the prompts of each round and has them sampled (algorithm step 1)."""

    def __init__(
        self,
        recipe: Recipe,
        prompts: PromptStream,
        generator: Generator,
        console: Console,
        *,
        version: Callable[[], int],
    ) -> None:
        """Draw nothing yet. `version` returns the number of optimizer steps so far."""
        self.asynchronous = recipe.rollout.asynchronous
        self.max_staleness = recipe.rollout.max_staleness
        self.corrected = recipe.rollout.importance_sampling.enabled
        self.prompts = prompts
        self.generator = generator
        self.console = console
        self.version = version
        self.sampling = Sampling(
            group_size=recipe.algorithm.group_size,
            temperature=recipe.rollout.temperature,
            top_p=recipe.rollout.top_p,
            max_tokens=recipe.rollout.max_completion_tokens,
            seed=(recipe.trainer.seed, _SEED_DOMAIN),
        )
        # In the order of the stream.
        self._ahead: deque[_Round] = deque()
        self._has_warned = False

    def __call__(self, step: Step) -> list[Group]:
        """Return the next groups, and note the step's skipped samples, times and staleness.

        Collective over all ranks.

        Raises:
            TooManySkipped: more of a data set than data.max_skipped_fraction is unusable. However
                early this is found, it is raised only in its round, after all steps before it are
                trained, recorded and saved.
            RunFailed: the generator has failed, on all ranks.
        """
        groups = self._ahead_of(step) if self.asynchronous else self._now(step)
        self._note_deaths(step)
        return groups

    def _now(self, step: Step) -> list[Group]:
        with step.timed(m.DATA_TIME):
            prompts, skipped = self.prompts.next_step()
        step.skipped += skipped
        with step.timed(m.ROLLOUT_TIME):
            return self.generate(prompts)

    def _ahead_of(self, step: Step) -> list[Group]:
        current = self._ahead.popleft() if self._ahead else self._begin(step)
        with step.timed(m.ROLLOUT_TIME):
            groups = self._collected(current)
        step.skipped += current.skipped
        staleness = self.version() - current.version
        step.of_round(m.STALENESS, staleness)
        for group in groups:
            group.staleness = staleness
        if not self._ahead and step.left:
            self._warn_once()
            self._begin_ahead(step)
        return groups

    def generate(self, prompts: Sequence[Prompt]) -> list[Group]:
        """Sample G completions of each prompt now."""
        groups = self.generator.generate(prompts, self.sampling)
        self.generator.rest()
        return groups

    def go_back(self, position: int) -> None:
        """Forget what was drawn after a `position` of this step or before."""
        self._ahead.clear()
        self.prompts.position = position

    def settle(self) -> None:
        """Wait for completions sampled ahead and keep them, which frees the engines.

        Until then, engines can't load the newer weights that a validation needs. Collective.
        """
        for begun in self._ahead:
            if begun.too_many is None:
                begun.groups = self._collected(begun)

    @property
    def prompts_ahead(self) -> list[Prompt]:
        """The prompts that are being sampled ahead."""
        return [prompt for begun in self._ahead for prompt in begun.prompts]

    @property
    def position(self) -> int:
        """The stream's position after the returned groups, for checkpoints.

        A resumed run samples prompts in flight again, with the checkpoint's weights.
        """
        return self._ahead[0].position if self._ahead else self.prompts.position

    def _begin_ahead(self, step: Step) -> None:
        """Start the rounds of the next steps, all with the current weights."""
        # Each following step trains on one round, or on several with dynamic sampling.
        for _ in range(min(self.max_staleness, step.left)):
            self._ahead.append(self._begin(step))
            if self._ahead[-1].too_many is not None:
                break

    def _begin(self, step: Step) -> _Round:
        """Draw prompts and start the engines on them, with the current weights."""
        begun = _Round(self.prompts.position, self.version())
        try:
            with step.timed(m.DATA_TIME):
                begun.prompts, begun.skipped = self.prompts.next_step()
        except TooManySkipped as error:
            begun.too_many = error
            return begun
        with step.timed(m.ROLLOUT_TIME):
            begun.begun = self._background.submit(begun.prompts, self.sampling)
        return begun

    def _collected(self, begun: _Round) -> list[Group]:
        if begun.too_many is not None:
            raise begun.too_many
        if begun.groups is None:
            begun.groups = self._background.collect(begun.begun)
        return begun.groups

    @property
    def _background(self) -> BackgroundGenerator:
        assert isinstance(self.generator, BackgroundGenerator), "check_asynchronous"
        return self.generator

    def _note_deaths(self, step: Step) -> None:
        """Count and show the engines that were started again."""
        if isinstance(self.generator, BackgroundGenerator):
            deaths = self.generator.take_deaths()
            step.of_round(m.ENGINE_RESTARTS, len(deaths))
            for death in deaths:
                self.console.warn(f"started again, and its prompts are sampled again: {death}")

    def _warn_once(self) -> None:
        if not self._has_warned and not self.corrected:
            self.console.uncorrected_rollouts()
        self._has_warned = True
