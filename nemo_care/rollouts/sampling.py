"""Choose the next token: temperature, top-p, and randomness that is the same in every layout.

Each completion has its own row of uniform numbers, drawn for (seed, prompt index, completion,
token). Sampling by the inverse of the cumulative distribution then gives the same completion in
every rank, batch and parallel layout.
"""

from collections.abc import Sequence

import numpy as np
import torch


def uniform_numbers(
    seed: Sequence[int], prompt_indices: Sequence[int], group_size: int, tokens: int
) -> torch.Tensor:
    """Return uniform numbers in [0, 1): float64 [B * G, C], rows in group order.

    `seed` distinguishes this use of the prompts from others.
    """
    rows = [
        np.random.default_rng([*seed, index]).random((group_size, tokens))
        for index in prompt_indices
    ]
    return torch.from_numpy(np.concatenate(rows))


def sample_tokens(
    logits: torch.Tensor, uniforms: torch.Tensor, temperature: float, top_p: float
) -> torch.Tensor:
    """Choose one token per row.

    Args:
        logits: [N, V] of the next token.
        uniforms: [N] in [0, 1); unused if greedy.
        temperature: 0 chooses the most likely token.
        top_p: keep the fewest most likely tokens whose probability reaches this.

    Returns:
        Token ids [N].
    """
    if temperature == 0.0:
        return logits.argmax(dim=-1)
    probabilities = torch.softmax(logits.double() / temperature, dim=-1)
    if top_p < 1.0:
        # The float32 logits have the same order, and are half the data to sort.
        order = logits.argsort(dim=-1, descending=True, stable=True)
        ordered = probabilities.gather(-1, order)
        # A token stays if the ones before it have not reached top_p; the first always does.
        keep = ordered.cumsum(dim=-1) - ordered < top_p
        probabilities = probabilities * torch.zeros_like(keep).scatter(-1, order, keep)
    # Inverse of the cumulative distribution in vocabulary order: rounding can't reorder it.
    cumulative = probabilities.cumsum(dim=-1)
    threshold = uniforms.to(cumulative).unsqueeze(-1) * cumulative[:, -1:]
    chosen = torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)
    # A threshold that rounding makes equal to the total would be past the last kept token.
    last_kept = probabilities.shape[-1] - 1 - (probabilities > 0).flip(-1).int().argmax(dim=-1)
    return torch.minimum(chosen, last_kept)
