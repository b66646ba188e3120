"""The metrics of an update: sums and maxima per micro-batch, reduced to the step's values."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from nemo_care.objective.importance import ImportanceWeights, effective_sample_share
from nemo_care.objective.losses import PolicyLoss
from nemo_care.ranks.process_groups import Ranks
from nemo_care.recipe.schema import Recipe
from nemo_care.runs import metrics as m
from nemo_care.runs.metric import Metric, Over, Reduction

# Summed over the tokens like metrics are, for the effective sample size.
_SQUARED_WEIGHTS = "squares of the weights"


@dataclass(frozen=True)
class Result:
    """The results of a micro-batch on the last pipeline stage.

    `values` are scalars: per metric the sum, which becomes the step's mean, or the maximum; per
    `Over` the count; and the sum of the squared importance weights. `by_staleness` [2, S + 1] has,
    for completions whose weights were 0 to S optimizer steps older, the sum of `ROLLOUT_DIFFERENCE`
    and the number of tokens. `log_probs` [N, C] are those under the policy.
    """

    values: Mapping[str, torch.Tensor]
    by_staleness: torch.Tensor
    log_probs: torch.Tensor


class UpdateMetrics:
    """Measures micro-batches on the last pipeline stage, and reduces them on all ranks."""

    def __init__(self, recipe: Recipe, ranks: Ranks) -> None:
        """Choose the metrics by the recipe."""
        self.recipe = recipe
        self.ranks = ranks
        rollout = recipe.rollout
        self.oldest = 0
        if rollout.asynchronous:
            self.oldest = rollout.max_staleness * recipe.algorithm.updates_per_rollout

    @property
    def measured(self) -> list[Metric]:
        """The measured metrics, which all ranks must agree on before they have any result."""
        metrics = [m.LOSS, m.CLIPPED_FRACTION, m.REFERENCE_DIFFERENCE, m.ROLLOUT_DIFFERENCE]
        metrics += [m.LARGEST_ROLLOUT_DIFFERENCE]
        if self.recipe.algorithm.kl_coefficient:
            metrics += [m.KL]
        if self.recipe.rollout.importance_sampling.enabled:
            metrics += [m.IMPORTANCE, m.LARGEST_IMPORTANCE, m.TRUNCATED]
        return metrics

    def of_batch(
        self,
        *,
        loss: PolicyLoss,
        log_probs: torch.Tensor,
        mask: torch.Tensor,
        rollout: torch.Tensor,
        reference: torch.Tensor,
        asked: torch.Tensor,
        staleness: torch.Tensor,
        importance: ImportanceWeights | None,
    ) -> Result:
        """Return the result of a micro-batch.

        All are [N, C]: log-probabilities under the policy, in the rollout and under the reference,
        `mask` for the tokens, and `asked` for those that the reference scored. `staleness` int64
        [N] is that of each completion.
        """
        log_probs = log_probs.detach()
        from_rollout = torch.where(mask, (rollout - log_probs).abs(), 0.0)
        from_reference = torch.where(asked, (reference - log_probs).abs(), 0.0)
        values: dict[str, torch.Tensor] = {
            Over.TRAINED: loss.completions,
            Over.TOKENS: mask.sum(),
            Over.REFERENCE_TOKENS: asked.sum(),
            m.LOSS: loss.loss_sum.detach(),
            m.KL: loss.kl_sum,
            m.CLIPPED_FRACTION: loss.clipped_sum,
            m.REFERENCE_DIFFERENCE: from_reference.sum(),
            m.ROLLOUT_DIFFERENCE: from_rollout.sum(),
            m.LARGEST_ROLLOUT_DIFFERENCE: from_rollout.max(),
        }
        if importance is not None:
            values[m.IMPORTANCE] = importance.weights.sum()
            values[m.LARGEST_IMPORTANCE] = importance.log_ratio.max().exp()
            values[m.TRUNCATED] = importance.truncated.sum()
            values[_SQUARED_WEIGHTS] = importance.weights.square().sum()
        of_completions = torch.stack([from_rollout.sum(1), mask.sum(1).float()])
        by_staleness = of_completions.new_zeros(2, self.oldest + 1)
        by_staleness.index_add_(1, staleness, of_completions)
        return Result(values, by_staleness, log_probs)

    def reduce(
        self, results: Sequence[Result], loss_terms: torch.Tensor
    ) -> dict[Metric, float | None]:
        """Return the step's metrics from the micro-batches of all replicas. Collective.

        `loss_terms` is the loss's count of the step. A mean over nothing is None, and so is KL for
        a loss without a KL term.
        """
        means = [metric for metric in self.measured if metric.reduction is Reduction.MEAN]
        maxima = [metric for metric in self.measured if metric.reduction is Reduction.MAX]
        summed: list[str] = [*means, Over.TRAINED, Over.TOKENS, Over.REFERENCE_TOKENS]
        if m.IMPORTANCE in means:
            summed.append(_SQUARED_WEIGHTS)
        sums = torch.zeros(len(summed), device=loss_terms.device)
        stale = torch.zeros(2, self.oldest + 1, device=loss_terms.device)
        largest = torch.zeros(len(maxima), device=loss_terms.device)
        if results:
            rows = [torch.stack([of.values[name] for name in summed]) for of in results]
            sums = torch.stack(rows).sum(0)
            rows = [torch.stack([of.values[name] for name in maxima]) for of in results]
            largest = torch.stack(rows).amax(0)
            stale = torch.stack([of.by_staleness for of in results]).sum(0)
        self.ranks.broadcast_from_loss_leader(sums)
        self.ranks.broadcast_from_loss_leader(largest)
        total = dict(zip(summed, self.ranks.sum_over_data(sums).tolist(), strict=True))
        total[Over.LOSS_TERMS] = float(loss_terms)
        found: dict[Metric, float | None] = {m.KL: None}
        found |= dict(zip(maxima, self.ranks.max_over_data(largest).tolist(), strict=True))
        for metric in means:
            found[metric] = total[metric] / total[metric.over] if total[metric.over] else None
        if _SQUARED_WEIGHTS in total:
            found[m.EFFECTIVE_SAMPLES] = effective_sample_share(
                total[m.IMPORTANCE], total[_SQUARED_WEIGHTS], total[Over.TOKENS]
            )
        return found | self._by_staleness(stale)

    def _by_staleness(self, sums: torch.Tensor) -> dict[Metric, float | None]:
        """Return the mean difference of each staleness that the step has; only if asynchronous."""
        if not self.recipe.rollout.asynchronous:
            return {}
        self.ranks.broadcast_from_loss_leader(sums)
        differences, tokens = self.ranks.sum_over_data(sums).tolist()
        return {
            m.ROLLOUT_DIFFERENCE_BY_STALENESS.of(str(age)): difference / count
            for age, (difference, count) in enumerate(zip(differences, tokens, strict=True))
            if count
        }
