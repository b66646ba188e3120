"""Base rewards of groups: the pure formulas of `objective`, applied."""

from collections.abc import Sequence

import torch

from nemo_care.config import AlgorithmConfig
from nemo_care.objective.rewards import accuracy_reward, format_reward
from nemo_care.parallel.process_groups import Ranks
from nemo_care.rollouts.group import Group


class BaseRewards:
    """Accuracy and format of each completion (algorithm step 2)."""

    def __init__(self, config: AlgorithmConfig, ranks: Ranks) -> None:
        """Rewards are computed on the leader of each replica, so that its ranks agree."""
        self.min_reasoning_words = config.min_reasoning_words
        self.ranks = ranks

    def __call__(self, groups: Sequence[Group]) -> None:
        """Set `accuracy` and `format` of each group."""
        values = self.ranks.from_leader(lambda: [self._score(group) for group in groups])
        for group, (accuracy, well_formed) in zip(groups, values, strict=True):
            group.accuracy = torch.tensor(accuracy)
            group.format = torch.tensor(well_formed)
            # Here, where every rank sees it: later only the last pipeline stage would stop.
            if not (group.accuracy.isfinite().all() and group.format.isfinite().all()):
                raise ValueError(f"a reward of prompt {group.prompt.sample.sample_id} is no number")

    def _score(self, group: Group) -> tuple[list[float], list[float]]:
        sample = group.prompt.sample
        texts = [completion.text for completion in group.completions]
        return (
            [accuracy_reward(sample.problem_type, text, sample.solution) for text in texts],
            [format_reward(text, min_reasoning_words=self.min_reasoning_words) for text in texts],
        )
