"""One trainer whose rollouts come from a real vLLM, for all tests of this folder."""

import pytest


@pytest.fixture(scope="session")
def trainer(checkpoint, world, ranks, tmp_path_factory):
    from small_runs import small_trainer
    from vllm_runs import vllm_recipe

    made = small_trainer(vllm_recipe(checkpoint, world), ranks, tmp_path_factory.mktemp("run"))
    yield made
    made.generator.close()


@pytest.fixture(scope="session")
def megatron(trainer):
    from nemo_care.rollouts.megatron import MegatronGenerator

    return MegatronGenerator(
        trainer.policy.model, trainer.generator.tokenizer, trainer.ranks, groups_per_batch=4
    )


@pytest.fixture(scope="session")
def prompts(checkpoint, world, tmp_path_factory):
    """A video, two videos, an image behind a video, text only."""
    from made_groups import make_prompts

    return make_prompts(checkpoint, world, tmp_path_factory.mktemp("images"))
