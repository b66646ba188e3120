"""vLLM against the generator in the training shards, on the same weights."""

import dataclasses
import time

import pytest
import torch

from nemo_care.errors import InputError
from nemo_care.rollouts.generator import Sampling
from nemo_care.rollouts.vllm.requests import RequestBuilder

pytestmark = pytest.mark.vllm

GREEDY = Sampling(group_size=2, temperature=0.0, top_p=1.0, max_tokens=24, seed=(5,))
SAMPLED = Sampling(group_size=4, temperature=1.0, top_p=0.95, max_tokens=24, seed=(5,))


def tokens(groups):
    return [[c.token_ids.tolist() for c in group.completions] for group in groups]


def largest_difference(ours, theirs):
    return max(
        float((a.log_probs - b.log_probs).abs().max())
        for mine, other in zip(ours, theirs, strict=True)
        for a, b in zip(mine.completions, other.completions, strict=True)
    )


def test_greedy_tokens_equal_those_of_the_training_shards(trainer, megatron, prompts):
    ours, theirs = megatron.generate(prompts, GREEDY), trainer.generator.generate(prompts, GREEDY)
    assert tokens(theirs) == tokens(ours)
    difference = largest_difference(ours, theirs)
    print(f"largest difference of log-probabilities: {difference:.2e}")
    assert difference < 1e-4
    for mine, other in zip(ours, theirs, strict=True):
        for a, b in zip(mine.completions, other.completions, strict=True):
            assert (a.text, a.ended, a.answer_span) == (b.text, b.ended, b.answer_span)
            assert b.log_probs.dtype == torch.float32


def test_samples_repeat_with_their_seed_and_differ_with_another(trainer, prompts):
    first = tokens(trainer.generator.generate(prompts, SAMPLED))
    assert tokens(trainer.generator.generate(prompts, SAMPLED)) == first
    other = dataclasses.replace(SAMPLED, seed=(6,))
    assert tokens(trainer.generator.generate(prompts, other)) != first
    assert any(len({*map(tuple, group)}) > 1 for group in first)


def test_after_real_updates_both_sides_have_moved_alike(trainer, megatron, prompts):
    """The same prompts as before: prefixes and vision features of old weights would show."""
    from small_runs import one_step

    before = tokens(trainer.generator.generate(prompts, GREEDY))
    for number in range(1, 4):
        metrics = one_step(trainer, number).metrics
        print({k: v for k, v in metrics.items() if k.startswith("rollout/logprob")})
        assert metrics["rollout/logprob_difference"] < 1e-4
        assert metrics["rollout/logprob_difference_max"] < 1e-3
    ours, theirs = megatron.generate(prompts, GREEDY), trainer.generator.generate(prompts, GREEDY)
    assert tokens(theirs) == tokens(ours)
    assert tokens(theirs) != before
    difference = largest_difference(ours, theirs)
    print(f"largest difference of log-probabilities: {difference:.2e}")
    assert difference < 1e-4


def test_a_prompt_that_vllm_sees_otherwise_is_named(trainer, prompts, monkeypatch):
    build = RequestBuilder.build

    def without_two_frames(self, prompt, sampling):
        request = build(self, prompt, sampling)
        videos = [dataclasses.replace(v, frames=v.frames[:-2]) for v in request.videos]
        return dataclasses.replace(request, videos=videos)

    monkeypatch.setattr(RequestBuilder, "build", without_two_frames)
    name = prompts[0].sample.sample_id
    with pytest.raises(
        InputError, match=rf"sample {name}: vLLM's prompt has \d+ tokens and training"
    ):
        trainer.generator.generate(prompts[:1], GREEDY)


def test_generation_goes_on_while_the_trainer_computes(trainer, prompts):
    begun = trainer.generator.submit(prompts, SAMPLED)
    started = time.perf_counter()
    assert not all(part.answer.done() for part in begun.parts)
    asked = time.perf_counter() - started
    assert asked < 0.1
    assert tokens(trainer.generator.collect(begun)) == tokens(
        trainer.generator.generate(prompts, SAMPLED)
    )
