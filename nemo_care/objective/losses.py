"""The policy's loss (arXiv 2506.16141, step 7), as sums, so that micro-batches add up.

A loss is a surrogate for each token and a mean over the step's tokens; `LOSSES` is the table that
`algorithm.loss` chooses from.
"""

from collections.abc import Callable
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
class Mean:
    """How values of tokens are averaged over all completions of a step.

    `total` sums `values` [N, C] over the tokens in `mask` [N, C] with the mean's weights, `count`
    says by how much such totals are to be divided. Both add up over micro-batches and ranks, so the
    mean of the step is the sum of all totals over the sum of all counts.
    """

    total: Callable[[Tensor, Tensor], Tensor]
    count: Callable[[Tensor], Tensor]


def _sum_of_token_means(values: Tensor, mask: Tensor) -> Tensor:
    """Sum over N of the mean of `values` [N, C] over the tokens in `mask` [N, C].

    A completion without tokens (a row of padding) adds 0.
    """
    totals = torch.where(mask, values, 0.0).sum(dim=-1)
    return (totals / mask.sum(dim=-1).clamp(min=1)).sum()


MEAN_OF_COMPLETIONS = Mean(_sum_of_token_means, lambda mask: mask.any(dim=-1).sum())
"""Mean over completions of the mean over each completion's tokens (arXiv 2506.16141, step 7)."""


@dataclass(frozen=True)
class Surrogate:
    """The part of a loss that carries the advantage, for each token.

    `loss` [N, C], with gradient. `clipped` boolean [N, C]: where the clip takes the gradient away.
    """

    loss: Tensor
    clipped: Tensor


@dataclass(frozen=True)
class Loss:
    """One kind of policy loss.

    `surrogate` gets log-probabilities [N, C] with gradient, old ones [N, C] or None (see
    `PolicyLossInputs`; both zero outside the mask), advantages [N, 1], `clip_low` and `clip_high`.
    `mean` averages it over the tokens of the step.
    """

    surrogate: Callable[[Tensor, Tensor | None, Tensor, float, float], Surrogate]
    mean: Mean


def clipped_ratio(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    clip_low: float,
    clip_high: float,
) -> Surrogate:
    """-A_i * ratio of each token, clipped where there are old log-probabilities (step 7).

    ratio = exp(logp - stop_gradient(logp_old)). Without old ones it is 1 in value and only carries
    the gradient. With them the loss is -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) *
    A) (arXiv 2506.16141, step 7).
    """
    if old_log_probs is None:
        loss = -advantages * torch.exp(log_probs - log_probs.detach())
        return Surrogate(loss, torch.zeros_like(loss, dtype=torch.bool))
    ratio = torch.exp(log_probs - old_log_probs)
    surrogate = ratio * advantages
    clipped_surrogate = ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages
    loss = -torch.minimum(surrogate, clipped_surrogate)
    return Surrogate(loss, clipped_surrogate.detach() < surrogate.detach())


LOSSES: dict[str, Loss] = {"grpo": Loss(clipped_ratio, MEAN_OF_COMPLETIONS)}
"""By the name that a recipe gives in `algorithm.loss`."""


@dataclass(frozen=True)
class PolicyLoss:
    """Totals over the tokens of N completions; all are float32 scalars.

    Divide them by the loss's count (`Mean.count`) of the whole step, over all micro-batches and
    ranks, to get the loss and the metrics of the step.

    `loss_sum` carries the gradient and includes the KL term. `kl_sum` (without its coefficient) and
    `clipped_sum` (the share of tokens at which the clip takes the gradient away) do not.
    """

    loss_sum: Tensor
    kl_sum: Tensor
    clipped_sum: Tensor


def policy_loss(
    inputs: PolicyLossInputs,
    *,
    kind: Loss = LOSSES["grpo"],
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl_coefficient: float = 0.0,
) -> PolicyLoss:
    """Total of a policy loss over the tokens of N completions (arXiv 2506.16141, step 7).

    The surrogate of `kind`, plus kl_coefficient * k3 where `kl_coefficient` > 0 (the GRPO baseline,
    not CARE): k3 = exp(d) - d - 1, d = logp_ref - logp.

    `token_weights` multiply the surrogate, after the clip. The KL term is not weighted, as the
    ratio of several updates does not weight it either: it is a penalty that holds the policy to the
    reference on the tokens at hand, whoever sampled them, and not an estimate of the reward's
    gradient that sampling from another policy would bias.

    Computes in float32 whatever type the inputs have. Raises ValueError when shapes don't fit, or
    when the KL term is wanted without `reference_log_probs`.
    """
    _check_shapes(inputs)
    mask = inputs.mask.bool()
    # Values outside the mask become 0 before any exp, so that they can't make a NaN, neither in
    # the sum nor in the gradient.
    log_probs = torch.where(mask, inputs.log_probs.float(), 0.0)
    advantages = inputs.advantages.detach().float().unsqueeze(-1)
    old_log_probs = None
    if inputs.old_log_probs is not None:
        old_log_probs = torch.where(mask, inputs.old_log_probs.detach().float(), 0.0)
    surrogate = kind.surrogate(log_probs, old_log_probs, advantages, clip_low, clip_high)
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

    total = kind.mean.total
    return PolicyLoss(
        loss_sum=total(token_loss, mask),
        kl_sum=total(kl.detach(), mask),
        clipped_sum=total(surrogate.clipped.float(), mask),
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
