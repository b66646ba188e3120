"""Sampling keeps to temperature and top-p, and to its own random numbers."""

import numpy as np
import pytest
import torch

from nemo_care.rollouts.sampling import sample_tokens, uniform_numbers


def draw(logits: list[float], *, temperature=1.0, top_p=1.0, count=20000) -> np.ndarray:
    """Frequencies of the tokens over evenly spread uniform numbers."""
    uniforms = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    tokens = sample_tokens(torch.tensor(logits).expand(count, -1), uniforms, temperature, top_p)
    return np.bincount(tokens.numpy(), minlength=len(logits)) / count


def test_frequencies_are_the_probabilities():
    logits = [0.5, -1.0, 2.0, 0.0]
    wanted = torch.softmax(torch.tensor(logits), 0).numpy()
    np.testing.assert_allclose(draw(logits), wanted, atol=1e-3)


def test_temperature_divides_the_logits():
    logits = [0.5, -1.0, 2.0, 0.0]
    wanted = torch.softmax(torch.tensor(logits) / 0.5, 0).numpy()
    np.testing.assert_allclose(draw(logits, temperature=0.5), wanted, atol=1e-3)


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.3, [2]), (0.5, [2]), (0.51, [2, 0]), (0.8, [2, 0]), (0.81, [2, 0, 3]), (1.0, [2, 0, 3, 1])],
)
def test_top_p_keeps_the_fewest_most_likely_tokens_that_reach_it(top_p, kept):
    probabilities = torch.tensor([0.3, 0.05, 0.5, 0.15], dtype=torch.float64)
    frequencies = draw(probabilities.log().tolist(), top_p=top_p)
    assert set(np.flatnonzero(frequencies)) == set(kept)
    wanted = probabilities[kept] / probabilities[kept].sum()
    np.testing.assert_allclose(frequencies[kept], wanted.numpy(), atol=1e-3)


def sampled_by_sorting(
    logits: np.ndarray, uniforms: np.ndarray, temperature: float, top_p: float
) -> list[int]:
    """A token for each uniform number, with the likeliest tokens found by a sort in float64."""
    scaled = logits.astype(np.float64) / temperature
    probabilities = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities, kind="stable")
    ordered = probabilities[order]
    kept = np.zeros(len(logits), dtype=bool)
    kept[order] = np.cumsum(ordered) - ordered < top_p
    cumulative = np.cumsum(np.where(kept, probabilities, 0.0))
    return np.searchsorted(cumulative, uniforms * cumulative[-1], side="right").tolist()


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
@pytest.mark.parametrize("top_p", [0.2, 0.9, 0.95, 0.999, 1.0])
def test_the_order_of_float32_logits_gives_the_tokens_that_a_sort_in_float64_gives(
    temperature, top_p
):
    """In a vocabulary of equally likely tokens, too."""
    generator = torch.Generator().manual_seed(0)
    # Of 8 bits, as those of a bf16 model are, so that many logits are equal.
    logits = (4 * torch.randn(3, 400, generator=generator)).bfloat16().float()
    assert all(len(row.unique()) < len(row) for row in logits)
    uniforms = torch.rand(2000, dtype=torch.float64, generator=generator)
    for row in logits:
        ours = sample_tokens(row.expand(len(uniforms), -1), uniforms, temperature, top_p)
        assert ours.tolist() == sampled_by_sorting(
            row.numpy(), uniforms.numpy(), temperature, top_p
        )


def test_temperature_zero_is_greedy():
    logits = torch.randn(16, 50, generator=torch.Generator().manual_seed(0))
    tokens = sample_tokens(logits, torch.rand(16), 0.0, 0.5)
    assert torch.equal(tokens, logits.argmax(dim=-1))


def test_uniform_number_next_to_one_never_leaves_the_kept_tokens():
    logits = torch.tensor([[3.0, 2.0, -30.0, -float("inf")]])
    largest = torch.tensor([np.nextafter(1.0, 0.0)], dtype=torch.float64)
    assert sample_tokens(logits, largest, 1.0, 0.9).item() in (0, 1)
    assert sample_tokens(logits, largest, 1.0, 1.0).item() in (0, 1, 2)


def test_random_numbers_belong_to_the_prompt_and_not_to_its_batch():
    together = uniform_numbers((1, 0), [4, 7, 9], group_size=3, tokens=5)
    alone = uniform_numbers((1, 0), [7], group_size=3, tokens=5)
    assert torch.equal(together[3:6], alone)
    assert not torch.equal(together[0:3], together[6:9])
    assert len(torch.unique(together)) == together.numel()


def test_seeds_tell_uses_of_a_prompt_apart():
    first, second = (uniform_numbers(seed, [7], 2, 5) for seed in ((1, 0), (1, 1)))
    assert not torch.equal(first, second)
