"""The keys under `rollout` of the recipe's schema, and their ranges (see config.py)."""

from dataclasses import dataclass


@dataclass
class RolloutConfig:
    """Sampling completions."""

    temperature: float = 1.0
    """Divides the logits before sampling."""
    top_p: float = 0.95
    """Sample among the likeliest tokens that hold this much probability together; 1: among all."""
    max_completion_tokens: int = 768
    """A longer completion is cut off; without a closing tag it has no format reward."""
    groups_per_batch: int = 1
    """Groups that are generated together."""
    max_logprob_difference: float = 0.05
    """The mean difference between a token's log-probability in rollout and in training. Above it
    the first step stops the run, because weights or positions must be wrong on one side; later
    steps are told on the console."""


# As config.RANGES.
ROLLOUT_RANGES: dict[str, tuple[float | None, float | None]] = {
    "rollout.temperature": (1e-3, None),
    "rollout.top_p": (1e-6, 1),
    "rollout.max_completion_tokens": (1, None),
    "rollout.groups_per_batch": (1, None),
    "rollout.max_logprob_difference": (0, None),
}
