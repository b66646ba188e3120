"""The recipe's consistency keys reach the formulas."""

import math
from types import SimpleNamespace

import pytest
import torch

from nemo_care.config import ConsistencyConfig
from nemo_care.scoring.group_rewards import add_consistency_bonus


def group():
    """Three accurate completions, one of them without an answer, and a wrong one."""
    return SimpleNamespace(
        accuracy=torch.tensor([1.0, 1.0, 1.0, 0.0]),
        base_reward=torch.tensor([2.0, 2.0, 1.0, 1.0]),
        answer_likelihood=torch.tensor([0.5, 0.9, math.nan, 0.8]),
        pair_likelihood=torch.tensor(
            [
                [0.5, 0.5, math.nan, 0.5],
                [0.1, 0.9, math.nan, 0.1],
                [math.nan] * 4,
                [0.8, 0.8, math.nan, 0.8 / math.sqrt(math.e)],
            ]
        ),
    )


@pytest.mark.parametrize(
    ("keys", "bonus"),
    [
        ({}, [0, 0.5, 0, 0]),
        ({"margin": 0.3}, [0.5, 0.5, 0, 0]),
        ({"likelihood_clip": 0.5}, [0.5, 0.5, 0, 0]),
        ({"kind": "accurate"}, [0.5, 0.5, 0, 0]),
        ({"kind": "accurate", "bonus_coefficient": 0.2}, [0.2, 0.2, 0, 0]),
        ({"kind": "accurate", "accuracy_threshold": 1.0}, [0, 0, 0, 0]),
        ({"kind": "dense"}, [0.25, 0.45, 0, 0.4]),
        ({"kind": "dense", "bonus_coefficient": 1.0, "likelihood_clip": 0.6}, [0.5, 0.6, 0, 0.6]),
        ({"kind": "dense", "bonus_coefficient": 0.0}, [0, 0, 0, 0]),
        ({"kind": "counterfactual"}, [0, 0.5, 0, -0.25]),
        ({"kind": "counterfactual", "bonus_coefficient": 1.0}, [0, 1, 0, -0.5]),
        ({"kind": "counterfactual", "counterfactual_share": 0.4}, [0, 0.5, 0, -0.1]),
        ({"kind": "counterfactual", "counterfactual_share": 0.0}, [0, 0.5, 0, 0]),
    ],
)
def test_each_kind_of_bonus_follows_its_keys(keys, bonus):
    made = group()
    add_consistency_bonus(made, ConsistencyConfig(**keys))
    torch.testing.assert_close(made.consistency_bonus, torch.tensor(bonus, dtype=torch.float32))
    torch.testing.assert_close(made.reward, made.base_reward + made.consistency_bonus)
