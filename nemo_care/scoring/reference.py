"""The reference: scores the groups' answers, and follows the policy slowly."""

from collections.abc import Sequence
from typing import Any

import torch

from nemo_care.config import ReferenceConfig
from nemo_care.models.ema import WeightAverage
from nemo_care.models.qwen2_5_vl import Qwen25VL
from nemo_care.parallel.process_groups import Ranks
from nemo_care.rollouts.group import Group
from nemo_care.rollouts.sequences import BatchLayout
from nemo_care.scoring.score import Scorer

PREFIX = "reference."


class Reference:
    """pi_phi of the paper: an EMA of the policy (or frozen), sharded like it."""

    def __init__(
        self,
        model: Qwen25VL,
        config: ReferenceConfig,
        ranks: Ranks,
        layout: BatchLayout,
        *,
        likelihood_clip: float,
        keep_log_probs: bool,
    ) -> None:
        """`model` starts with the policy's weights. `keep_log_probs`: a KL term needs them."""
        self.average = WeightAverage(model, config.ema_decay)
        self.update_every = config.ema_update_every
        self.ranks = ranks
        self.scorer = Scorer(model, ranks, layout)
        self.likelihood_clip = likelihood_clip
        self.keep_log_probs = keep_log_probs

    def score_answers(self, groups: Sequence[Group]) -> None:
        """Set each group's answer likelihoods (algorithm step 3), and log-probs for a KL term."""
        for group, scores in zip(groups, self.scorer.score(groups), strict=True):
            group.answer_likelihood = scores.answer_likelihood.clamp(max=self.likelihood_clip)
            if self.keep_log_probs:
                group.reference_log_probs = scores.log_probs

    def track(self, policy: torch.nn.Module, step: int) -> None:
        """Move towards the policy after every `ema_update_every` optimizer steps (step 8)."""
        if self.update_every and step % self.update_every == 0:
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
