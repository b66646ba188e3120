"""What has to be finite before an optimizer step, and the count of steps that are not."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from nemo_care.groups.group import Completion, Group

NAMES = {
    "rollout": "the rollout's log-probabilities",
    "reference": "the reference's log-probabilities",
    "loss": "the loss",
    "gradient": "the gradient",
}
KINDS = tuple(NAMES)


@dataclass(frozen=True)
class NotFinite:
    """Why an update was left out.

    `first` has the kinds that are not finite, each with the lowest rank on which it is not (None:
    the gradient's norm overflows, on all ranks). It is the same on all ranks, like `update`, the
    number from 0 among the updates of the same rollouts. Per rank are `parameters`, those with
    such a gradient, and `log_probs`, the policy's, a list of [C] per group (last stage).
    """

    first: Mapping[str, int | None]
    update: int = 0
    parameters: Sequence[str] = ()
    log_probs: Sequence[Sequence[torch.Tensor]] = ()


def rollout_is_finite(groups: Iterable[Group]) -> bool:
    """Whether all log-probabilities of these rollouts are finite."""
    return all(_finite(c.log_probs) for group in groups for c in group.completions)


def reference_is_finite(groups: Iterable[Group], *, all_tokens: bool) -> bool:
    """Whether the reference's log-probabilities are finite, as far as this rank has any.

    A likelihood of NaN also means "no answer", so this checks the tokens of existing answers, or
    with `all_tokens` every token.
    """
    return all(
        _finite(asked_of_reference(completion, scored, all_tokens=all_tokens))
        for group in groups
        if group.reference_log_probs is not None
        for completion, scored in zip(group.completions, group.reference_log_probs, strict=True)
    )


def asked_of_reference(
    completion: Completion, scored: torch.Tensor, *, all_tokens: bool
) -> torch.Tensor:
    """Return the part of `scored` [C] that the reference had to score."""
    return scored if all_tokens else scored[slice(*(completion.answer_span or (0, 0)))]


def _finite(values: torch.Tensor) -> bool:
    return not bool(values.isfinite().logical_not().any())


def finite_or_none(value: Any) -> Any:
    """Return None for a float that is not finite, which JSON can't represent."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass
class BadSteps:
    """Counts the steps left out: the `total`, and those `in_a_row` up to the last step."""

    total: int = 0
    in_a_row: list[int] = field(default_factory=list)

    def note(self, step: int, *, bad: bool) -> None:
        """Count a step."""
        self.total += bad
        self.in_a_row = [*self.in_a_row, step] if bad else []

    def state_dict(self) -> dict[str, Any]:
        """Return the counts, for a resumed run."""
        return {"total": self.total, "in_a_row": list(self.in_a_row)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a `state_dict`; it is empty in checkpoints from before steps were counted."""
        self.total = state.get("total", 0)
        self.in_a_row = list(state.get("in_a_row", ()))
