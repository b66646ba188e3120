"""Base rewards of groups: the rewards that the recipe names, applied to completions."""

from collections.abc import Sequence

import torch

from nemo_care.groups.group import Group
from nemo_care.objective.rewards import base_reward, length_penalty
from nemo_care.ranks.process_groups import Ranks
from nemo_care.recipe.algorithm import AlgorithmConfig
from nemo_care.recipe.rollout import RolloutConfig
from nemo_care.scoring.reward_functions import (
    LENGTH_PENALTY,
    Reward,
    load_rewards,
    reward_name,
    reward_value,
    reward_weights,
)


class BaseRewards:
    """Accuracy, format and the user's rewards of each completion (algorithm step 2).

    With rollout.truncated=penalise also the length penalty, which is added with weight 1.
    """

    def __init__(self, config: AlgorithmConfig, ranks: Ranks, rollout: RolloutConfig) -> None:
        """Load the rewards, which run on the leader of each replica so that its ranks agree.

        Raises:
            InputError: see `load_rewards`.
        """
        self.names = [reward_name(entry) for entry in config.rewards]
        self.weights = list(reward_weights(config))
        self.rollout = rollout
        if rollout.truncated == "penalise":
            self.names.append(LENGTH_PENALTY)
            self.weights.append(1.0)
        self.ranks = ranks
        self.functions: dict[str, Reward] = {}
        # Only on the leader: importing a user's reward can load a model, which other ranks do not
        # need.
        ranks.from_leader(lambda: self.functions.update(load_rewards(config)))

    def __call__(self, groups: Sequence[Group]) -> None:
        """Set `rewards` and `base_reward` of each group.

        Raises:
            RuntimeError: a user's reward raised an error; names reward and prompt.
            ValueError: a reward is not one finite number; names reward and prompt.
        """
        tables = self.ranks.from_leader(lambda: [self._score(group) for group in groups])
        for group, table in zip(groups, tables, strict=True):
            values = torch.tensor(table, dtype=torch.float32)
            group.rewards = dict(zip(self.names, values, strict=True))
            group.base_reward = base_reward(values, self.weights)
            # Checked here, where every rank has it: later only the last pipeline stage would stop.
            if not group.base_reward.isfinite().all():
                raise ValueError(
                    f"the weighted sum of the rewards of prompt {group.prompt.sample.sample_id} is "
                    "not a finite number: lower algorithm.reward_weights"
                )

    def _score(self, group: Group) -> list[list[float]]:
        """Return each reward of each completion, K lists of G."""
        rewards = [
            [
                reward_value(name, function, completion.text, group.prompt.sample)
                for completion in group.completions
            ]
            for name, function in self.functions.items()
        ]
        if self.rollout.truncated == "penalise":
            longest = self.rollout.max_completion_tokens
            buffer = self.rollout.length_penalty_share * longest
            rewards.append(
                [
                    length_penalty(completion.length, longest=longest, buffer=buffer)
                    for completion in group.completions
                ]
            )
        return rewards
