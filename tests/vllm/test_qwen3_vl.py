"""vLLM against the generator in the training shards, for Qwen3-VL without experts and with them.

The generator compares the tokens of each prompt with those that vLLM's model saw, times included.
"""

import pytest
from made_groups import make_prompts
from small_runs import one_step, small_trainer
from tiny_qwen3_vl import EXPERTS, rewritten, write_tiny_qwen3
from vllm_runs import vllm_recipe

from nemo_care.rollouts.generator import Sampling
from nemo_care.rollouts.megatron import MegatronGenerator

pytestmark = pytest.mark.vllm

GREEDY = Sampling(group_size=2, temperature=0.0, top_p=1.0, max_tokens=24, seed=(5,))


def tokens(groups):
    return [[c.token_ids.tolist() for c in group.completions] for group in groups]


def largest_difference(ours, theirs):
    return max(
        float((a.log_probs - b.log_probs).abs().max())
        for mine, other in zip(ours, theirs, strict=True)
        for a, b in zip(mine.completions, other.completions, strict=True)
    )


@pytest.fixture(params=["dense", "experts", "experts_as_published"])
def checkpoint(request, tmp_path):
    """Without experts; with experts as transformers 5 stores them; and as published."""
    if request.param == "dense":
        return write_tiny_qwen3(tmp_path / "tiny")
    if request.param == "experts":
        # vLLM pads this width on CPUs.
        return write_tiny_qwen3(tmp_path / "tiny", EXPERTS)
    new = write_tiny_qwen3(tmp_path / "new", EXPERTS | {"moe_intermediate_size": 96})
    return rewritten(new, tmp_path / "tiny", lambda tensor: tensor.transpose(1, 2))


def test_greedy_tokens_equal_those_of_the_training_shards_before_and_after_an_update(
    world, ranks, tmp_path, checkpoint
):
    # A video, two videos, an image after a video, text only.
    prompts = make_prompts(checkpoint, world, tmp_path)
    recipe = vllm_recipe(checkpoint, world)
    # A random model's completions say nothing, and a step of this size is seen.
    recipe.optimizer.lr = 1e-2
    trainer = small_trainer(recipe, ranks, tmp_path / "run")
    try:
        generator = trainer.generator
        megatron = MegatronGenerator(
            trainer.policy.model, generator.tokenizer, trainer.ranks, groups_per_batch=4
        )
        found = []
        for number in (1, 2):
            ours, theirs = megatron.generate(prompts, GREEDY), generator.generate(prompts, GREEDY)
            assert tokens(theirs) == tokens(ours)
            difference = largest_difference(ours, theirs)
            print(f"largest difference of log-probabilities: {difference:.2e}")
            assert difference < 1e-4
            found.append(theirs)
            if number == 1:
                metrics = one_step(trainer).metrics
                assert metrics["rollout/logprob_difference"] < 1e-4
        assert any(
            not a.log_probs.equal(b.log_probs)
            for before, after in zip(*found, strict=True)
            for a, b in zip(before.completions, after.completions, strict=True)
        )
    finally:
        trainer.generator.close()
