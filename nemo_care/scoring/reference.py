"""The reference: scores the groups' answers, and follows the policy slowly."""

from collections.abc import Sequence
from typing import Any

import torch

from nemo_care.config import AlgorithmConfig
from nemo_care.models.ema import WeightAverage
from nemo_care.models.qwen2_5_vl import Qwen25VL
from nemo_care.objective.consistency import answer_likelihood
from nemo_care.parallel.process_groups import Ranks
from nemo_care.rollouts.batches import BatchLayout
from nemo_care.rollouts.group import Group
from nemo_care.rollouts.group_batch import GroupBatch
from nemo_care.scoring.group_rewards import add_consistency_bonus, set_advantage
from nemo_care.scoring.score import Scorer, Table

PREFIX = "reference."
# What the fused pass finds out about each completion, in this order.
_FOUND = ("answer_likelihood", "consistency_bonus", "reward", "advantage")


class Reference:
    """pi_phi of the paper: an EMA of the policy (or frozen), sharded like it."""

    def __init__(
        self, model: Qwen25VL, algorithm: AlgorithmConfig, ranks: Ranks, layout: BatchLayout
    ) -> None:
        """`model` starts with the policy's weights."""
        config = algorithm.reference
        self.average = WeightAverage(model, config.ema_decay, offload=config.offload)
        self.update_every = config.ema_update_every
        self.start_step = config.ema_start_step
        self.max_selection_rate = config.ema_max_selection_rate
        self.consistency = algorithm.consistency
        self.all_tokens = algorithm.kl_coefficient > 0
        # A reference for the KL term alone needs no bonus.
        self.answer_pairs = (
            self.consistency.kind == "counterfactual" and self.consistency.bonus_coefficient > 0
        )
        self.ranks = ranks
        # As the model was built: only a recipe with fp8.scoring builds it for 8 bits.
        self.scorer = Scorer(model, ranks, layout, fp8=True)

    def score_answers(self, groups: Sequence[Group]) -> None:
        """The fused pass: answer likelihood, bonus, reward and advantage (steps 3 to 6).

        They are made on the last stage while the pass runs. There, where the loss is computed, the
        reference's log-probabilities stay too. Where those are not finite the likelihood is NaN,
        as without an answer; the update asks the log-probabilities, and leaves the step out.
        """
        with self.average.in_place():
            tables = self.scorer.score(
                groups,
                self._score_batch,
                rows=len(_FOUND),
                all_tokens=self.all_tokens,
                answer_pairs=self.answer_pairs,
            )
        for group, table in zip(groups, tables, strict=True):
            for name, values in zip(_FOUND, table, strict=True):
                setattr(group, name, values)

    def answer_likelihoods(self, groups: Sequence[Group]) -> list[torch.Tensor]:
        """Likelihood of each completion's answer, not clipped (see `Scorer`)."""
        with self.average.in_place():
            return self.scorer.answer_likelihoods(groups)

    def _score_batch(self, batch: GroupBatch, log_probs: torch.Tensor) -> list[Table]:
        likelihoods = answer_likelihood(log_probs, batch.answer_mask)
        likelihoods = likelihoods.clamp(max=self.consistency.likelihood_clip).cpu()
        asked = batch.asked_of_reference(all_tokens=self.all_tokens)
        vectors = batch.unpadded(torch.where(asked, log_probs, torch.nan))
        sizes = [group.size for group in batch.groups]
        tables = []
        for group, likelihood, scored in zip(
            batch.groups, likelihoods.split(sizes), vectors, strict=True
        ):
            group.reference_log_probs = scored
            group.answer_likelihood = likelihood
            add_consistency_bonus(group, self.consistency)
            set_advantage(group)
            table = torch.stack([getattr(group, name) for name in _FOUND])
            tables.append(table.to(log_probs.device))
        return tables

    def track(
        self, policy: torch.nn.Module, step: int, selection_rate: float | None = None
    ) -> None:
        """Move towards the policy after every `ema_update_every` optimizer steps (step 8).

        Not before `ema_start_step`, nor while the share of groups in which the bonus tells accurate
        completions apart is above `ema_max_selection_rate`.
        """
        waits = selection_rate is not None and selection_rate > self.max_selection_rate
        is_due = self.update_every and step % self.update_every == 0
        if is_due and step > self.start_step and not waits:
            self.average.update(policy)

    def distance(self, policy: torch.nn.Module) -> float:
        """|theta - phi| / |theta| over the whole model."""
        squares = self.ranks.sum_over_model(self.average.squared_distance(policy))
        return float((squares[0] / squares[1]).sqrt())

    def sharded_state_dict(self, metadata: dict[str, Any]) -> dict[str, Any]:
        """The average as Megatron sharded tensors, under keys of its own."""
        return self.average.sharded_state_dict(PREFIX, metadata)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a loaded `sharded_state_dict`."""
        self.average.load_state_dict(state, PREFIX)
