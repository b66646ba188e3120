"""Bonus, reward and advantage on groups: the pure formulas of `objective`, applied."""

from collections.abc import Sequence

import torch

from nemo_care.config import ConsistencyConfig
from nemo_care.objective.advantages import group_advantages
from nemo_care.objective.consistency import (
    accurate_bonus,
    consistency_bonus,
    counterfactual_bonus,
    dense_bonus,
    selection,
)
from nemo_care.parallel.cpu_compat import compute_device
from nemo_care.parallel.process_groups import Ranks
from nemo_care.rollouts.group import Group


def add_consistency_bonus(group: Group, config: ConsistencyConfig) -> None:
    """Set `consistency_bonus` and the total `reward` (algorithm steps 4 to 6).

    With a bonus coefficient of 0 (the GRPO baseline) no answer likelihood is needed.
    """
    if config.bonus_coefficient == 0:
        group.consistency_bonus = torch.zeros_like(group.base_reward)
    else:
        group.consistency_bonus = _bonus(group, config)
    group.reward = group.base_reward + group.consistency_bonus


def _bonus(group: Group, config: ConsistencyConfig) -> torch.Tensor:
    if config.kind == "counterfactual":
        assert group.pair_likelihood is not None, "the scoring pass makes them"
        counterfactual = counterfactual_bonus(
            group.pair_likelihood[None], bonus_coefficient=config.bonus_coefficient
        )[0]
        share = config.counterfactual_share
        return share * counterfactual + (1 - share) * _group_bonus(group, config)
    accuracy, likelihood = group.accuracy[None], group.answer_likelihood[None]
    if config.kind == "dense":
        return dense_bonus(
            likelihood,
            bonus_coefficient=config.bonus_coefficient,
            likelihood_clip=config.likelihood_clip,
        )[0]
    if config.kind == "accurate":
        return accurate_bonus(
            accuracy,
            likelihood,
            bonus_coefficient=config.bonus_coefficient,
            accuracy_threshold=config.accuracy_threshold,
        )[0]
    assert config.kind == "group", "check_recipe"
    return _group_bonus(group, config)


def _group_bonus(group: Group, config: ConsistencyConfig) -> torch.Tensor:
    """The paper's."""
    return consistency_bonus(
        group.accuracy[None],
        group.answer_likelihood[None],
        bonus_coefficient=config.bonus_coefficient,
        consistency_margin=config.margin,
        likelihood_clip=config.likelihood_clip,
        accuracy_threshold=config.accuracy_threshold,
    )[0]


def selection_rate(
    groups: Sequence[Group], config: ConsistencyConfig, ranks: Ranks
) -> float | None:
    """In which share of the groups of all replicas the bonus tells accurate completions apart.

    Groups with fewer than two of these do not count; None where there is no other, or no bonus.
    Collective over the replicas.
    """
    if config.bonus_coefficient == 0:
        return None
    counts = torch.zeros(2, device=compute_device())
    for group in groups:
        has_choice, chooses = selection(
            group.accuracy[None],
            group.answer_likelihood[None],
            group.consistency_bonus[None],
            accuracy_threshold=config.accuracy_threshold,
        )
        counts += torch.cat([has_choice, chooses]).to(counts)
    with_choice, chosen = ranks.sum_over_data(counts).tolist()
    return chosen / with_choice if with_choice else None


def set_advantage(group: Group) -> None:
    """Set the group-relative `advantage` of each completion (algorithm step 6)."""
    group.advantage = group_advantages(group.reward[None])[0]
