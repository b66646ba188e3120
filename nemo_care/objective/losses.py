"""The policy losses as sums, which add up over micro-batches.

A loss is a surrogate for each token and a mean over the step's tokens; `LOSSES` is the table of
`algorithm.loss`. The paper's loss is `grpo` (arXiv 2506.16141, step 7).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class PolicyLossInputs:
    """The inputs of the loss of N completions; log-probabilities are natural logarithms.

    `log_probs` [N, C]: of the sampled tokens under the policy, with gradient.
    `advantages` [N]: A_i of each completion.
    `mask` [N, C] boolean: True at the completion's tokens, up to and including EOS. Everything
    outside the mask is ignored.
    `old_log_probs` [N, C] or None: under the policy that sampled. None means one update per
    rollout, where the ratio is 1 in value and only carries the gradient.
    `reference_log_probs` [N, C] or None: under the reference; needed by the KL term only.
    `token_weights` [N, C] or None: factors of each token's surrogate, such as importance weights
    (importance.py); no gradient passes through them. None: all 1.
    """

    log_probs: Tensor
    advantages: Tensor
    mask: Tensor
    old_log_probs: Tensor | None = None
    reference_log_probs: Tensor | None = None
    token_weights: Tensor | None = None


@dataclass(frozen=True)
class Mean:
    """An average of tokens' values over all completions of a step.

    `total` sums `values` [N, C] over the tokens in `mask` [N, C] with the mean's weights. `count`
    is the divisor of such totals, from the mask and the longest completion that the recipe allows
    (rollout.max_completion_tokens). Both add up over micro-batches and ranks, so the mean of the
    step is the sum of all totals over the sum of all counts.
    """

    total: Callable[[Tensor, Tensor], Tensor]
    count: Callable[[Tensor, int], Tensor]


def _sum_of_token_means(values: Tensor, mask: Tensor) -> Tensor:
    """Sum the mean of `values` [N, C] over the tokens in `mask` [N, C] over N.

    A completion without tokens (a row of padding) adds 0.
    """
    totals = torch.where(mask, values, 0.0).sum(dim=-1)
    return (totals / mask.sum(dim=-1).clamp(min=1)).sum()


def _sum_of_tokens(values: Tensor, mask: Tensor) -> Tensor:
    """Sum `values` [N, C] over the tokens in `mask` [N, C]."""
    return torch.where(mask, values, 0.0).sum()


def _completions(mask: Tensor) -> Tensor:
    """Count the rows of `mask` [N, C] that have a token."""
    return mask.any(dim=-1).sum()


MEAN_OF_COMPLETIONS = Mean(_sum_of_token_means, lambda mask, longest: _completions(mask))
"""Mean over completions of the mean over each completion's tokens (arXiv 2506.16141, step 7)."""

MEAN_OF_TOKENS = Mean(_sum_of_tokens, lambda mask, longest: mask.sum())
"""Mean over all tokens of the step, of all replicas: a long completion has more weight (DAPO, arXiv
2503.14476, section 3.3, whose formula averages over one prompt's completions, and whose code over a
batch)."""

SUM_OVER_LONGEST = Mean(_sum_of_tokens, lambda mask, longest: _completions(mask) * longest)
"""Mean over completions of the sum over each one's tokens, divided by a constant, the generation
budget (Dr.GRPO, arXiv 2503.20783, section 3.2 and listing 1)."""


@dataclass(frozen=True)
class Surrogate:
    """The part of a loss that depends on the advantage, for each token.

    `loss` [N, C], with gradient. `clipped` boolean [N, C]: where the clip changes the gradient.
    """

    loss: Tensor
    clipped: Tensor


@dataclass(frozen=True)
class Loss:
    """One kind of policy loss.

    `surrogate` takes the inputs in float32, zero outside the mask, `clip_low` and `clip_high`.
    `mean` averages it over the tokens of the step.
    """

    surrogate: Callable[[PolicyLossInputs, float, float], Surrogate]
    mean: Mean


def _log_ratio(inputs: PolicyLossInputs) -> Tensor:
    """Return logp - stop_gradient(logp_old) [N, C]; without old ones 0 in value, with gradient."""
    old = inputs.old_log_probs
    return inputs.log_probs - (inputs.log_probs.detach() if old is None else old)


def _clipped_surrogate(
    ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> Surrogate:
    """Return -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A)."""
    surrogate = ratio * advantages
    clipped_surrogate = ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages
    loss = -torch.minimum(surrogate, clipped_surrogate)
    return Surrogate(loss, clipped_surrogate.detach() < surrogate.detach())


def clipped_ratio(inputs: PolicyLossInputs, clip_low: float, clip_high: float) -> Surrogate:
    """Return -A_i * ratio of each token, clipped if there are old log-probabilities (step 7).

    ratio = exp(logp - stop_gradient(logp_old)). Without old ones it is 1 in value and only carries
    the gradient. With them the loss is -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) *
    A) (arXiv 2506.16141, step 7).
    """
    advantages = inputs.advantages.unsqueeze(-1)
    ratio = torch.exp(_log_ratio(inputs))
    if inputs.old_log_probs is None:
        loss = -advantages * ratio
        return Surrogate(loss, torch.zeros_like(loss, dtype=torch.bool))
    return _clipped_surrogate(ratio, advantages, clip_low, clip_high)


def sequence_ratio(inputs: PolicyLossInputs, clip_low: float, clip_high: float) -> Surrogate:
    """Use one clipped ratio for all tokens of a completion (GSPO, arXiv 2507.18071, eq. 5 and 7).

    s_i = exp(mean over the tokens of (logp - stop_gradient(logp_old))), the geometric mean of the
    tokens' ratios; each token has -min(s_i * A_i, clip(s_i, 1 - clip_low, 1 + clip_high) * A_i).
    The gradient of s_i is shared equally by the tokens. With one update per rollout it is that of
    `clipped_ratio`. Importance weights of tokens are averaged over the completion.
    """
    tokens = inputs.mask.sum(dim=-1, keepdim=True).clamp(min=1)
    ratio = torch.exp(_log_ratio(inputs).sum(dim=-1, keepdim=True) / tokens)
    one = _clipped_surrogate(ratio, inputs.advantages.unsqueeze(-1), clip_low, clip_high)
    return Surrogate(one.loss.expand_as(inputs.mask), one.clipped.expand_as(inputs.mask))


def clipped_weight(inputs: PolicyLossInputs, clip_low: float, clip_high: float) -> Surrogate:
    """Return -stop_gradient(clip(ratio)) * A_i * logp of each token (CISPO, arXiv 2506.13585).

    ratio = exp(logp - logp_old), clipped to [1 - clip_low, 1 + clip_high] (equations 4 and 5). A
    clipped ratio remains a weight of the token's gradient, so that no token loses its gradient.
    """
    ratio = torch.exp(_log_ratio(inputs).detach())
    weight = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    return Surrogate(-weight * inputs.advantages.unsqueeze(-1) * inputs.log_probs, weight != ratio)


LOSSES: dict[str, Loss] = {
    "grpo": Loss(clipped_ratio, MEAN_OF_COMPLETIONS),
    "token_mean": Loss(clipped_ratio, MEAN_OF_TOKENS),
    "dr_grpo": Loss(clipped_ratio, SUM_OVER_LONGEST),
    "gspo": Loss(sequence_ratio, MEAN_OF_COMPLETIONS),
    "cispo": Loss(clipped_weight, MEAN_OF_TOKENS),
}
"""By name in `algorithm.loss`."""


@dataclass(frozen=True)
class PolicyLoss:
    """Totals over the tokens of N completions; all are float32 scalars.

    `loss_sum` carries the gradient and includes the KL term. Divided by the loss's count
    (`Mean.count`) of the whole step, over all micro-batches and ranks, it is the step's loss.

    `kl_sum` (without its coefficient) and `clipped_sum` (the share of tokens at which clipping
    changes the gradient) are sums of each completion's mean, whatever the loss: divided by
    `completions`, they can be compared between losses.
    """

    loss_sum: Tensor
    kl_sum: Tensor
    clipped_sum: Tensor
    completions: Tensor


def policy_loss(
    inputs: PolicyLossInputs,
    *,
    kind: Loss = LOSSES["grpo"],
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl_coefficient: float = 0.0,
) -> PolicyLoss:
    """Return the total of a policy loss over the tokens of N completions.

    The surrogate of `kind`, plus kl_coefficient * k3 where `kl_coefficient` > 0 (the GRPO baseline,
    not CARE): k3 = exp(d) - d - 1, d = logp_ref - logp.

    `token_weights` multiply the surrogate, after clipping. The KL term is not weighted, nor does
    the ratio of several updates weight it: it is a penalty that keeps the policy near the reference
    on the given tokens, whichever policy sampled them, and not an estimate of the reward's gradient
    that sampling from a different policy would bias.

    Computes in float32 whatever type the inputs have. Raises ValueError if shapes don't fit, or if
    the KL term is requested without `reference_log_probs`.
    """
    _check_shapes(inputs)
    mask = inputs.mask.bool()
    # Values outside the mask become 0 before any exp, so that they can't make a NaN, in the sum or
    # in the gradient.
    log_probs = torch.where(mask, inputs.log_probs.float(), 0.0)
    old_log_probs = None
    if inputs.old_log_probs is not None:
        old_log_probs = torch.where(mask, inputs.old_log_probs.detach().float(), 0.0)
    clean = replace(
        inputs,
        log_probs=log_probs,
        advantages=inputs.advantages.detach().float(),
        mask=mask,
        old_log_probs=old_log_probs,
    )
    surrogate = kind.surrogate(clean, clip_low, clip_high)
    token_loss = surrogate.loss

    if inputs.token_weights is not None:
        weights = torch.where(mask, inputs.token_weights.detach().float(), 0.0)
        token_loss = token_loss * weights

    kl = torch.zeros_like(log_probs)
    if kl_coefficient > 0:
        if inputs.reference_log_probs is None:
            raise ValueError("kl_coefficient > 0 needs reference_log_probs")
        reference_log_probs = torch.where(mask, inputs.reference_log_probs.detach().float(), 0.0)
        difference = reference_log_probs - log_probs
        # expm1 keeps the small values that exp(d) - 1 would round away.
        kl = torch.expm1(difference) - difference
        token_loss = token_loss + kl_coefficient * kl

    return PolicyLoss(
        loss_sum=kind.mean.total(token_loss, mask),
        kl_sum=_sum_of_token_means(kl.detach(), mask),
        clipped_sum=_sum_of_token_means(surrogate.clipped.float(), mask),
        completions=_completions(mask).float(),
    )


def _check_shapes(inputs: PolicyLossInputs) -> None:
    shape = inputs.log_probs.shape
    if len(shape) != 2:
        raise ValueError(f"log_probs need the shape [N, C], not {tuple(shape)}")
    if inputs.advantages.shape != shape[:1]:
        raise ValueError(
            f"advantages need {tuple(shape[:1])}, not {tuple(inputs.advantages.shape)}"
        )
    for name in ("mask", "old_log_probs", "reference_log_probs", "token_weights"):
        tensor = getattr(inputs, name)
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} needs {tuple(shape)}, not {tuple(tensor.shape)}")
