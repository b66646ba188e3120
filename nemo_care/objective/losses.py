"""The policy's loss (arXiv 2506.16141, step 7), as sums, so that micro-batches add up."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PolicyLossInputs:
    """What the loss of N completions needs; log-probabilities are natural logarithms.

    `log_probs` [N, C]: of the sampled tokens under the policy, with gradient.
    `advantages` [N]: A_i of each completion.
    `mask` [N, C] boolean: True at the completion's tokens, up to and with EOS. Everything outside
    the mask is ignored, whatever it holds.
    `old_log_probs` [N, C] or None: under the policy that sampled. None means one update per
    rollout, where the ratio is 1 in value and only carries the gradient.
    `reference_log_probs` [N, C] or None: under the reference; needed by the KL term only.
    `token_weights` [N, C] or None: what each token's surrogate is multiplied by, such as importance
    weights (importance.py); no gradient goes through them. None: 1 each.
    """

    log_probs: Tensor
    advantages: Tensor
    mask: Tensor
    old_log_probs: Tensor | None = None
    reference_log_probs: Tensor | None = None
    token_weights: Tensor | None = None


@dataclass(frozen=True)
class PolicyLoss:
    """Sums over completions of means over the completion's tokens; all are float32 scalars.

    Divide the sums by the number of completions of the whole step, over all micro-batches and
    ranks, to get the loss and the metrics of the step.

    `loss_sum` carries the gradient and includes the KL term. `kl_sum` (without its coefficient),
    `clipped_sum` (the share of tokens at which the clip takes the gradient away) do not.
    """

    loss_sum: Tensor
    kl_sum: Tensor
    clipped_sum: Tensor


def policy_loss(
    inputs: PolicyLossInputs,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl_coefficient: float = 0.0,
) -> PolicyLoss:
    """Sum over completions of the mean over tokens of -A_i * ratio (arXiv 2506.16141, step 7).

    ratio = exp(logp - stop_gradient(logp_old)). With `old_log_probs` the clipped surrogate
    applies: -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A). With
    `kl_coefficient` > 0 (the GRPO baseline, not CARE) it adds
    kl_coefficient * k3, k3 = exp(d) - d - 1, d = logp_ref - logp.

    `token_weights` multiply the surrogate, behind the clip. The KL term is not weighted, as the
    ratio of several updates does not weight it either: it is a penalty that holds the policy to the
    reference on the tokens at hand, whoever sampled them, and not an estimate of the reward's
    gradient that sampling from another policy would bias.

    Computes in float32 whatever type the inputs have. Raises ValueError when shapes don't fit, or
    when the KL term is asked for without `reference_log_probs`.
    """
    _check_shapes(inputs)
    mask = inputs.mask.bool()
    # Values outside the mask become 0 before any exp, so that they can't make a NaN, neither in
    # the sum nor in the gradient.
    log_probs = torch.where(mask, inputs.log_probs.float(), 0.0)
    advantages = inputs.advantages.detach().float().unsqueeze(-1)

    if inputs.old_log_probs is None:
        token_loss = -advantages * torch.exp(log_probs - log_probs.detach())
        clipped = torch.zeros_like(mask)
    else:
        old_log_probs = torch.where(mask, inputs.old_log_probs.detach().float(), 0.0)
        ratio = torch.exp(log_probs - old_log_probs)
        surrogate = ratio * advantages
        clipped_surrogate = ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages
        token_loss = -torch.minimum(surrogate, clipped_surrogate)
        clipped = clipped_surrogate.detach() < surrogate.detach()

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
        loss_sum=_sum_of_token_means(token_loss, mask),
        kl_sum=_sum_of_token_means(kl.detach(), mask),
        clipped_sum=_sum_of_token_means(clipped.float(), mask),
    )


def _sum_of_token_means(values: Tensor, mask: Tensor) -> Tensor:
    """Sum over N of the mean of `values` [N, C] over the tokens in `mask` [N, C].

    A completion without tokens (a row of padding) adds 0.
    """
    totals = torch.where(mask, values, 0.0).sum(dim=-1)
    return (totals / mask.sum(dim=-1).clamp(min=1)).sum()


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
