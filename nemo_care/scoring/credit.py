"""Credit: each completion's bonus, reward and advantage, from rewards and answer likelihoods.

The formulas are in `objective`; this module applies them to groups. Every rank computes the same
credit from the same numbers, with or without a reference.
"""

from collections.abc import Sequence

import torch

from nemo_care.groups.group import Group, known
from nemo_care.megatron.cpu import compute_device
from nemo_care.objective.advantages import ADVANTAGES
from nemo_care.objective.bonuses import BONUSES, BonusInputs
from nemo_care.objective.consistency import selection
from nemo_care.ranks.process_groups import Ranks
from nemo_care.recipe.algorithm import AlgorithmConfig, ConsistencyConfig


class Credit:
    """Sets `consistency_bonus`, `reward` and `advantage` of groups (algorithm steps 4 to 6)."""

    def __init__(self, algorithm: AlgorithmConfig, *, masks_truncated: bool = False) -> None:
        """Use the recipe's bonus and advantage, and `masks_truncated` of its rollouts."""
        self.masks_truncated = masks_truncated
        self.consistency = algorithm.consistency
        self.bonus = BONUSES[algorithm.consistency.kind]
        self.advantage = ADVANTAGES[algorithm.advantage]

    def __call__(self, groups: Sequence[Group]) -> None:
        """Set the credit of groups that have base rewards and likelihoods.

        With a bonus coefficient of 0 (the GRPO baseline) no answer likelihood is needed. Masked
        completions count in their group's baseline, and get an advantage of 0 themselves.
        """
        for group in groups:
            base_reward = known(group.base_reward)
            group.consistency_bonus = self._bonus(group, base_reward)
            group.reward = base_reward + group.consistency_bonus
            group.advantage = self.advantage(group.reward[None])[0]
            if self.masks_truncated:
                ended = torch.tensor([completion.ended for completion in group.completions])
                group.advantage = torch.where(ended, group.advantage, 0.0)

    def _bonus(self, group: Group, base_reward: torch.Tensor) -> torch.Tensor:
        if self.consistency.bonus_coefficient == 0:
            return torch.zeros_like(base_reward)
        pairs = group.pair_likelihood
        inputs = BonusInputs(
            group.accuracy[None],
            known(group.answer_likelihood)[None],
            None if pairs is None else pairs[None],
        )
        return self.bonus.compute(inputs, self.consistency)[0]


def needs_pairs(config: ConsistencyConfig) -> bool:
    """Whether the bonus needs every answer's likelihood after every reasoning of its group."""
    return config.bonus_coefficient > 0 and BONUSES[config.kind].needs_pairs


def selection_rate(
    groups: Sequence[Group], config: ConsistencyConfig, ranks: Ranks
) -> float | None:
    """Return the share of all replicas' groups in which the bonus separates accurate completions.

    Groups with fewer than two accurate completions do not count; None if there is no such group,
    or no bonus. Collective over the replicas.
    """
    if config.bonus_coefficient == 0:
        return None
    counts = torch.zeros(2, device=compute_device())
    for group in groups:
        has_choice, chooses = selection(
            group.accuracy[None],
            known(group.answer_likelihood)[None],
            known(group.consistency_bonus)[None],
            accuracy_threshold=config.accuracy_threshold,
        )
        counts += torch.cat([has_choice, chooses]).to(counts)
    with_choice, chosen = ranks.sum_over_data(counts).tolist()
    return chosen / with_choice if with_choice else None
