import math
import random
import statistics

import pytest
import torch

from nemo_care.objective.advantages import ADVANTAGES, group_advantages

pytestmark = pytest.mark.numeric


@pytest.mark.parametrize("group_size", [2, 3, 8, 17])
@pytest.mark.parametrize("eps", [1e-4, 0.1])
def test_random_groups_agree_with_plain_python(group_size, eps):
    draw = random.Random(group_size)
    rewards = [[draw.uniform(0, 2.5) for _ in range(group_size)] for _ in range(20)]
    expected = [
        [(r - statistics.fmean(group)) / (statistics.stdev(group) + eps) for r in group]
        for group in rewards
    ]
    advantages = group_advantages(torch.tensor(rewards, dtype=torch.float64), eps=eps)
    torch.testing.assert_close(advantages, torch.tensor(expected, dtype=torch.float64))


def test_the_standard_deviation_is_the_unbiased_one():
    # Deviations 1 and -1: the unbiased std is sqrt(2), the biased one 1.
    advantages = group_advantages(torch.tensor([[2.0, 0.0]]), eps=0.0)
    torch.testing.assert_close(advantages, torch.tensor([[1.0, -1.0]]) / math.sqrt(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("value", [0.0, 0.1, 1.1, 1.35, 2.5, 1 / 3, 1e6 / 7, -0.7])
def test_equal_rewards_give_exactly_zero(dtype, value):
    for group_size in (1, 2, 3, 6, 7, 8, 10, 13, 1000):
        advantages = group_advantages(torch.full((2, group_size), value, dtype=dtype))
        assert (advantages == 0).all()
        assert advantages.dtype == dtype


@pytest.mark.parametrize("group_size", [2, 3, 8])
def test_other_estimators_agree_with_plain_python(group_size):
    draw = random.Random(group_size)
    rewards = [[draw.uniform(0, 2.5) for _ in range(group_size)] for _ in range(20)]
    wanted = {
        "dr_grpo": [[r - statistics.fmean(group) for r in group] for group in rewards],
        "rloo": [
            [r - statistics.fmean(group[:i] + group[i + 1 :]) for i, r in enumerate(group)]
            for group in rewards
        ],
    }
    for name, expected in wanted.items():
        advantages = ADVANTAGES[name](torch.tensor(rewards, dtype=torch.float64))
        torch.testing.assert_close(advantages, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("name", ADVANTAGES)
def test_every_estimator_keeps_types_refuses_nan_and_gives_equal_rewards_zero(name):
    advantages = ADVANTAGES[name]
    assert (advantages(torch.full((2, 7), 1 / 3)) == 0).all()
    assert (advantages(torch.full((2, 1), 1 / 3)) == 0).all()
    assert advantages(torch.tensor([[0, 2]])).dtype == torch.float32
    with pytest.raises(ValueError, match="NaN"):
        advantages(torch.tensor([[1.0, math.nan]]))


def test_groups_do_not_touch_each_other():
    rewards = torch.tensor([[1.0, 1.0, 1.0], [0.0, 1.0, 2.0], [5.0, 5.0, 6.0]])
    together = group_advantages(rewards)
    alone = torch.cat([group_advantages(rewards[i : i + 1]) for i in range(3)])
    assert torch.equal(together, alone)
    torch.testing.assert_close(together.mean(dim=-1), torch.zeros(3))


def test_rewards_that_would_spoil_the_group_are_refused():
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="NaN"):
            group_advantages(torch.tensor([[1.0, bad]]))
    for shape in [(4,), (2, 0), (1, 2, 3)]:
        with pytest.raises(ValueError, match=r"\[B, G\]"):
            group_advantages(torch.ones(shape))
