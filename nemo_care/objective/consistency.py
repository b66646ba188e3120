"""Answer likelihood and consistency bonus (arXiv 2506.16141, steps 3 to 5), and further bonuses."""

from collections.abc import Sequence

import torch
from torch import Tensor

TIE = 1e-6
"""Accuracies and likelihoods closer than this are equal: they are in [0, 1] with at most float32
precision (spacing 6e-8), and a mean over a group adds its own rounding error. Without the
tolerance, a group whose likelihoods are all equal could lose its bonus to the last bit of their
mean."""


def answer_likelihood(log_probs: Tensor, answer_mask: Tensor) -> Tensor:
    """Likelihood p_i of each completion's answer under the reference (arXiv 2506.16141, step 3).

    p_i = exp(mean over the answer's tokens of log pi_phi(token | x, tau_i, earlier tokens)).

    `log_probs` [N, C]: natural-log probabilities of the completion tokens, of which only those
    inside the mask are read (the rest can be anything, NaN included). `answer_mask` [N, C]
    boolean: True at the answer's tokens. N is B * G, or G for one group.

    Returns p [N] in float32, NaN where the mask is empty. Not clipped: `consistency_bonus` does
    that, so that logs show the likelihood itself. Raises ValueError when the shapes differ.
    """
    if log_probs.shape != answer_mask.shape or log_probs.dim() != 2:
        raise ValueError(
            "log_probs and answer_mask need one shape [N, C], "
            f"not {tuple(log_probs.shape)} and {tuple(answer_mask.shape)}"
        )
    answer_mask = answer_mask.bool()
    total = torch.where(answer_mask, log_probs.float(), 0.0).sum(dim=-1)
    # 0 / 0 is the NaN that marks a completion without an answer.
    return torch.exp(total / answer_mask.sum(dim=-1))


def consistency_bonus(
    accuracy: Tensor,
    answer_likelihood: Tensor,
    *,
    bonus_coefficient: float = 0.5,
    consistency_margin: float = 0.0,
    likelihood_clip: float = 0.95,
    accuracy_threshold: float = 0.1,
) -> Tensor:
    """Bonus r^c of the completions whose answer follows from their reasoning (steps 3-5).

    Per group, with p clipped from above at `likelihood_clip`:
    S = {i : accuracy_i > accuracy_threshold and accuracy_i >= mean_j(accuracy_j)};
    m = mean of p_i over S; r^c_i = bonus_coefficient * accuracy_i for i in S with
    p_i >= m - consistency_margin, else 0 (arXiv 2506.16141).

    `accuracy` [B, G] in [0, 1]. `answer_likelihood` [B, G] in [0, 1], clipped or not; NaN means
    that the completion has no answer: it gets no bonus and takes no part in m, while its accuracy
    does take part in the group's mean accuracy.

    Returns [B, G] of accuracy's type (float32 for integers). Raises ValueError when the
    shapes differ or aren't [B, G].
    """
    _check_shapes(accuracy, answer_likelihood)
    # Clipped in its own type: 0.95 is not a float32, and a value that was clipped earlier must stay
    # equal to one that is clipped here.
    likelihood = answer_likelihood.clamp(max=likelihood_clip).double()
    eligible = _accurate(accuracy, accuracy_threshold) & ~likelihood.isnan()
    # An empty S has the mean 0 / 0 = NaN, which no comparison passes; no completion is eligible
    # then.
    total = torch.where(eligible, likelihood, 0.0).sum(dim=-1, keepdim=True)
    mean_likelihood = total / eligible.sum(dim=-1, keepdim=True)

    consistent = eligible & (likelihood >= mean_likelihood - consistency_margin - TIE)
    return _share_of_accuracy(consistent, accuracy, bonus_coefficient)


def selection(
    accuracy: Tensor,
    answer_likelihood: Tensor,
    bonus: Tensor,
    *,
    accuracy_threshold: float = 0.1,
) -> tuple[Tensor, Tensor]:
    """Return which groups have a choice, and in which of them the bonus makes one.

    A group has a choice when its S (see `consistency_bonus`) has two completions with an answer;
    the bonus chooses when it differs among completions of S that are equally accurate.

    `accuracy`, `answer_likelihood` and `bonus` [B, G]. Returns two masks [B].
    """
    _check_shapes(accuracy, answer_likelihood)
    eligible = _accurate(accuracy, accuracy_threshold) & ~answer_likelihood.isnan()
    equal = (accuracy[:, :, None] - accuracy[:, None, :]).abs() <= TIE
    pairs = equal & eligible[:, :, None] & eligible[:, None, :]
    differs = (bonus[:, :, None] - bonus[:, None, :]).abs() > TIE
    has_choice = eligible.sum(dim=-1) > 1
    return has_choice, has_choice & (pairs & differs).flatten(1).any(dim=-1)


def accurate_bonus(
    accuracy: Tensor,
    answer_likelihood: Tensor,
    *,
    bonus_coefficient: float = 0.5,
    accuracy_threshold: float = 0.1,
) -> Tensor:
    """Bonus for accuracy alone: the paper's ablation without a comparison of likelihoods.

    r^c_i = bonus_coefficient * accuracy_i for i in the S of `consistency_bonus` that have an
    answer, however likely it is, else 0.

    Shapes, NaN, result and errors as in `consistency_bonus`.
    """
    _check_shapes(accuracy, answer_likelihood)
    chosen = _accurate(accuracy, accuracy_threshold) & ~answer_likelihood.isnan()
    return _share_of_accuracy(chosen, accuracy, bonus_coefficient)


def dense_bonus(
    answer_likelihood: Tensor, *, bonus_coefficient: float = 0.5, likelihood_clip: float = 0.95
) -> Tensor:
    """Bonus by likelihood alone: the paper's ablation without selection and comparison.

    r^c_i = bonus_coefficient * min(p_i, likelihood_clip), right or wrong; 0 without an answer.

    `answer_likelihood` [B, G] in [0, 1], clipped or not, NaN without an answer. Returns [B, G] of
    the same type.
    """
    bonus = bonus_coefficient * answer_likelihood.clamp(max=likelihood_clip)
    return torch.where(answer_likelihood.isnan(), 0.0, bonus)


def counterfactual_bonus(
    pair_likelihood: Tensor, *, bonus_coefficient: float = 0.5, floor: float = -5.0
) -> Tensor:
    """Bonus for answers that depend on their reasoning: the leave-one-out counterfactual bonus.

    Not in the paper. Per group, with l_ij = max(log p_ref(answer i | reasoning j), floor):
    cf_i = l_ii - mean of l_ij over all completions j != i that have an answer;
    r^c_i = bonus_coefficient * clip(cf_i, -1, 1), right or wrong, so it can be negative. An answer
    that is equally likely given any reasoning gets 0, as does a completion without an answer, and
    one in whose group no other completion has an answer.

    `pair_likelihood` [B, G, G]: row i, column j: exp of the mean log-probability of the tokens of
    answer i after reasoning j; NaN where either completion has no answer. Returns [B, G] of its
    type. Raises ValueError for any other shape.
    """
    if pair_likelihood.dim() != 3 or pair_likelihood.shape[1] != pair_likelihood.shape[2]:
        raise ValueError(f"pair_likelihood needs [B, G, G], not {tuple(pair_likelihood.shape)}")
    log_likelihood = pair_likelihood.log().clamp(min=floor)
    own = log_likelihood.diagonal(dim1=1, dim2=2)
    others = ~pair_likelihood.isnan()
    others &= ~torch.eye(pair_likelihood.shape[1], dtype=torch.bool, device=others.device)
    count = others.sum(dim=-1)
    elsewhere = torch.where(others, log_likelihood, 0.0).sum(dim=-1) / count
    bonus = bonus_coefficient * (own - elsewhere).clamp(-1.0, 1.0)
    return torch.where((count > 0) & ~own.isnan(), bonus, 0.0)


def peer_dependence(
    pair_likelihood: Tensor, answers: Sequence[str | None], *, floor: float = -5.0
) -> float | None:
    """The peer probe: how much likelier answers are after their own reasoning than after a peer's.

    Not in the paper. With l_ij = max(log p(answer i | reasoning j), floor): the mean of l_ii - l_ij
    over all pairs of completions i and j of one prompt that gave different answers. 0 where the
    answers do not depend on the reasoning, at most -floor.

    `pair_likelihood` [G, G] as in `counterfactual_bonus`; `answers` are the G texts, None without
    one. Returns None if no two completions have different answers.
    """
    log_likelihood = pair_likelihood.double().log().clamp(min=floor)
    own = log_likelihood.diagonal()[:, None]
    differ = torch.tensor(
        [[a is not None and b is not None and a != b for b in answers] for a in answers]
    )
    gains = (own - log_likelihood)[differ & ~pair_likelihood.isnan()]
    return float(gains.mean()) if len(gains) else None


def _check_shapes(accuracy: Tensor, answer_likelihood: Tensor) -> None:
    if accuracy.shape != answer_likelihood.shape or accuracy.dim() != 2:
        raise ValueError(
            "accuracy and answer_likelihood need one shape [B, G], "
            f"not {tuple(accuracy.shape)} and {tuple(answer_likelihood.shape)}"
        )


def _accurate(accuracy: Tensor, threshold: float) -> Tensor:
    """Return S of step 4 as a mask [B, G]: above the threshold, and not below the group's mean."""
    exact = accuracy.double()
    return (exact > threshold + TIE) & (exact >= exact.mean(dim=-1, keepdim=True) - TIE)


def _share_of_accuracy(chosen: Tensor, accuracy: Tensor, bonus_coefficient: float) -> Tensor:
    """Return bonus_coefficient * accuracy [B, G] where chosen, else 0; float32 for integers."""
    dtype = accuracy.dtype if accuracy.is_floating_point() else torch.float32
    return torch.where(chosen, bonus_coefficient * accuracy.to(dtype), 0.0).to(dtype)
