"""The keys under `algorithm` of the recipe."""

from dataclasses import dataclass, field


@dataclass
class ConsistencyConfig:
    """The consistency bonus."""

    kind: str = "group"
    """Which completions receive the bonus: group (the paper: of a group's accurate completions,
    those with a likely answer compared with the rest), accurate (all accurate completions), dense
    (every completion with an answer, bonus_coefficient * answer likelihood each) or counterfactual
    (not in the paper: every completion with an answer, by how much likelier its answer is given its
    own reasoning than given the reasonings of the rest of its group; can be negative)."""
    counterfactual_share: float = 1.0
    """For kind=counterfactual: its share of the bonus; the rest is the paper's bonus."""
    bonus_coefficient: float = 0.5
    """Size of the bonus relative to the accuracy; 0: no bonus (the GRPO baseline)."""
    margin: float = 0.01
    """How far below the mean answer likelihood a completion can be and still get the bonus."""
    likelihood_clip: float = 0.95
    """Upper bound of the answer likelihood."""
    accuracy_threshold: float = 0.1
    """A completion counts as accurate above this (and at or above its group's mean)."""


@dataclass
class ReferenceConfig:
    """The slowly moving reference model."""

    ema_decay: float = 0.995
    """Share of the old reference that an update keeps."""
    ema_update_every: int = 10
    """Optimizer steps between updates; 0: the reference stays frozen."""
    ema_start_step: int = 0
    """Number of optimizer steps during which the reference keeps its initial weights."""
    ema_max_selection_rate: float = 1.0
    """Skip the reference's update if the bonus separates accurate completions in a larger share of
    the groups than this (care/selection_rate); 1: never skip, as in the paper. A step without a
    bonus, or in which no group has two accurate answers, is not skipped either. For kind=group: a
    dense or counterfactual bonus hardly ever gives two completions the same value, so it would
    always skip.
    """
    offload: bool = False
    """Keep the reference in CPU memory, and on the GPU only while it scores."""
    max_logprob_difference: float = 0.01
    """Limit for the mean absolute difference between a token's log-probability in the scoring pass
    and in the update. Checked in the first step, where reference and policy are the same model;
    above
    it the run stops, because one of the passes must be wrong."""


@dataclass
class AlgorithmConfig:
    """GRPO-CARE, with GRPO as a special case."""

    group_size: int = 8
    """G, the number of completions per prompt."""
    prompts_per_step: int = 4
    """B, the number of prompts per optimizer step over all ranks; a multiple of the data-parallel
    size."""
    groups_per_micro_batch: int = 1
    """Groups per micro-batch; more is faster for tiny models and takes more memory."""
    shared_prompt: bool = True
    """Compute each prompt once for its group; false: once for each completion (slow and simple,
    for comparison)."""
    updates_per_rollout: int = 1
    """Optimizer steps on the same rollouts; above 1 the clipped surrogate applies."""
    clip_low: float = 0.2
    """The ratio is clipped below 1 - clip_low (several updates per rollout)."""
    clip_high: float = 0.2
    """The ratio is clipped above 1 + clip_high (several updates per rollout)."""
    advantage: str = "grpo"
    """How rewards become advantages: grpo (the paper: the reward's distance from the group's mean
    in standard deviations of the group), dr_grpo (the distance itself) or rloo (the distance from
    the mean of the remaining completions). See docs/objectives.md."""
    loss: str = "grpo"
    """The policy loss: grpo (the paper: clipped ratios, averaged over the tokens of each completion
    and then over all completions), token_mean (DAPO: averaged over all tokens of the step), dr_grpo
    (summed over the tokens of each completion and divided by rollout.max_completion_tokens), gspo
    (one ratio per completion; equals grpo with updates_per_rollout=1) or cispo (clipped ratios as
    weights of the log-probabilities, averaged over all tokens; has the gradient of token_mean with
    updates_per_rollout=1). See docs/objectives.md."""
    kl_coefficient: float = 0.0
    """Weight of the k3 penalty against the reference; GRPO-CARE has none."""
    min_reasoning_words: int = 0
    """Words that the format reward requires between the think tags; 0: the paper's reward."""
    rewards: list[str] = field(default_factory=lambda: ["accuracy", "format"])
    """Rewards whose weighted sum is the base reward: accuracy, format, and your own functions by
    import path, package.module.function (see docs/rewards.md)."""
    reward_weights: list[float] | None = None
    """One weight per reward; 0: recorded but not counted; null: all 1."""
    consistency: ConsistencyConfig = field(default_factory=ConsistencyConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
