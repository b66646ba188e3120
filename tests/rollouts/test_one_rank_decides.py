"""One rank of a replica decides for all: on GPUs, the results of equal sums can differ a little."""

import pytest
import torch
from layouts import held_by_leader
from made_groups import make_groups, make_prompts
from small_runs import small_recipe, small_trainer

from nemo_care.ranks.process_groups import Layout, Ranks
from nemo_care.rollouts import decoding
from nemo_care.rollouts.generator import Sampling
from nemo_care.rollouts.megatron import MegatronGenerator
from nemo_care.scoring import scorer

pytestmark = pytest.mark.numeric


def decided(ranks: Ranks, job: dict) -> list[dict]:
    """Tokens and likelihoods on a rank; the second time, all ranks but one compute others."""
    recipe = small_recipe(job["checkpoint"], job["world"])
    trainer = small_trainer(recipe, ranks, job["folder"])
    groups = held_by_leader(job["groups"], ranks)
    sample, likelihood = decoding.sample_tokens, scorer.answer_likelihood
    results = []
    for disturbed in (False, True):
        if disturbed and not ranks.is_loss_leader:
            decoding.sample_tokens = lambda *given: sample(*given) + 1
            scorer.answer_likelihood = lambda *given: likelihood(*given) * 0.5
        result = {"likelihoods": trainer.reference.answer_likelihoods(groups)}
        for cuda_graphs in (False, True):
            generator = MegatronGenerator(
                trainer.policy.model, trainer.generator.tokenizer, ranks,
                groups_per_batch=1, cuda_graphs=cuda_graphs,
            )  # fmt: skip
            made = generator.generate([g.prompt for g in groups], Sampling(2, 1.0, 1.0, 4, (7,)))
            result[cuda_graphs] = [c.token_ids.tolist() for g in made for c in g.completions]
        results.append(result)
    return results


def test_tensor_parallel_ranks_go_by_the_results_of_one_of_them(
    on_ranks, checkpoint, world, tmp_path
):
    groups = make_groups(make_prompts(checkpoint, world, tmp_path)[-1:], checkpoint)
    job = {"checkpoint": checkpoint, "world": world, "folder": tmp_path / "run", "groups": groups}
    for wanted, found in on_ranks(Layout(tensor=2), decided, job):
        assert found[False] == found[True] == wanted[False]
        for ours, likelihood in zip(found["likelihoods"], wanted["likelihoods"], strict=True):
            assert torch.equal(ours.nan_to_num(-1), likelihood.nan_to_num(-1))
