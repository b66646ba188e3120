"""Every objective in every kind of layout: loss and gradients equal plain Hugging Face and torch.

The oracle takes the log-probabilities of separate sequences from golden.py, writes each paper's
objective out with loops, and lets autograd differentiate it.
"""

import dataclasses
from functools import cache

import pytest
import torch
from golden import hf_model, log_probs, parameters_on_disk
from layouts import LAYOUTS, gather_gradients, reduce_whole_gradients, share_of
from made_groups import make_groups, make_prompts
from small_runs import one_step, small_recipe, small_trainer

from nemo_care.objective.advantages import ADVANTAGES
from nemo_care.objective.losses import LOSSES
from nemo_care.objective.rewards import length_penalty
from nemo_care.ranks.process_groups import Ranks
from nemo_care.recipe.compose import compose_recipe, recipe_changes
from nemo_care.recipe.schema import check_recipe
from nemo_care.scoring.credit import Credit

pytestmark = pytest.mark.numeric

NAMES = ["tp2_sequence_parallel", "pp2", "dp2", pytest.param("tp1", marks=pytest.mark.slow)]
CASES = [
    ("grpo", "grpo", "grpo", "keep", 0.2, True),
    ("grpo, masked", "grpo", "rloo", "mask", 0.2, False),
    ("token_mean", "token_mean", "grpo", "keep", 0.2, True),
    ("token_mean, masked", "token_mean", "grpo", "mask", 0.2, True),
    ("dr_grpo", "dr_grpo", "dr_grpo", "keep", 0.2, False),
    ("gspo", "gspo", "rloo", "keep", 0.03, True),
    ("cispo", "cispo", "grpo", "mask", 0.2, True),
]
KEYS = ("name", "loss", "advantage", "truncated", "clip", "several")


def advantages_by_hand(rewards: list[float], kind: str) -> list[float]:
    mean = sum(rewards) / len(rewards)
    if kind == "rloo":
        return [r - (sum(rewards) - r) / (len(rewards) - 1) for r in rewards]
    deviation = (sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1)) ** 0.5
    return [(r - mean) / (deviation + 1e-4 if kind == "grpo" else 1.0) for r in rewards]


def objective(case, groups, policy, old, longest):
    """The loss of all groups; `policy` and `old` hold log-probabilities, a vector a completion."""
    per_completion, lengths = [], []
    for group, new_of_group, old_of_group in zip(groups, policy, old, strict=True):
        advantages = advantages_by_hand(group.base_reward.tolist(), case["advantage"])
        members = zip(group.completions, advantages, new_of_group, old_of_group, strict=True)
        for completion, advantage, new, before in members:
            if case["truncated"] == "mask" and not completion.ended:
                continue
            log_ratio = new - (before if case["several"] else new.detach())
            if case["loss"] == "gspo":
                log_ratio = log_ratio.mean().expand(len(new))
            ratio = log_ratio.exp()
            bounded = ratio.clamp(1 - case["clip"], 1 + case["clip"])
            if case["loss"] == "cispo":
                tokens = bounded.detach() * advantage * new
            else:
                tokens = torch.minimum(ratio * advantage, bounded * advantage)
            per_completion.append(tokens.sum())
            lengths.append(len(new))
    if case["loss"] in ("grpo", "gspo"):
        means = [total / length for total, length in zip(per_completion, lengths, strict=True)]
        return -sum(means) / len(means)
    divisors = {"dr_grpo": longest * len(lengths)}
    return -sum(per_completion) / divisors.get(case["loss"], sum(lengths))


def computed(ranks: Ranks, job: dict) -> dict:
    """Loss and gradients of every case, all with the same weights: nothing steps."""
    recipe = small_recipe(job["checkpoint"], job["world"])
    recipe.algorithm.consistency.bonus_coefficient = 0.0
    policy = small_trainer(recipe, ranks, job["folder"]).policy
    reduce_whole_gradients(policy.wrapped.config)
    groups = share_of(job["groups"], ranks)
    old = share_of(job["old_log_probs"], ranks)
    results = {}
    for case in job["cases"]:
        policy.algorithm = dataclasses.replace(
            recipe.algorithm, clip_low=case["clip"], clip_high=case["clip"]
        )
        policy.loss = LOSSES[case["loss"]]
        policy.masks_truncated = case["truncated"] == "mask"
        Credit(
            dataclasses.replace(recipe.algorithm, advantage=case["advantage"]),
            masks_truncated=policy.masks_truncated,
        )(groups)
        batches = policy.layout.batches(groups)
        vectors = [batch.padded([old[groups.index(g)] for g in batch.groups]) for batch in batches]
        count = policy.loss_count(batches)
        found = policy.forward_backward(batches, count, vectors if case["several"] else ())
        results[case["name"]] = {
            "loss": policy.metrics.reduce(found, count)["train/loss"],
            "gradients": gather_gradients(policy.model),
        }
    return results


@pytest.fixture(scope="module")
def job(checkpoint, world, tmp_path_factory):
    """What the ranks need, and what plain torch finds for each case."""
    folder = tmp_path_factory.mktemp("objectives")
    groups = make_groups(make_prompts(checkpoint, world, folder), checkpoint)
    cases = [dict(zip(KEYS, case, strict=True)) for case in CASES]
    model = hf_model(checkpoint)
    policy = [[log_probs(model, g.prompt, c) for c in g.completions] for g in groups]
    draw = torch.Generator().manual_seed(5)
    old = [
        [v.detach() + 0.8 * torch.rand(len(v), generator=draw) - 0.4 for v in vectors]
        for vectors in policy
    ]
    wanted = {}
    longest = small_recipe(checkpoint, world).rollout.max_completion_tokens
    parameters = parameters_on_disk(model)
    for case in cases:
        loss = objective(case, groups, policy, old, longest)
        gradients = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True)
        wanted[case["name"]] = {
            "loss": loss.item(),
            "gradients": dict(zip(parameters, gradients, strict=True)),
        }
    contents = {"folder": folder, "checkpoint": checkpoint, "world": world, "groups": groups}
    return contents | {"old_log_probs": old, "cases": cases}, wanted


@pytest.fixture(scope="module", params=NAMES)
def found(on_ranks, request, job):
    layout, replicas = LAYOUTS[request.param]
    folder = job[0]["folder"] / request.param
    return on_ranks(layout, computed, job[0] | {"folder": folder}, replicas=replicas)[0]


def test_every_objective_equals_plain_torch(found, job):
    assert {case[1] for case in CASES} == set(LOSSES)
    assert {case[2] for case in CASES} == set(ADVANTAGES)
    for name, wanted in job[1].items():
        assert found[name]["loss"] == pytest.approx(wanted["loss"], abs=1e-5), name
        largest = max(tensor.abs().max() for tensor in wanted["gradients"].values())
        assert largest > 1e-4, name
        assert set(found[name]["gradients"]) == set(wanted["gradients"])
        for parameter, gradient in wanted["gradients"].items():
            difference = (found[name]["gradients"][parameter] - gradient).abs().max()
            # Rounding; 1.02e-5 with AVX2's instructions.
            assert difference <= 3e-5 * max(1, largest), (name, parameter)


def test_the_objectives_differ(job):
    """The comparison means something only if each case has a gradient of its own."""
    flat = [torch.cat([g.flatten() for g in w["gradients"].values()]) for w in job[1].values()]
    for number, first in enumerate(flat):
        for second in flat[number + 1 :]:
            cosine = torch.nn.functional.cosine_similarity(first, second, dim=0)
            scale = first.norm() / second.norm()
            assert cosine < 0.9999 or abs(scale - 1) > 1e-3


@pytest.mark.parametrize(
    ("tokens", "penalty"), [(0, 0), (80, 0), (85, -0.25), (90, -0.5), (100, -1), (120, -1)]
)
def test_the_length_penalty_falls_in_a_straight_line(tokens, penalty):
    assert length_penalty(tokens, longest=100, buffer=20) == pytest.approx(penalty)


def run_step(checkpoint, world, ranks, folder, **rollout):
    recipe = small_recipe(checkpoint, world)
    for key, value in rollout.items():
        setattr(recipe.rollout, key, value)
    trainer = small_trainer(recipe, ranks, folder)
    step = one_step(trainer)
    return step.metrics, step.groups


def test_penalised_completions_lose_reward_and_masked_ones_do_not_train(
    checkpoint, world, ranks, tmp_path
):
    short = {"max_completion_tokens": 14}
    _, kept = run_step(checkpoint, world, ranks, tmp_path / "keep", **short)
    _, penalised = run_step(
        checkpoint, world, ranks, tmp_path / "penalise", truncated="penalise", **short
    )
    masked_metrics, masked = run_step(
        checkpoint, world, ranks, tmp_path / "mask", truncated="mask", **short
    )
    ended = [c.ended for group in kept for c in group.completions]
    assert 0 < sum(ended) < len(ended)
    loss, count = 0.0, 0
    for plain, less, without in zip(kept, penalised, masked, strict=True):
        lengths = torch.tensor([float(c.length) for c in plain.completions])
        penalties = -((lengths - 11.2) / 2.8).clamp(0, 1)
        torch.testing.assert_close(less.rewards["length_penalty"], penalties)
        torch.testing.assert_close(less.base_reward, plain.base_reward + penalties)
        assert "length_penalty" not in plain.rewards
        assert torch.equal(without.base_reward, plain.base_reward)
        for advantage, own, completion in zip(
            plain.advantage, without.advantage, plain.completions, strict=True
        ):
            assert own == (advantage if completion.ended else 0)
            if completion.ended:
                loss, count = loss - float(advantage), count + 1
    assert masked_metrics["train/loss"] == pytest.approx(loss / count, abs=1e-6)


def test_a_step_whose_completions_were_all_cut_off_trains_on_nothing(
    checkpoint, world, ranks, tmp_path
):
    metrics, groups = run_step(
        checkpoint, world, ranks, tmp_path, truncated="mask", max_completion_tokens=3
    )
    assert not any(c.ended for group in groups for c in group.completions)
    assert metrics["train/loss"] == metrics["train/grad_norm"] == 0


OBJECTIVES = {
    "dapo": [
        "algorithm.clip_high: 0.2 -> 0.28",
        "algorithm.loss: grpo -> token_mean",
        "rollout.truncated: keep -> penalise",
        "rollout.dynamic_sampling.enabled: False -> True",
    ],
    "dr_grpo": ["algorithm.advantage: grpo -> dr_grpo", "algorithm.loss: grpo -> dr_grpo"],
    "gspo": [
        "algorithm.updates_per_rollout: 1 -> 2",
        "algorithm.clip_low: 0.2 -> 0.0003",
        "algorithm.clip_high: 0.2 -> 0.0004",
        "algorithm.loss: grpo -> gspo",
    ],
    "cispo": [
        "algorithm.updates_per_rollout: 1 -> 2",
        "algorithm.clip_low: 0.2 -> 1.0",
        "algorithm.clip_high: 0.2 -> 4.0",
        "algorithm.loss: grpo -> cispo",
    ],
}


@cache
def composed(*arguments):
    """A recipe, composed once; read only."""
    return compose_recipe(["--config-name", *arguments])


def changed(base, *groups):
    new = composed(base, *groups)
    check_recipe(new)
    changes = recipe_changes(composed(base), new).items()
    return {f"{k}: {a} -> {b}" for k, (a, b) in changes if not k.startswith("exp_manager.")}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_objective_changes_any_recipe_alike_with_or_without_an_ablation(objective):
    base, group = "grpo_care_qwen2_5_vl_72b", f"+objective={objective}"
    ours, ablation = changed(base, group), changed(base, "+ablation=grpo")
    assert ours == set(OBJECTIVES[objective])
    assert composed(base, group).exp_manager.name == f"{base}_{objective}"
    # In either order: they share no key.
    assert changed(base, group, "+ablation=grpo") == ours | ablation
    assert changed(base, "+ablation=grpo", group) == ours | ablation
