"""The policy: the model that is trained, with its optimizer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nemo_care.groups.batch import GroupBatch
from nemo_care.groups.batching import BatchLayout
from nemo_care.groups.group import Group
from nemo_care.megatron.gradient_watch import GradientWatch
from nemo_care.megatron.optimizer import (
    build_optimizer,
    build_scheduler,
    wrap_data_parallel,
)
from nemo_care.megatron.optimizer_offload import OptimizerState
from nemo_care.models.pipeline import forward_backward
from nemo_care.models.qwen2_5_vl import Qwen25VL
from nemo_care.objective.importance import ImportanceWeights, importance_weights
from nemo_care.objective.losses import LOSSES, PolicyLossInputs, policy_loss
from nemo_care.ranks.process_groups import Ranks
from nemo_care.recipe.schema import Recipe
from nemo_care.training.finite import KINDS, NotFinite, reference_is_finite, rollout_is_finite

PREFIX = "policy."

# Of each micro-batch: totals, which add up over micro-batches and replicas, and maxima.
_TOTALS = (
    "loss",
    "kl",
    "clipped",
    "completions",
    "rollout_difference",
    "tokens",
    "reference_difference",
    "scored_tokens",
    "importance",
    "truncated",
)
_MAXIMA = ("rollout_difference", "log_importance")


@dataclass(frozen=True)
class Result:
    """What the last pipeline stage keeps of a micro-batch.

    Scalars by name, those of `_TOTALS` and of `_MAXIMA`; `log_probs` [N, C] under the policy.
    """

    totals: Mapping[str, torch.Tensor]
    maxima: Mapping[str, torch.Tensor]
    log_probs: torch.Tensor


class Policy:
    """pi_theta of the paper, and its updates."""

    def __init__(self, model: Qwen25VL, recipe: Recipe, ranks: Ranks, layout: BatchLayout) -> None:
        """`model` holds the weights to start from."""
        self.model = model
        self.algorithm = recipe.algorithm
        self.loss = LOSSES[recipe.algorithm.loss]
        self.importance = recipe.rollout.importance_sampling
        self.masks_truncated = recipe.rollout.truncated == "mask"
        self.longest = recipe.rollout.max_completion_tokens
        self.ranks = ranks
        self.layout = layout
        if recipe.model.freeze_vision and ranks.is_first_stage:
            model.visual.requires_grad_(False)
        self.wrapped = wrap_data_parallel(
            model, overlap_grad_reduce=recipe.optimizer.overlap_grad_reduce
        )
        self.gradients = GradientWatch(self.wrapped)
        # What the last `update` left a step out for.
        self.not_finite: NotFinite | None = None
        self.optimizer = build_optimizer(recipe.optimizer, self.wrapped)
        self.optimizer_state = OptimizerState(self.optimizer, offload=recipe.optimizer.offload)
        self.scheduler = build_scheduler(
            recipe.optimizer,
            self.optimizer,
            recipe.trainer.max_steps * recipe.algorithm.updates_per_rollout,
        )

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps so far."""
        return self.scheduler.num_steps

    def update(
        self, groups: Sequence[Group], after_step: Callable[[], None] = lambda: None
    ) -> dict[str, float | None]:
        """Optimizer steps on these groups (algorithm step 7); the metrics of the last one.

        With several updates per rollout, the log-probabilities before the first one are the old
        ones of the clipped surrogate. `after_step` is called after each. Metrics are equal on all
        ranks.

        Where anything is not finite on any rank, no rank steps: weights, optimizer and schedule
        stay as they are, `not_finite` says what it was, and these groups are left.
        """
        batches = self.layout.batches(groups)
        count = self.loss_count(batches)
        old_log_probs: list[torch.Tensor] = []
        metrics: dict[str, float | None] = {}
        self.not_finite = None
        for number in range(self.algorithm.updates_per_rollout):
            step_metrics, log_probs = self._step(groups, batches, count, old_log_probs, number)
            if number == 0:
                old_log_probs = log_probs
                metrics = step_metrics
            else:
                # Comparisons with rollout and reference only mean something before any update.
                metrics.update({k: v for k, v in step_metrics.items() if k.startswith("train/")})
            if self.not_finite is not None:
                break
            after_step()
        return metrics

    def _step(
        self,
        groups: Sequence[Group],
        batches: Sequence[GroupBatch],
        count: torch.Tensor,
        old_log_probs: Sequence[torch.Tensor],
        number: int,
    ) -> tuple[dict[str, float | None], list[torch.Tensor]]:
        """One optimizer step; metrics, and each micro-batch's log-probs [N, C] (last stage)."""
        results = self.forward_backward(batches, count, old_log_probs)
        log_probs = [result.log_probs for result in results]
        metrics = self._reduce(results, count)
        first = self._first_not_finite(groups, results)
        if not first:
            self.scheduler.step(1)
            stepped, grad_norm = self.step_optimizer()
            metrics["train/grad_norm"] = grad_norm
            metrics["train/lr"] = float(self.optimizer.param_groups[0]["lr"])
            if stepped:
                return metrics, log_probs
            self.scheduler.step(-1)
            # Its elements are finite on all ranks, so none was the first.
            first = {"gradient": None}
        else:
            metrics |= {"train/grad_norm": None, "train/lr": None}
        vectors = [batch.unpadded(v) for batch, v in zip(batches, log_probs, strict=False)]
        self.not_finite = NotFinite(
            first,
            number,
            self.gradients.parameters_not_finite() if not bool(self.gradients.finite) else [],
            [of_group for of_batch in vectors for of_group in of_batch],
        )
        self.clear_gradients()
        return metrics, log_probs

    def step_optimizer(self) -> tuple[bool, float]:
        """Whether the optimizer stepped (see `build_optimizer`), and the norm of the gradient."""
        with self.optimizer_state.in_place():
            stepped, grad_norm, _ = self.optimizer.step()
        return stepped, float(grad_norm)

    def gradient_norm(self) -> float:
        """The norm of the gradients that a backward has left, over all ranks; nothing steps."""
        with self.optimizer_state.in_place():
            self.optimizer.prepare_grads()
            return float(self.optimizer.get_grad_norm())

    def _first_not_finite(
        self, groups: Sequence[Group], results: Sequence[Result]
    ) -> dict[str, int | None]:
        """What is not finite on any rank, and the lowest such rank; the same on all ranks."""
        device = next(self.model.parameters()).device
        inputs = (
            rollout_is_finite(groups),
            reference_is_finite(groups, all_tokens=self.algorithm.kl_coefficient > 0),
        )
        loss = torch.tensor(True, device=device)
        if results:
            # With old ones, a log-probability of minus infinity hides behind a ratio of 0.
            parts = [
                result.totals["loss"].isfinite() & result.log_probs.isfinite().all()
                for result in results
            ]
            loss = torch.stack(parts).all()
        computed = torch.stack([loss, self.gradients.finite.to(device)])
        ranks = self.ranks.first_rank_with(
            torch.cat([torch.tensor(inputs, device=device), computed])
        )
        return {kind: rank for kind, rank in zip(KINDS, ranks, strict=True) if rank is not None}

    def clear_gradients(self) -> None:
        """Set all gradients to zero."""
        self.wrapped.zero_grad_buffer()
        self.optimizer.zero_grad()

    def loss_count(self, batches: Sequence[GroupBatch]) -> torch.Tensor:
        """By how much the loss's totals are divided: its count over the batches of all replicas.

        A float32 scalar. Known before any forward pass, so that each micro-batch can contribute its
        share of the step's loss. Collective over the replicas.
        """
        device = next(self.model.parameters()).device
        masks = [self._loss_mask(batch) for batch in batches]
        counts = [self.loss.mean.count(mask, self.longest).float() for mask in masks]
        count = self.ranks.sum_over_data(torch.stack(counts).sum().to(device))
        # Where all completions of a step are masked, loss and gradient are 0, not 0 / 0.
        return count.clamp(min=1)

    def _loss_mask(self, batch: GroupBatch) -> torch.Tensor:
        """Tokens that the loss averages over, bool [N, C]: all, or those of ended completions."""
        return batch.mask & batch.ended()[:, None] if self.masks_truncated else batch.mask

    def forward_backward(
        self,
        batches: Sequence[GroupBatch],
        count: torch.Tensor,
        old_log_probs: Sequence[torch.Tensor] = (),
    ) -> list[Result]:
        """Loss and gradients of these micro-batches; a result for each on the last stage.

        `count` is the `loss_count` of the step that they belong to.
        """
        old_of = dict(zip(map(id, batches), old_log_probs, strict=False))

        def loss_of(hidden: torch.Tensor, batch: GroupBatch) -> tuple[torch.Tensor, Result]:
            log_probs = batch.log_probs(self.model, hidden, batch.mask)
            reference, asked = self._reference_log_probs(batch)
            rollout = batch.rollout_log_probs()
            old = old_of.get(id(batch))
            importance = self._importance(batch, log_probs if old is None else old, rollout)
            loss = policy_loss(
                PolicyLossInputs(
                    log_probs=log_probs,
                    advantages=batch.advantages(),
                    mask=self._loss_mask(batch),
                    old_log_probs=old,
                    reference_log_probs=reference if self.algorithm.kl_coefficient else None,
                    token_weights=importance.weights if importance else None,
                ),
                kind=self.loss,
                clip_low=self.algorithm.clip_low,
                clip_high=self.algorithm.clip_high,
                kl_coefficient=self.algorithm.kl_coefficient,
            )
            difference = torch.where(batch.mask, (rollout - log_probs.detach()).abs(), 0.0)
            from_reference = torch.where(asked, (reference - log_probs.detach()).abs(), 0.0)
            nothing = torch.zeros_like(loss.kl_sum)
            totals = {
                "loss": loss.loss_sum.detach(),
                "kl": loss.kl_sum,
                "clipped": loss.clipped_sum,
                "completions": loss.completions,
                "rollout_difference": difference.sum(),
                "tokens": batch.mask.sum(),
                "reference_difference": from_reference.sum(),
                "scored_tokens": asked.sum(),
                "importance": importance.weights.sum() if importance else nothing,
                "truncated": importance.truncated.sum() if importance else nothing,
            }
            maxima = {
                "rollout_difference": difference.max(),
                "log_importance": importance.log_ratio.max() if importance else nothing,
            }
            # Megatron averages gradients over the data-parallel ranks; this step's loss is a mean
            # over all of them.
            share = loss.loss_sum * self.ranks.data_size / count
            return share, Result(totals, maxima, log_probs.detach())

        self.wrapped.train()
        self.clear_gradients()
        return forward_backward(
            self.wrapped, batches, inputs_of=lambda batch: batch.inputs, loss_of=loss_of
        )

    def _reference_log_probs(self, batch: GroupBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """The reference's log-probabilities float32 [N, C], and for which tokens it was asked."""
        vectors = [group.reference_log_probs for group in batch.groups]
        known = [v for v in vectors if v is not None]
        if len(known) < len(vectors):
            return torch.zeros_like(batch.mask, dtype=torch.float32), torch.zeros_like(batch.mask)
        asked = batch.asked_of_reference(all_tokens=self.algorithm.kl_coefficient > 0)
        return batch.padded(known), asked

    def _importance(
        self, batch: GroupBatch, log_probs: torch.Tensor, rollout: torch.Tensor
    ) -> ImportanceWeights | None:
        """Of each token: `log_probs` [N, C] in training, before any update, against `rollout`."""
        if not self.importance.enabled:
            return None
        return importance_weights(log_probs, rollout, batch.mask, cap=self.importance.cap)

    def _reduce(self, results: Sequence[Result], count: torch.Tensor) -> dict[str, float | None]:
        """The step's metrics from the micro-batches of all replicas."""
        device = next(self.model.parameters()).device
        sums = torch.zeros(len(_TOTALS), device=device)
        largest = torch.zeros(len(_MAXIMA), device=device)
        if results:
            rows = [torch.stack([result.totals[name] for name in _TOTALS]) for result in results]
            sums = torch.stack(rows).sum(0)
            rows = [torch.stack([result.maxima[name] for name in _MAXIMA]) for result in results]
            largest = torch.stack(rows).amax(0)
        self.ranks.broadcast_from_last_stage(sums)
        self.ranks.broadcast_from_last_stage(largest)
        total = dict(zip(_TOTALS, self.ranks.sum_over_data(sums).tolist(), strict=True))
        most = dict(zip(_MAXIMA, self.ranks.max_over_data(largest), strict=True))
        tokens, scored = total["tokens"], total["scored_tokens"]
        completions = max(total["completions"], 1.0)
        metrics = {
            "train/loss": total["loss"] / float(count),
            "train/kl": total["kl"] / completions if self.algorithm.kl_coefficient else None,
            "train/clipped_fraction": total["clipped"] / completions,
            "care/logprob_difference": total["reference_difference"] / scored if scored else None,
            "rollout/logprob_difference": total["rollout_difference"] / tokens,
            "rollout/logprob_difference_max": float(most["rollout_difference"]),
        }
        if self.importance.enabled:
            metrics["rollout/importance_mean"] = total["importance"] / tokens
            metrics["rollout/importance_max"] = float(most["log_importance"].exp())
            metrics["rollout/importance_truncated"] = total["truncated"] / tokens
        return metrics

    def sharded_state_dict(self, metadata: dict[str, Any], is_loading: bool) -> dict[str, Any]:
        """Weights and optimizer state as Megatron sharded tensors; the schedule's step count."""
        model = self.model.sharded_state_dict(prefix=PREFIX, metadata=metadata)
        # For loading, and for saving a run none of whose steps could be taken.
        self.optimizer_state.initialise()
        optimizer = self.optimizer.sharded_state_dict(
            model, is_loading=is_loading, metadata=metadata
        )
        # For loading, Megatron may make it anew.
        self.optimizer_state.put_away()
        return {"model": model, "optimizer": optimizer, "scheduler": self.scheduler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a loaded `sharded_state_dict`."""
        weights = {name.removeprefix(PREFIX): tensor for name, tensor in state["model"].items()}
        self.model.load_state_dict(weights)
        self.optimizer.load_state_dict(state["optimizer"])
        self.optimizer_state.put_away()
        # Megatron's scheduler adds the restored steps to those that it has.
        self.scheduler.num_steps = 0
        self.scheduler.load_state_dict(state["scheduler"])
