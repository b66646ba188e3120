"""Truncated importance sampling, for differences between the sampler's and the trainer's numbers.

The generator's kernels and precision (vLLM, 8-bit sampling) differ from those of the update, so the
tokens come from a slightly different policy than the one whose gradient is computed. Each token's
loss is weighted by how much likelier the token is for the trainer than for the sampler, up to a cap
that bounds the variance: F. Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy
RL Training" (2025); the truncation is that of E. L. Ionides, "Truncated Importance Sampling"
(2008).
"""

from dataclasses import dataclass

import torch
from torch import Tensor


def effective_sample_share(weight_sum: float, square_sum: float, count: float) -> float | None:
    """Return the effective sample size of N weights, as a share of N: (sum w)^2 / (N sum w^2).

    It is 1 if all weights are equal and 1/N if one of them outweighs all others. An estimate from
    weighted samples has about the variance of one from this share of samples without weights:
    L. Kish, "Survey Sampling" (1965), section 11.7; A. Kong, "A Note on Importance Sampling using
    Standardized Weights", University of Chicago, Technical Report 348 (1992).

    Args:
        weight_sum: sum of the weights.
        square_sum: sum of their squares.
        count: N.

    Returns:
        None if no weight is above 0.
    """
    return weight_sum**2 / (square_sum * count) if square_sum > 0 else None


@dataclass(frozen=True)
class ImportanceWeights:
    """Weights of N completions' tokens, without gradients.

    `weights` float32 [N, C]: min(exp(`log_ratio`), cap).
    `log_ratio` float32 [N, C]: log pi_trainer - log pi_rollout of each token.
    `truncated` boolean [N, C]: where the ratio is above the cap.

    Outside the mask the ratio is 0: sums and maxima over all positions are those of the tokens.
    """

    weights: Tensor
    log_ratio: Tensor
    truncated: Tensor


def importance_weights(
    log_probs: Tensor, rollout_log_probs: Tensor, mask: Tensor, *, cap: float
) -> ImportanceWeights:
    """w = min(exp(logp_trainer - logp_rollout), cap) of each token (see this file's sources).

    Args:
        log_probs: [N, C], of the sampled tokens with the trainer's kernels, before any update on
            them.
        rollout_log_probs: [N, C], of the same tokens from the sampler. Both are of the plain
            softmax, at temperature 1 and over the whole vocabulary.
        mask: boolean [N, C], True at the completions' tokens; everything outside is ignored.
        cap: largest weight, 1 or more.

    Computes in float32. Raises ValueError when shapes don't fit.
    """
    if not log_probs.shape == rollout_log_probs.shape == mask.shape:
        shapes = [tuple(tensor.shape) for tensor in (log_probs, rollout_log_probs, mask)]
        raise ValueError(f"log_probs, rollout_log_probs and mask need one shape, not {shapes}")
    difference = log_probs.detach().float() - rollout_log_probs.detach().float()
    log_ratio = torch.where(mask, difference, -torch.inf)
    # The ratio can overflow to infinity, which the cap removes.
    ratio = torch.exp(log_ratio)
    return ImportanceWeights(ratio.clamp(max=cap), log_ratio, ratio > cap)
