"""The reference model, which scores the groups' answers and slowly follows the policy."""

from collections.abc import Sequence
from typing import Any

import torch

from nemo_care.groups.batch import GroupBatch
from nemo_care.groups.batching import BatchLayout
from nemo_care.groups.group import Group
from nemo_care.models.ema import WeightAverage
from nemo_care.models.video_language_model import VideoLanguageModel
from nemo_care.objective.consistency import answer_likelihood
from nemo_care.ranks.process_groups import Ranks
from nemo_care.recipe.algorithm import AlgorithmConfig
from nemo_care.scoring.credit import needs_pairs
from nemo_care.scoring.scorer import Scorer, Table, per_group

PREFIX = "reference."


class Reference:
    """pi_phi of the paper: an EMA of the policy (or frozen), sharded like it."""

    def __init__(
        self,
        model: VideoLanguageModel,
        algorithm: AlgorithmConfig,
        ranks: Ranks,
        layout: BatchLayout,
    ) -> None:
        """Create it from `model`, which has the policy's weights, and its memory where frozen."""
        config = algorithm.reference
        self.average = WeightAverage(
            model,
            config.ema_decay,
            offload=config.offload,
            frozen={name for name, _ in model.named_parameters() if model.is_frozen(name)},
        )
        self.update_every = config.ema_update_every
        self.start_step = config.ema_start_step
        self.max_selection_rate = config.ema_max_selection_rate
        self.likelihood_clip = algorithm.consistency.likelihood_clip
        self.all_tokens = algorithm.kl_coefficient > 0
        self.answer_pairs = needs_pairs(algorithm.consistency)
        self.ranks = ranks
        # Depends on how the model was built: only fp8.scoring builds it for 8 bits.
        self.scorer = Scorer(model, ranks, layout, fp8=True)
        # Of the weights since the last `track`, if it has moved; see `WeightAverage.update`.
        self._squares: torch.Tensor | None = None

    def score_answers(self, groups: Sequence[Group]) -> None:
        """Set `answer_likelihood`, clipped (algorithm step 3), on every rank, in one fused pass.

        Also sets `pair_likelihood` if the bonus needs it. `reference_log_probs` stay on the last
        stage, where the loss is computed. If those are not finite the likelihood is NaN, as without
        an answer; the update checks the log-probabilities and leaves the step out.
        """
        with self.average.in_place():
            tables = self.scorer.score(
                groups,
                self._score_batch,
                rows=1,
                all_tokens=self.all_tokens,
                answer_pairs=self.answer_pairs,
            )
        for group, table in zip(groups, tables, strict=True):
            group.answer_likelihood = table[0]
            group.pair_likelihood = table[1:] if self.answer_pairs else None

    def answer_likelihoods(self, groups: Sequence[Group]) -> list[torch.Tensor]:
        """Return the likelihood of each completion's answer, not clipped (see `Scorer`)."""
        with self.average.in_place():
            return self.scorer.answer_likelihoods(groups)

    def _score_batch(self, batch: GroupBatch, log_probs: torch.Tensor) -> list[Table]:
        likelihood = answer_likelihood(log_probs, batch.answer_mask)
        likelihood = likelihood.clamp(max=self.likelihood_clip)
        asked = batch.asked_of_reference(all_tokens=self.all_tokens)
        vectors = batch.unpadded(torch.where(asked, log_probs, torch.nan))
        for group, scored in zip(batch.groups, vectors, strict=True):
            group.reference_log_probs = scored
        return per_group(batch, likelihood)

    def track(
        self, policy: torch.nn.Module, step: int, selection_rate: float | None = None
    ) -> None:
        """Move towards the policy after every `ema_update_every` optimizer steps (step 8).

        Not before `ema_start_step`, nor while the share of groups in which the bonus separates
        accurate completions is above `ema_max_selection_rate`.
        """
        self._squares = None
        waits = selection_rate is not None and selection_rate > self.max_selection_rate
        is_due = self.update_every and step % self.update_every == 0
        if is_due and step > self.start_step and not waits:
            self._squares = self.average.update(policy)

    def distance(self, policy: torch.nn.Module) -> float:
        """Return |theta - phi| / |theta| over the whole model.

        `policy` must have the weights of the last `track`, as it has after an update.
        """
        squares, self._squares = self._squares, None
        if squares is None:
            squares = self.average.squared_distance(policy)
        dense, experts = squares.unbind()
        squares = self.ranks.sum_over_model(dense)
        if self.ranks.layout.expert > 1:
            squares += self.ranks.sum_over_experts(experts)
        return float((squares[0] / squares[1]).sqrt())

    def sharded_state_dict(self, metadata: dict[str, Any]) -> dict[str, Any]:
        """Return the average as Megatron sharded tensors, under its own keys."""
        return self.average.sharded_state_dict(PREFIX, metadata)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the average from a loaded `sharded_state_dict`."""
        self._squares = None
        self.average.load_state_dict(state, PREFIX)
