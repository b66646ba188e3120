"""Truncated importance sampling: the formula, and the step that applies it."""

import math

import pytest
import torch
from made_groups import make_groups, make_prompts
from records import lines
from small_runs import small_recipe, small_trainer, updated

from nemo_care.errors import InputError
from nemo_care.objective.importance import effective_sample_share, importance_weights
from nemo_care.recipe.schema import check_recipe

N, C = 3, 5
LENGTHS = (5, 1, 3)


@pytest.fixture
def tokens():
    """Log-probabilities in training and in the rollout, and the mask."""
    generator = torch.Generator().manual_seed(0)
    training = -2 * torch.rand(N, C, generator=generator)
    rollout = training + 2 * torch.rand(N, C, generator=generator) - 1
    return training, rollout, torch.arange(C) < torch.tensor(LENGTHS).unsqueeze(-1)


@pytest.mark.parametrize("cap", [1.0, 1.5, 2.0])
def test_weights_agree_with_the_formula(tokens, cap):
    training, rollout, mask = tokens
    made = importance_weights(training, rollout, mask, cap=cap)
    for i in range(N):
        for t in range(C):
            ratio = math.exp(training[i, t].item() - rollout[i, t].item()) if mask[i, t] else 0.0
            assert made.weights[i, t].item() == pytest.approx(min(ratio, cap), rel=1e-5)
            assert made.log_ratio[i, t].exp().item() == pytest.approx(ratio, rel=1e-5)
            assert made.truncated[i, t].item() == (ratio > cap)
    # The cap bites, and not everywhere.
    assert 0 < made.truncated.sum() < mask.sum()


def test_weights_carry_no_gradient_and_are_float32(tokens):
    training, rollout, mask = tokens
    made = importance_weights(
        training.bfloat16().requires_grad_(), rollout.bfloat16(), mask, cap=2.0
    )
    assert made.weights.dtype == torch.float32
    assert not made.weights.requires_grad
    assert not made.log_ratio.requires_grad


def test_equal_models_give_weights_of_one(tokens):
    training, _, mask = tokens
    made = importance_weights(training, training.clone(), mask, cap=2.0)
    assert torch.equal(made.weights, mask.float())
    assert not made.truncated.any()


def test_a_token_that_the_sampler_found_impossible_weighs_the_cap(tokens):
    training, rollout, mask = tokens
    rollout[0, 0] = -1000.0
    rollout[~mask] = math.nan
    made = importance_weights(training, rollout, mask, cap=2.0)
    assert made.weights[0, 0] == 2.0
    assert made.weights.isfinite().all()


@pytest.mark.parametrize(
    ("weights", "share"),
    [([1.0] * 8, 1.0), ([3.0] * 8, 1.0), ([1.0, 0, 0, 0], 0.25), ([1, 1, 0, 0], 0.5)],
)
def test_the_effective_sample_size_of_plain_cases(weights, share):
    squares = sum(weight**2 for weight in weights)
    assert effective_sample_share(sum(weights), squares, len(weights)) == pytest.approx(share)


def test_weights_that_are_all_zero_have_no_effective_sample_size():
    assert effective_sample_share(0.0, 0.0, 4) is None


def test_the_effective_sample_size_is_that_of_a_mean_s_variance():
    """A mean of independent values with these weights varies like one of fewer equal ones."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(50, generator=generator, dtype=torch.float64).square()
    values = torch.randn(20_000, 50, generator=generator, dtype=torch.float64)
    variance = ((values * weights).sum(1) / weights.sum()).var().item()
    share = effective_sample_share(
        weights.sum().item(), weights.square().sum().item(), len(weights)
    )
    # Of n values with variance 1 it is 1/n.
    assert share == pytest.approx(1 / variance / len(weights), rel=0.05)


def test_shapes_that_do_not_fit_are_refused(tokens):
    training, rollout, mask = tokens
    with pytest.raises(ValueError, match="one shape"):
        importance_weights(training, rollout[:, :1], mask, cap=2.0)


def test_the_recipe_refuses_another_temperature_and_a_cap_below_one(checkpoint, world):
    recipe = small_recipe(checkpoint, world)
    recipe.rollout.temperature = 0.8
    check_recipe(recipe)
    recipe.rollout.importance_sampling.enabled = True
    with pytest.raises(InputError, match=r"rollout\.temperature=0\.8.*temperature=1"):
        check_recipe(recipe)
    recipe.rollout.temperature = 1.0
    check_recipe(recipe)
    recipe.rollout.importance_sampling.cap = 0.5
    with pytest.raises(InputError, match=r"importance_sampling\.cap"):
        check_recipe(recipe)


@pytest.fixture
def recipe(checkpoint, world):
    return small_recipe(checkpoint, world)


def test_where_sampler_and_trainer_agree_the_run_is_the_same(recipe, ranks, tmp_path):
    recipe.trainer.max_steps = 2
    recipe.algorithm.updates_per_rollout = 2
    recipe.algorithm.kl_coefficient = 0.04
    runs = []
    for enabled in (False, True):
        recipe.rollout.importance_sampling.enabled = enabled
        small_trainer(recipe, ranks, tmp_path / str(enabled), saves=False).fit()
        runs.append(lines(tmp_path / str(enabled) / "metrics.jsonl"))
    for plain, weighted in zip(*runs, strict=True):
        assert not any(key.startswith("rollout/importance") for key in plain)
        assert weighted["rollout/importance_mean"] == pytest.approx(1, abs=1e-5)
        assert weighted["rollout/importance_max"] == pytest.approx(1, abs=1e-4)
        assert weighted["rollout/importance_truncated"] == 0
        assert weighted["rollout/importance_ess"] == pytest.approx(1, abs=1e-6)
        assert set(weighted) - set(plain) == {
            f"rollout/importance_{name}" for name in ("mean", "max", "truncated", "ess")
        }
        for key in ("train/loss", "train/kl", "train/grad_norm", "reward/total"):
            assert weighted[key] == pytest.approx(plain[key], abs=1e-5, rel=1e-3), key


@pytest.fixture
def groups(checkpoint, world, tmp_path):
    """Given completions, with log-probabilities of a sampler that is not the trainer."""
    made = make_groups(make_prompts(checkpoint, world, tmp_path), checkpoint)
    generator = torch.Generator().manual_seed(0)
    for group in made:
        group.advantage = torch.linspace(-1, 1, group.size)
        for completion in group.completions:
            completion.log_probs = -4 * torch.rand(completion.length, generator=generator)
    return made


@pytest.mark.parametrize("size", [1, 3])
def test_a_step_weights_each_token_and_logs_how(recipe, ranks, tmp_path, groups, size):
    """The whole step against the formula, token by token, whatever the micro-batches."""
    recipe.algorithm.groups_per_micro_batch = size
    recipe.rollout.importance_sampling.enabled = True
    recipe.rollout.importance_sampling.cap = 1.25
    policy = small_trainer(recipe, ranks, tmp_path / "run").policy
    batches = policy.layout.batches(groups)
    results = policy.forward_backward(batches, policy.loss_count(batches))
    found = [result.log_probs for result in results]
    vectors = [
        vector
        for batch, log_probs in zip(batches, found, strict=True)
        for of_group in batch.unpadded(log_probs)
        for vector in of_group
    ]
    completions = [c for group in groups for c in group.completions]
    advantages = torch.cat([group.advantage for group in groups]).tolist()
    ratios, loss = [], 0.0
    for vector, completion, advantage in zip(vectors, completions, advantages, strict=True):
        of_completion = (vector - completion.log_probs).exp()
        ratios.append(of_completion)
        loss -= advantage * of_completion.clamp(max=1.25).mean().item() / len(completions)
    ratio = torch.cat(ratios)
    metrics = updated(policy, groups)
    assert metrics["train/loss"] == pytest.approx(loss, rel=1e-4)
    assert metrics["rollout/importance_mean"] == pytest.approx(
        ratio.clamp(max=1.25).mean().item(), rel=1e-5
    )
    assert metrics["rollout/importance_max"] == pytest.approx(ratio.max().item(), rel=1e-4)
    weights = ratio.clamp(max=1.25).double()
    effective = weights.sum().square() / weights.square().sum() / len(weights)
    assert metrics["rollout/importance_ess"] == pytest.approx(effective.item(), rel=1e-5)
    share = (ratio > 1.25).float().mean().item()
    assert metrics["rollout/importance_truncated"] == pytest.approx(share, rel=1e-5)
    assert 0.05 < share < 0.95


def test_later_updates_keep_the_weights_from_before_the_first(
    recipe, ranks, tmp_path, groups, monkeypatch
):
    from nemo_care.training import policy as module

    recipe.algorithm.updates_per_rollout = 2
    recipe.algorithm.groups_per_micro_batch = 4
    recipe.rollout.importance_sampling.enabled = True
    seen = []

    def observed(*arguments, **keywords):
        seen.append(importance_weights(*arguments, **keywords))
        return seen[-1]

    monkeypatch.setattr(module, "importance_weights", observed)
    policy = small_trainer(recipe, ranks, tmp_path / "run").policy
    before = next(iter(policy.model.parameters())).clone()
    updated(policy, groups)
    assert not torch.equal(before, next(iter(policy.model.parameters())))
    first, second = seen
    assert torch.equal(first.weights, second.weights)
