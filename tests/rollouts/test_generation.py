"""Sampling in the training shards: one prompt cache per group, and no work for what has ended."""

import pytest
import torch
from made_groups import make_prompts
from small_runs import small_recipe, small_trainer

from nemo_care.models.decoding_cache import DecodingCache
from nemo_care.rollouts import decoding
from nemo_care.rollouts.generator import Sampling
from nemo_care.rollouts.megatron import MegatronGenerator

pytestmark = pytest.mark.numeric

SAMPLING = Sampling(group_size=4, temperature=1.0, top_p=0.95, max_tokens=24, seed=(5,))


@pytest.fixture(scope="module")
def trainer(checkpoint, world, ranks, tmp_path_factory):
    return small_trainer(small_recipe(checkpoint, world), ranks, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def prompts(checkpoint, world, tmp_path_factory):
    return make_prompts(checkpoint, world, tmp_path_factory.mktemp("images"))


def generator(trainer, **options) -> MegatronGenerator:
    tokenizer = trainer.generator.tokenizer
    return MegatronGenerator(trainer.policy.model, tokenizer, trainer.ranks, **options)


def tokens(groups) -> list[list[list[int]]]:
    return [[c.token_ids.tolist() for c in group.completions] for group in groups]


def test_completions_do_not_depend_on_what_is_generated_together(trainer, prompts):
    """Prompts of unequal length: alone, together, and each copied for its completions."""
    alone = generator(trainer, groups_per_batch=1).generate(prompts, SAMPLING)
    together = generator(trainer, groups_per_batch=4).generate(prompts, SAMPLING)
    copied = generator(trainer, groups_per_batch=2, shared_prompt=False).generate(prompts, SAMPLING)
    assert tokens(alone) == tokens(together) == tokens(copied)
    for one, other in zip(alone, together, strict=True):
        for mine, wanted in zip(one.completions, other.completions, strict=True):
            torch.testing.assert_close(mine.log_probs, wanted.log_probs, atol=1e-4, rtol=1e-4)


def test_log_probs_are_those_of_a_forward_pass_over_the_whole_sequence(trainer, prompts):
    groups = generator(trainer, groups_per_batch=4).generate(prompts, SAMPLING)
    tables = trainer.reference.scorer.score(
        groups,
        lambda batch, log_probs: [
            torch.stack([torch.stack([row.sum() for row in rows])])
            for rows in batch.unpadded(log_probs)
        ],
        rows=1,
        all_tokens=True,
    )
    for group, table in zip(groups, tables, strict=True):
        sums = torch.stack([c.log_probs.sum() for c in group.completions])
        torch.testing.assert_close(sums, table[0], atol=1e-3, rtol=1e-4)


def test_each_prompt_is_computed_once_and_ended_completions_not_at_all(
    trainer, prompts, monkeypatch
):
    model = trainer.policy.model
    computed = []
    forward = model.forward
    monkeypatch.setattr(
        model,
        "forward",
        lambda inputs: computed.append(inputs.token_ids.shape[1]) or forward(inputs),
    )
    groups = generator(trainer, groups_per_batch=4).generate(prompts, SAMPLING)
    lengths = [c.length for group in groups for c in group.completions]
    assert len(set(lengths)) > 2
    assert computed[0] == sum(prompt.length for prompt in prompts)
    # The token that ends a completion, or is its last, is never put into the model.
    assert computed[1:] == [
        sum(length > step for length in lengths) for step in range(1, max(lengths))
    ]


def test_prompts_are_cached_once_per_group(trainer, prompts, monkeypatch):
    caches = []
    cache = decoding.DecodingCache
    monkeypatch.setattr(
        decoding,
        "DecodingCache",
        lambda *args, **options: caches.append(cache(*args, **options)) or caches[-1],
    )
    config = trainer.policy.model.config
    sampling = Sampling(group_size=4, temperature=1.0, top_p=1.0, max_tokens=2, seed=(5,))
    generator(trainer, groups_per_batch=4).generate(prompts, sampling)
    (made,) = caches
    longest = max(prompt.length for prompt in prompts)
    assert len(made._prompt) == config.num_layers
    for keys, values in made._prompt.values():
        assert keys.shape == values.shape
        assert keys.shape[:3] == (len(prompts), config.num_query_groups, longest)


def test_scores_of_large_bf16_keys_are_not_rounded(ranks):
    """Qwen2.5's key biases make large scores: rounded to bf16 they would move the weights."""
    generator = torch.Generator().manual_seed(0)
    length, heads, key_heads, width = 20, 4, 2, 16
    cache = DecodingCache([length], group_size=3, max_tokens=2)
    shapes = [(length, 1, key_heads, width)] * 2 + [(3, 1, heads, width)]
    shapes += [(3, 1, key_heads, width)] * 2
    prompt_k, prompt_v, q, k, v = (
        torch.randn(shape, generator=generator).bfloat16() for shape in shapes
    )
    prompt_k, k, q = prompt_k + 12, k + 12, q + 4
    cache.store_prompts(1, cache.passes()[0], prompt_k, prompt_v)
    ours = cache.attend(1, q, k, v, None).float()
    wanted = []
    for row in range(3):
        keys, values = (
            torch.cat([p[:, 0], own[row]]).float().repeat_interleave(2, dim=1)
            for p, own in ((prompt_k, k), (prompt_v, v))
        )
        scores = torch.einsum("hd,khd->hk", q[row, 0].float(), keys) * width**-0.5
        assert scores.max() > 128
        wanted.append(torch.einsum("hk,khd->hd", scores.softmax(-1), values).flatten())
    torch.testing.assert_close(ours[:, 0], torch.stack(wanted), atol=2e-2, rtol=2e-2)
