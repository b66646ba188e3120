"""The policy: the model being trained, with its optimizer."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from nemo_care.groups.batch import GroupBatch
from nemo_care.groups.batching import BatchLayout
from nemo_care.groups.group import Group
from nemo_care.groups.routing import training_pass
from nemo_care.megatron.gradient_watch import GradientWatch
from nemo_care.megatron.optimizer import (
    build_optimizer,
    build_scheduler,
    load_sharded_state,
    sharded_state,
    wrap_data_parallel,
)
from nemo_care.megatron.optimizer_offload import OptimizerState
from nemo_care.models.expert_routing import RoutingCounts
from nemo_care.models.pipeline import forward_backward
from nemo_care.models.video_language_model import ModelInputs, VideoLanguageModel
from nemo_care.objective.importance import ImportanceWeights, importance_weights
from nemo_care.objective.losses import LOSSES, PolicyLossInputs, policy_loss
from nemo_care.ranks.process_groups import Ranks
from nemo_care.recipe.schema import Recipe
from nemo_care.runs import metrics as m
from nemo_care.runs.metric import Metric
from nemo_care.training.expert_metrics import expert_metrics
from nemo_care.training.finite import KINDS, NotFinite, reference_is_finite, rollout_is_finite
from nemo_care.training.step import Step
from nemo_care.training.update_metrics import Result, UpdateMetrics

PREFIX = "policy."


class Policy:
    """The policy pi_theta of the paper, and its updates."""

    def __init__(
        self, model: VideoLanguageModel, recipe: Recipe, ranks: Ranks, layout: BatchLayout
    ) -> None:
        """Start from the weights of `model`."""
        self.model = model
        self.algorithm = recipe.algorithm
        self.loss = LOSSES[recipe.algorithm.loss]
        self.importance = recipe.rollout.importance_sampling
        self.masks_truncated = recipe.rollout.masks_truncated
        self.longest = recipe.rollout.max_completion_tokens
        self.ranks = ranks
        self.layout = layout
        self.wrapped = wrap_data_parallel(
            model, overlap_grad_reduce=recipe.optimizer.overlap_grad_reduce
        )
        self.gradients = GradientWatch(self.wrapped)
        self.metrics = UpdateMetrics(recipe, ranks)
        self.has_experts = model.family.architecture.experts is not None
        # What the groups have was recorded to be used; `nemo-care replay` can switch it off.
        self.replays_routing = recipe.model.moe.routing_replay is not False
        # Of the last `forward_backward`, with experts.
        self._routing: list[RoutingCounts] = []
        self.optimizer = build_optimizer(recipe.optimizer, self.wrapped)
        self.optimizer_state = OptimizerState(self.optimizer, offload=recipe.optimizer.offload)
        self.scheduler = build_scheduler(
            recipe.optimizer,
            self.optimizer,
            recipe.trainer.max_steps * recipe.algorithm.updates_per_rollout,
        )

    @property
    def optimizer_steps(self) -> int:
        """The number of optimizer steps so far."""
        return self.scheduler.num_steps

    def update(self, step: Step, after_step: Callable[[Step], None] = lambda step: None) -> None:
        """Update on the groups to be trained (algorithm step 7), and set the step's metrics.

        With several updates per rollout, the log-probabilities before the first one are the old
        ones of the clipped surrogate. `after_step` is called after each update.

        If anything is not finite on any rank, no rank steps: weights, optimizer and schedule are
        unchanged, `step.not_finite` has the reason, and these groups are not used further.
        """
        step.optimizer_steps, step.not_finite = self.optimizer_steps, None
        batches = self.layout.batches(step.trained)
        count = self.loss_count(batches)
        old_log_probs: list[torch.Tensor] = []
        for number in range(self.algorithm.updates_per_rollout):
            results = self.forward_backward(batches, count, old_log_probs)
            metrics = self.metrics.reduce(results, count) | self._expert_metrics()
            step.not_finite = self._step(step.trained, batches, results, number, metrics)
            # Comparisons with rollout and reference are only meaningful before any update.
            step.metrics |= {
                metric: value
                for metric, value in metrics.items()
                if number == 0 or metric.section == m.LOSS.section
            }
            if number == 0:
                old_log_probs = [result.log_probs for result in results]
            if step.not_finite is not None:
                break
            after_step(step)

    def _step(
        self,
        groups: Sequence[Group],
        batches: Sequence[GroupBatch],
        results: Sequence[Result],
        number: int,
        metrics: dict[Metric, float | None],
    ) -> NotFinite | None:
        """Take an optimizer step and add its metrics; return the reason if it was left out.

        `number` is the update's among those of the same rollouts.
        """
        metrics |= {m.GRAD_NORM: None, m.LEARNING_RATE: None}
        first = self._first_not_finite(groups, results)
        if not first:
            self.scheduler.step(1)
            stepped, metrics[m.GRAD_NORM] = self.step_optimizer()
            metrics[m.LEARNING_RATE] = float(self.optimizer.param_groups[0]["lr"])
            if stepped:
                return None
            self.scheduler.step(-1)
            # Its elements are finite on all ranks, so there is no first rank.
            first = {"gradient": None}
        vectors = [
            batch.unpadded(result.log_probs)
            for batch, result in zip(batches, results, strict=False)
        ]
        not_finite = NotFinite(
            first,
            number,
            self.gradients.parameters_not_finite() if not bool(self.gradients.finite) else [],
            [of_group for of_batch in vectors for of_group in of_batch],
        )
        self.clear_gradients()
        return not_finite

    def step_optimizer(self) -> tuple[bool, float]:
        """Return whether the optimizer stepped (see `build_optimizer`), and the gradient's norm."""
        with self.optimizer_state.in_place():
            stepped, grad_norm, _ = self.optimizer.step()
        return stepped, float(grad_norm)

    def gradient_norm(self) -> float:
        """Return the norm of the gradients of a backward pass, over all ranks, without a step."""
        with self.optimizer_state.in_place():
            self.optimizer.prepare_grads()
            return float(self.optimizer.get_grad_norm())

    def _first_not_finite(
        self, groups: Sequence[Group], results: Sequence[Result]
    ) -> dict[str, int | None]:
        """Return what is not finite on any rank, with the lowest such rank; same on all ranks."""
        device = next(self.model.parameters()).device
        inputs = (
            rollout_is_finite(groups),
            reference_is_finite(groups, all_tokens=self.algorithm.kl_coefficient > 0),
        )
        loss = torch.tensor(True, device=device)
        if results:
            # With old ones, a log-probability of minus infinity is masked by a ratio of 0.
            parts = [
                result.values[m.LOSS].isfinite() & result.log_probs.isfinite().all()
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
        """Return the divisor of the loss's totals: its count over the batches of all replicas.

        A float32 scalar. It is computed before any forward pass, so that each micro-batch can
        contribute its share of the step's loss. Collective over the replicas.
        """
        device = next(self.model.parameters()).device
        masks = [self._loss_mask(batch) for batch in batches]
        counts = [self.loss.mean.count(mask, self.longest).float() for mask in masks]
        count = self.ranks.sum_over_data(torch.stack(counts).sum().to(device))
        # If all completions of a step are masked, loss and gradient are 0, not 0 / 0.
        return count.clamp(min=1)

    def _loss_mask(self, batch: GroupBatch) -> torch.Tensor:
        """Return the loss's tokens, bool [N, C]: all, or only those of completions that ended."""
        return batch.mask & batch.ended()[:, None] if self.masks_truncated else batch.mask

    def forward_backward(
        self,
        batches: Sequence[GroupBatch],
        count: torch.Tensor,
        old_log_probs: Sequence[torch.Tensor] = (),
    ) -> list[Result]:
        """Compute loss and gradients of micro-batches; one result for each on the last stage.

        `count` is the `loss_count` of their step.
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
            # Megatron averages gradients over the data-parallel ranks; this step's loss is a mean
            # over all of them.
            share = loss.loss_sum * self.ranks.data_size / count
            result = self.metrics.of_batch(
                loss=loss,
                log_probs=log_probs,
                mask=batch.mask,
                rollout=rollout,
                reference=reference,
                asked=asked,
                staleness=batch.staleness(),
                importance=importance,
            )
            return share, result

        self.wrapped.train()
        self.clear_gradients()
        self._routing = []
        return forward_backward(self.wrapped, batches, self._inputs, loss_of)

    def _inputs(self, batch: GroupBatch) -> ModelInputs:
        """Return the inputs of a micro-batch, with the experts recorded while sampling."""
        inputs = batch.rows.inputs(self.model)
        if not self.has_experts:
            return inputs
        rows, replay = batch.rows, self.replays_routing
        routing = training_pass(rows.spans, rows.token_ids.shape, self.model, replay=replay)
        self._routing.append(routing.counts)
        return replace(inputs, routing=routing)

    def _expert_metrics(self) -> dict[Metric, float | None]:
        if not self.has_experts:
            return {}
        architecture, first = self.model.family.architecture, self.model.first_layer
        return expert_metrics(self._routing, architecture, first, self.ranks)

    def _reference_log_probs(self, batch: GroupBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the reference's log-probabilities [N, C] (float32), and the tokens it scored."""
        vectors = [group.reference_log_probs for group in batch.groups]
        known = [v for v in vectors if v is not None]
        if len(known) < len(vectors):
            return torch.zeros_like(batch.mask, dtype=torch.float32), torch.zeros_like(batch.mask)
        asked = batch.asked_of_reference(all_tokens=self.algorithm.kl_coefficient > 0)
        return batch.padded(known), asked

    def _importance(
        self, batch: GroupBatch, log_probs: torch.Tensor, rollout: torch.Tensor
    ) -> ImportanceWeights | None:
        """Return weights per token of training against `rollout` log-probabilities, both [N, C]."""
        if not self.importance.enabled:
            return None
        return importance_weights(log_probs, rollout, batch.mask, cap=self.importance.cap)

    def sharded_state_dict(self, metadata: dict[str, Any], is_loading: bool) -> dict[str, Any]:
        """Return weights and optimizer state as sharded tensors, and the schedule's step count."""
        model = self.model.sharded_state_dict(prefix=PREFIX, metadata=metadata)
        # For loading, and for saving a run in which every step was left out.
        self.optimizer_state.initialise()
        optimizer = sharded_state(self.optimizer, model, metadata, is_loading=is_loading)
        # For loading, Megatron may have created it anew.
        self.optimizer_state.put_away()
        return {"model": model, "optimizer": optimizer, "scheduler": self.scheduler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a `sharded_state_dict`."""
        weights = {name.removeprefix(PREFIX): tensor for name, tensor in state["model"].items()}
        self.model.load_state_dict(weights)
        load_sharded_state(self.optimizer, state["optimizer"])
        self.optimizer_state.put_away()
        # Megatron's scheduler adds the restored steps to its current count.
        self.scheduler.num_steps = 0
        self.scheduler.load_state_dict(state["scheduler"])
