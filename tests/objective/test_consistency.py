import math
import random
import statistics
from fractions import Fraction

import pytest
import torch

from nemo_care.objective.consistency import (
    accurate_bonus,
    answer_likelihood,
    consistency_bonus,
    counterfactual_bonus,
    dense_bonus,
    selection,
)

pytestmark = pytest.mark.numeric

NAN = math.nan


def bonus_by_hand(
    accuracy, likelihood, coefficient=0.5, margin=0.0, clip=0.95, threshold=0.1
) -> list[float]:
    """Steps 4 and 5 of the algorithm for one group, in plain Python, with exact means."""
    average = statistics.mean(map(Fraction, accuracy))
    members = [
        i
        for i, value in enumerate(accuracy)
        if value > threshold and value >= average and not math.isnan(likelihood[i])
    ]
    if not members:
        return [0.0] * len(accuracy)
    clipped = [min(p, clip) for p in likelihood]
    m = statistics.mean(Fraction(clipped[i]) for i in members)
    return [
        coefficient * value if i in members and clipped[i] >= m - Fraction(margin) else 0.0
        for i, value in enumerate(accuracy)
    ]


def bonus_of(accuracy, likelihood, **options) -> list[float]:
    """The bonus of one group given as lists."""
    return consistency_bonus(
        torch.tensor([accuracy], dtype=torch.float32),
        torch.tensor([likelihood], dtype=torch.float32),
        **options,
    )[0].tolist()


def test_the_most_likely_half_of_the_accurate_gets_the_bonus():
    assert bonus_of([1, 1, 0, 1], [0.9, 0.5, 0.94, 0.2]) == [0.5, 0, 0, 0]
    assert bonus_of([1, 1, 0, 1], [0.9, 0.6, 0.94, 0.2]) == [0.5, 0.5, 0, 0]


@pytest.mark.parametrize("group_size", [1, 2, 5, 8, 16])
@pytest.mark.parametrize("margin", [0.0, 0.01, 0.2])
def test_random_groups_agree_with_plain_python(group_size, margin):
    draw = random.Random(f"{group_size} {margin}")
    accuracy, likelihood = [], []
    for _ in range(200):
        binary = draw.random() < 0.5
        accuracy.append(
            [
                float(draw.random() < 0.5) if binary else draw.uniform(0, 0.6)
                for _ in range(group_size)
            ]
        )
        likelihood.append(
            [NAN if draw.random() < 0.15 else draw.uniform(0.3, 1) for _ in range(group_size)]
        )
    options = {"bonus_coefficient": 0.3, "consistency_margin": margin, "likelihood_clip": 0.8}
    bonus = consistency_bonus(
        torch.tensor(accuracy, dtype=torch.float64),
        torch.tensor(likelihood, dtype=torch.float64),
        **options,
    )
    expected = [
        bonus_by_hand(a, p, coefficient=0.3, margin=margin, clip=0.8)
        for a, p in zip(accuracy, likelihood, strict=True)
    ]
    torch.testing.assert_close(bonus, torch.tensor(expected, dtype=torch.float64))
    assert (bonus > 0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("value", [0.95, 0.99, 0.1, 0.7, 1 / 3, 0.12345])
def test_equal_likelihoods_all_get_the_bonus(dtype, value):
    for group_size in (*range(1, 34), 100, 1000):
        accuracy = torch.full((1, group_size), 1.0, dtype=dtype)
        likelihood = torch.full((1, group_size), value, dtype=dtype)
        assert (consistency_bonus(accuracy, likelihood) == 0.5).all()


@pytest.mark.parametrize("group_size", [3, 6, 7, 8, 13])
@pytest.mark.parametrize("value", [0.3, 0.7, 1 / 3])
def test_equal_accuracies_are_all_accurate(group_size, value):
    bonus = bonus_of([value] * group_size, [0.5] * group_size)
    assert bonus == pytest.approx([0.5 * value] * group_size)


def test_likelihoods_above_the_clip_are_equal():
    assert bonus_of([1, 1, 1], [0.95, 0.97, 1.0]) == [0.5, 0.5, 0.5]
    assert bonus_of([1, 1, 1], [0.95, 0.97, 1.0], likelihood_clip=1.0) == [0, 0, 0.5]
    assert bonus_of([1, 1], [0.94, 1.0]) == [0, 0.5]


def test_clipping_beforehand_changes_nothing():
    torch.manual_seed(0)
    accuracy = (torch.rand(100, 8) < 0.5).float()
    likelihood = 0.8 + 0.2 * torch.rand(100, 8)
    expected = consistency_bonus(accuracy, likelihood)
    assert torch.equal(consistency_bonus(accuracy, likelihood.clamp(max=0.95)), expected)


def test_the_margin_lets_in_those_just_below_the_mean():
    accuracy, likelihood = [1, 1], [0.82, 0.80]
    assert bonus_of(accuracy, likelihood) == [0.5, 0]
    assert bonus_of(accuracy, likelihood, consistency_margin=0.005) == [0.5, 0]
    assert bonus_of(accuracy, likelihood, consistency_margin=0.02) == [0.5, 0.5]
    # Exactly at the mean minus the margin.
    assert bonus_of(accuracy, likelihood, consistency_margin=0.01) == [0.5, 0.5]


def test_low_and_below_average_accuracies_get_nothing():
    # 0.1 itself isn't above the threshold, in float32 either.
    assert bonus_of([0.1] * 4, [0.9] * 4) == [0] * 4
    assert bonus_of([0.1] * 4, [0.9] * 4, accuracy_threshold=0.05) == pytest.approx([0.05] * 4)
    assert bonus_of([0.0] * 4, [0.9] * 4) == [0] * 4
    assert bonus_of([0.2, 0.2, 1.0, 0.6], [0.9] * 4) == pytest.approx([0, 0, 0.5, 0.3])


def test_likelihoods_of_the_inaccurate_take_no_part_in_the_mean():
    low = bonus_of([1, 1, 0, 0], [0.5, 0.6, 0.01, 0.01])
    high = bonus_of([1, 1, 0, 0], [0.5, 0.6, 0.94, 0.94])
    assert low == high == [0, 0.5, 0, 0]


def test_a_completion_without_an_answer_takes_no_part_in_the_mean():
    assert bonus_of([1, 1, 1], [NAN, 0.5, 0.6]) == [0, 0, 0.5]
    assert bonus_of([1, 1, 1], [NAN, NAN, 0.2]) == [0, 0, 0.5]
    assert bonus_of([1, 1], [NAN, NAN]) == [0, 0]
    # Its accuracy still counts towards the group's mean accuracy.
    assert bonus_of([1, 0.4], [NAN, 0.9]) == [0, 0]


def test_groups_do_not_touch_each_other():
    accuracy = torch.tensor([[1.0, 1, 0], [0, 0, 0], [1, 0.5, 0]])
    likelihood = torch.tensor([[0.2, 0.4, 0.9], [0.9, 0.9, 0.9], [NAN, 0.1, 0.1]])
    together = consistency_bonus(accuracy, likelihood)
    alone = [consistency_bonus(accuracy[i : i + 1], likelihood[i : i + 1]) for i in range(3)]
    assert torch.equal(together, torch.cat(alone))
    assert together.tolist() == [[0, 0.5, 0], [0, 0, 0], [0, 0.25, 0]]


def test_the_bonus_keeps_the_type_of_the_accuracy():
    likelihood = torch.full((1, 2), 0.5)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert consistency_bonus(torch.ones(1, 2, dtype=dtype), likelihood).dtype == dtype
    whole = consistency_bonus(torch.ones(1, 2, dtype=torch.int64), likelihood)
    assert whole.tolist() == [[0.5, 0.5]]


def test_the_inputs_stay_as_they_are():
    accuracy, likelihood = torch.ones(1, 3), torch.tensor([[0.99, NAN, 0.2]])
    consistency_bonus(accuracy, likelihood)
    assert accuracy.tolist() == [[1, 1, 1]]
    assert torch.equal(likelihood.isnan(), torch.tensor([[False, True, False]]))
    assert likelihood[0, 0] == torch.tensor(0.99)


@pytest.mark.parametrize("shapes", [((2, 3), (3, 2)), ((3,), (3,)), ((2, 3), (2, 1))])
def test_shapes_that_do_not_fit_are_refused(shapes):
    with pytest.raises(ValueError, match=r"\[B, G\]"):
        consistency_bonus(torch.ones(shapes[0]), torch.ones(shapes[1]))
    with pytest.raises(ValueError, match=r"\[N, C\]"):
        answer_likelihood(torch.ones(shapes[0]), torch.ones(shapes[1], dtype=torch.bool))


def test_answer_likelihood_is_the_geometric_mean_over_the_answer():
    probabilities = torch.tensor([[0.9, 0.5, 0.125, 0.3], [0.2, 0.4, 0.6, 0.8]])
    mask = torch.tensor([[False, True, True, False], [False, False, False, True]])
    p = answer_likelihood(probabilities.log(), mask)
    torch.testing.assert_close(p, torch.tensor([0.25, 0.8]))


def test_answer_likelihood_is_nan_without_an_answer_and_reads_nothing_outside():
    log_probs = torch.tensor([[NAN, -0.5, -math.inf], [NAN, NAN, NAN]])
    mask = torch.tensor([[False, True, False], [False, False, False]])
    p = answer_likelihood(log_probs, mask)
    assert p[0].item() == pytest.approx(math.exp(-0.5))
    assert p[1].isnan()


def test_answer_likelihood_is_not_clipped_and_is_float32():
    log_probs = torch.zeros(1, 2, dtype=torch.bfloat16)
    p = answer_likelihood(log_probs, torch.ones(1, 2, dtype=torch.bool))
    assert p.dtype == torch.float32
    assert p.tolist() == [1.0]


def test_the_dense_bonus_is_the_clipped_likelihood_of_every_answer():
    likelihood = torch.tensor([[0.2, 0.99, NAN, 0.95], [NAN, NAN, NAN, 1.0]])
    expected = torch.tensor([[0.1, 0.475, 0, 0.475], [0, 0, 0, 0.475]])
    torch.testing.assert_close(dense_bonus(likelihood), expected)
    unclipped = dense_bonus(likelihood, bonus_coefficient=2.0, likelihood_clip=1.0)
    expected = torch.tensor([[0.4, 1.98, 0, 1.9], [0, 0, 0, 2.0]])
    torch.testing.assert_close(unclipped, expected)
    assert likelihood[0, 2].isnan()
    assert dense_bonus(likelihood.bfloat16()).dtype == torch.bfloat16


def test_the_accurate_bonus_asks_for_an_answer_and_not_how_likely_it_is():
    accuracy = torch.tensor([[1.0, 1, 1, 0], [0.1, 0.1, 0.1, 0.1], [0.2, 0.6, 1, 0.4]])
    likelihood = torch.tensor([[0.01, 0.99, NAN, 0.9], [0.9] * 4, [0.9, 0.1, 0.2, 0.9]])
    # Means of accuracy 0.75, 0.1 (not above the threshold) and 0.55.
    expected = torch.tensor([[0.5, 0.5, 0, 0], [0, 0, 0, 0], [0, 0.3, 0.5, 0]])
    torch.testing.assert_close(accurate_bonus(accuracy, likelihood), expected)
    options = {"bonus_coefficient": 0.1, "accuracy_threshold": 0.05}
    expected = torch.tensor([[0.1, 0.1, 0, 0], [0.01] * 4, [0, 0.06, 0.1, 0]])
    torch.testing.assert_close(accurate_bonus(accuracy, likelihood, **options), expected)
    whole = accurate_bonus(torch.ones(1, 2, dtype=torch.int64), torch.tensor([[0.5, NAN]]))
    assert whole.tolist() == [[0.5, 0]]
    with pytest.raises(ValueError, match=r"\[B, G\]"):
        accurate_bonus(torch.ones(3), torch.ones(3))


def counterfactual_by_hand(table, coefficient=0.5, floor=-5.0) -> list[float]:
    """The leave-one-out counterfactual bonus of one group, in plain Python."""
    size = len(table)

    def log_of(p):
        return max(math.log(p), floor) if p > 0 else floor

    bonuses = []
    for i in range(size):
        others = [log_of(table[i][j]) for j in range(size) if j != i and table[i][j] == table[i][j]]
        if math.isnan(table[i][i]) or not others:
            bonuses.append(0.0)
        else:
            difference = log_of(table[i][i]) - statistics.mean(others)
            bonuses.append(coefficient * min(max(difference, -1.0), 1.0))
    return bonuses


@pytest.mark.parametrize("group_size", [1, 2, 5, 8])
def test_counterfactual_bonus_of_random_groups_agrees_with_plain_python(group_size):
    draw = random.Random(group_size)
    tables = []
    for _ in range(50):
        answered = [draw.random() < 0.8 for _ in range(group_size)]
        tables.append(
            [
                [
                    draw.choice([0.0, 1e-30, draw.random(), 1.0]) if a and b else NAN
                    for b in answered
                ]
                for a in answered
            ]
        )
    expected = torch.tensor([counterfactual_by_hand(table, 0.7, -4.0) for table in tables])
    found = counterfactual_bonus(torch.tensor(tables), bonus_coefficient=0.7, floor=-4.0)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_an_answer_that_is_as_likely_behind_any_reasoning_gets_no_counterfactual_bonus():
    # Likely whatever was thought; follows from its own reasoning; contradicts its own reasoning.
    table = torch.tensor([[0.9, 0.9, 0.9], [0.01, 0.9, 0.01], [0.9, 0.9, 0.3]])
    bonus = counterfactual_bonus(table[None])[0].tolist()
    assert bonus == pytest.approx([0.0, 0.5, -0.5])


def test_counterfactual_bonus_wants_a_square_per_group():
    with pytest.raises(ValueError, match=r"\[B, G, G\], not \(2, 3, 4\)"):
        counterfactual_bonus(torch.rand(2, 3, 4))


def test_the_bonus_selects_where_equally_accurate_completions_get_different_bonuses():
    accuracy = torch.tensor(
        [[1, 1, 0], [1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 0, 0], [1.0, 0.8, 0.1]]
    )
    likelihood = torch.full_like(accuracy, 0.5)
    likelihood[3, :2] = NAN
    bonus = torch.tensor(
        [[0.5, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0], [0, 0, 0.5], [0.1, 0, 0], [0.5, 0.4, 0]]
    )
    has_choice, chooses = selection(accuracy, likelihood, bonus)
    # The last: of unequal accuracy, so the bonus follows the accuracy.
    assert has_choice.tolist() == [True, True, False, False, False, True]
    assert chooses.tolist() == [True, False, False, False, False, False]
