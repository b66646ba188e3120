"""Replicas that share experts run the same number of passes, whatever each of them has to do."""

import pytest
import torch
from layouts import EXPERT_LAYOUTS
from made_groups import make_groups, make_prompts
from small_runs import small_recipe, small_trainer
from tiny_qwen3_vl import EXPERTS, write_tiny_qwen3

from nemo_care.models.pipeline import forward_backward
from nemo_care.ranks.process_groups import Layout
from nemo_care.rollouts.generator import Sampling
from nemo_care.scoring.scorer import Scorer


@pytest.fixture(scope="module")
def job(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("in_step")
    checkpoint = write_tiny_qwen3(folder / "checkpoint", EXPERTS)
    prompts = make_prompts(checkpoint, world, folder)
    return folder, checkpoint, world, prompts, make_groups(prompts, checkpoint)


def worked(ranks, job):
    """Tokens and likelihoods of all prompts, of which the second replica has none, and the norm of
    the gradient of all groups."""
    folder, checkpoint, world, prompts, groups = job
    trainer = small_trainer(small_recipe(checkpoint, world), ranks, folder / "run")
    mine = slice(None) if ranks.data_rank == 0 else slice(0)
    sampling = Sampling(group_size=2, temperature=1.0, top_p=0.95, max_tokens=16, seed=(7,))
    made = trainer.generator.generate(prompts[mine], sampling)
    policy = trainer.policy
    likelihoods = Scorer(policy.model, ranks, policy.layout).answer_likelihoods(groups[mine])
    if ranks.data_size > 1:
        # All groups but one against one: idle micro-batches add nothing to the gradient.
        groups = groups[1:] if ranks.data_rank == 0 else groups[:1]
    batches = policy.layout.batches(groups)
    policy.wrapped.train()
    policy.clear_gradients()
    shares = forward_backward(
        policy.wrapped,
        batches,
        lambda batch: batch.rows.inputs(policy.model),
        lambda hidden, batch: (
            batch.log_probs(policy.model, hidden, batch.mask).sum() * ranks.data_size,
            len(batch.groups),
        ),
    )
    assert shares == [1] * len(batches)
    norm = policy.gradient_norm()
    tokens = [[c.token_ids.tolist() for c in group.completions] for group in made]
    return tokens, likelihoods, norm


def test_a_replica_without_work_lends_its_experts(on_ranks, job):
    layout, replicas = EXPERT_LAYOUTS["ep2"]
    first, second = on_ranks(layout, worked, job, replicas=replicas)
    (alone,) = on_ranks(Layout(), worked, job)
    assert first[0] == alone[0]
    torch.testing.assert_close(first[1], alone[1], atol=1e-5, rtol=1e-4, equal_nan=True)
    assert (second[0], second[1]) == ([], [])
    assert first[2] == second[2] == pytest.approx(alone[2], rel=1e-4)
