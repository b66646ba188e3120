"""Every metric of a run, declared once: its meaning, its reduction, its panel in the report.

A new metric is one declaration here, and the place that sets it. `docs/metrics.md` is generated
from this file, the report's panels follow its order, and undeclared keys can't be recorded.
"""

from collections.abc import Iterable, Mapping
from typing import TypeVar

from nemo_care.runs.metric import Metric, Over, Panel, Pattern, Reduction, Sheet

M = TypeVar("M", bound=Metric)
V = TypeVar("V")

MEAN, SUM, MAX, NONE = Reduction.MEAN, Reduction.SUM, Reduction.MAX, Reduction.NONE

DECLARED: dict[str, Metric] = {}
"""By name, in the order of the page and of the report's panels."""

SECTIONS = {
    "reward": "Rewards",
    "rollout": "Completions and sampling",
    "care": "Consistency bonus and reference",
    "train": "The policy's update",
    "moe": "Experts in the update (only of models that have some)",
    "data": "Samples",
    "memory": "Memory",
    "timing": "Seconds on rank 0",
    "validation": "Validation (for the loggers; the run directory has `validation.jsonl`)",
}

_REWARD = Sheet("reward", "Reward, accuracy and consistency")
_CARE = Sheet("care", "Consistency bonus and reference")
_TRAINING = Sheet("training", "Training")
_COMPLETIONS = Sheet("completions", "Completions and groups")
_MACHINE = Sheet("machine", "Memory and saving")
SHEETS = (_REWARD, _CARE, _TRAINING, _COMPLETIONS, _MACHINE)

# Panels with several lines.
_REWARDS = Panel(_REWARD, "Reward", "mean reward")
_SAMPLED = Panel(_REWARD, "Sampled completions", "share", share=True)
_GROUPS = Panel(_COMPLETIONS, "Groups", "groups per step")
_DYNAMIC = Panel(_COMPLETIONS, "Dynamic sampling", "per step")
_DIFFERENCE = Panel(_COMPLETIONS, "Rollout against training", "log-probability difference")
_WEIGHTS = Panel(_COMPLETIONS, "Importance weights", "per token")
_SHARES = Panel(_CARE, "Completions", "share", share=True)
_LOADS = Panel(_TRAINING, "Load of the experts", "largest / mean")
_MEMORY = Panel(_MACHINE, "Memory of the largest rank", "GiB", smooth=False)


def declare(metric: M) -> M:
    """Register a metric.

    Raises:
        ValueError: the name is already registered.
    """
    if metric in DECLARED:
        raise ValueError(f"the metric {metric} is declared twice")
    DECLARED[metric] = metric
    return metric


def _metric(
    name: str,
    reduction: Reduction,
    over: Over,
    meaning: str,
    good: str = "",
    panel: Panel | None = None,
    label: str = "",
) -> Metric:
    return declare(Metric(name, reduction, over, meaning, good, panel, label))


# ------------------------------------------------------------------ rewards

TOTAL_REWARD = _metric(
    "reward/total", MEAN, Over.COMPLETIONS,
    "the weighted sum of the rewards, and the bonus", "rises", _REWARDS, "total",
)  # fmt: skip
FORMAT = _metric(
    "reward/format", MEAN, Over.COMPLETIONS,
    "the format reward, without its weight", "near 1 after the first steps", _REWARDS,
)  # fmt: skip
ACCURACY = _metric(
    "reward/accuracy", MEAN, Over.COMPLETIONS,
    "the accuracy reward, without its weight",
    "rises; at 0 or 1 from the start the questions are too hard or too easy", _SAMPLED,
)  # fmt: skip
OWN_REWARD = declare(
    Pattern(
        "reward/NAME", MEAN, Over.COMPLETIONS,
        "a reward function of the user, without its weight", "rises",
        Panel(_REWARD, "Own rewards", "mean reward"),
    )
)  # fmt: skip

# ------------------------------------------------------------------ completions and sampling

CONSISTENCY = _metric(
    "rollout/consistency_rate", MEAN, Over.WELL_FORMED,
    "the reasoning supports the answer given (with `evaluation.judge=rule` only)",
    "rises with the bonus", _SAMPLED, "consistency",
)  # fmt: skip
ENDED = _metric(
    "rollout/ended_rate", MEAN, Over.COMPLETIONS,
    "the completion ended before the limit",
    "near 1; if not, raise `rollout.max_completion_tokens`", _SAMPLED, "ended before the limit",
)  # fmt: skip
PROMPT_TOKENS = _metric(
    "rollout/prompt_tokens", MEAN, Over.COMPLETIONS, "tokens of the prompt, media included"
)
COMPLETION_TOKENS = _metric(
    "rollout/completion_tokens", MEAN, Over.COMPLETIONS,
    "tokens of the completion", "far from `rollout.max_completion_tokens`",
    Panel(_COMPLETIONS, "Length", "tokens per completion"), "mean",
)  # fmt: skip
ALL_RIGHT = _metric(
    "rollout/groups_all_right", SUM, Over.GROUPS,
    "all completions have accuracy 1", "few", _GROUPS, "all right",
)  # fmt: skip
ALL_WRONG = _metric(
    "rollout/groups_all_wrong", SUM, Over.GROUPS,
    "all completions have accuracy 0", "few", _GROUPS, "all wrong",
)  # fmt: skip
WITHOUT_SIGNAL = _metric(
    "rollout/groups_without_signal", SUM, Over.GROUPS,
    "all advantages are 0, so the group teaches nothing",
    "few; the console warns if all groups of the last steps were", _GROUPS, "without signal",
)  # fmt: skip
SET_ASIDE = _metric(
    "rollout/groups_set_aside", NONE, Over.STEP,
    "groups sampled but not trained on (`rollout.dynamic_sampling`)", "few", _GROUPS, "set aside",
)  # fmt: skip
ROUNDS = _metric(
    "rollout/rounds", NONE, Over.STEP,
    "rounds of sampling (`rollout.dynamic_sampling`)",
    "below `rollout.dynamic_sampling.max_rounds`", _DYNAMIC, "rounds",
)  # fmt: skip
GROUPS_SAMPLED = _metric(
    "rollout/groups_sampled", NONE, Over.STEP,
    "groups of all rounds (`rollout.dynamic_sampling`)",
    "near `algorithm.prompts_per_step`", _DYNAMIC, "groups",
)  # fmt: skip
STALENESS = _metric(
    "rollout/staleness", MAX, Over.ROUNDS,
    "optimizer steps between the weights that sampled and those at the start of the update "
    "(`rollout.asynchronous`)",
    "0 in the first step, then at most `rollout.max_staleness` times "
    "`algorithm.updates_per_rollout`",
    Panel(_COMPLETIONS, "Sampled ahead", "optimizer steps behind", smooth=False),
)  # fmt: skip
ENGINE_RESTARTS = _metric(
    "rollout/engine_restarts", SUM, Over.ROUNDS,
    "engines that died and were started again since the previous step (`rollout.backend=vllm`)",
    "0", Panel(_COMPLETIONS, "Engines started again", needs_more_than_zero=True), "restarts",
)  # fmt: skip
ROLLOUT_DIFFERENCE = _metric(
    "rollout/logprob_difference", MEAN, Over.TOKENS,
    "absolute difference of a token's log-probability between sampling and training",
    "below `rollout.max_logprob_difference`; above it in the first step the run stops",
    _DIFFERENCE, "difference",
)  # fmt: skip
ROLLOUT_DIFFERENCE_BY_STALENESS = declare(
    Pattern(
        "rollout/logprob_difference_stale_STEPS", MEAN, Over.TOKENS,
        "the same difference, of completions whose weights were this number of optimizer steps "
        "older (`rollout.asynchronous`)",
        "below 1 + STEPS times `rollout.max_logprob_difference`; above it the console warns",
        _DIFFERENCE,
    )
)  # fmt: skip
LARGEST_ROLLOUT_DIFFERENCE = _metric(
    "rollout/logprob_difference_max", MAX, Over.TOKENS, "the same difference",
    "no outliers",
)  # fmt: skip
IMPORTANCE = _metric(
    "rollout/importance_mean", MEAN, Over.TOKENS,
    "weight of the token's loss (`rollout.importance_sampling`)", "near 1",
    _WEIGHTS, "mean weight",
)  # fmt: skip
LARGEST_IMPORTANCE = _metric(
    "rollout/importance_max", MAX, Over.TOKENS,
    "ratio of the token's probabilities in training and sampling, before its cap", "near 1",
)  # fmt: skip
TRUNCATED = _metric(
    "rollout/importance_truncated", MEAN, Over.TOKENS,
    "the ratio is above `rollout.importance_sampling.cap`", "near 0",
    _WEIGHTS, "share above the cap",
)  # fmt: skip
EFFECTIVE_SAMPLES = _metric(
    "rollout/importance_ess", NONE, Over.STEP,
    "effective sample size of the weighted tokens, as a share of them: (sum w)^2 / (N sum w^2)",
    "near 1; at 0.5 half of the tokens would do as well without weights",
    _WEIGHTS, "effective sample size",
)  # fmt: skip

# ------------------------------------------------------------------ bonus and reference

ANSWER_LIKELIHOOD = _metric(
    "care/answer_likelihood", MEAN, Over.ANSWERS,
    "the answer's likelihood under the reference, clipped", "below the clip, or it selects nothing",
    Panel(_CARE, "Answer likelihood under the reference", "probability", share=True), "mean",
)  # fmt: skip
BONUS_RATE = _metric(
    "care/bonus_rate", MEAN, Over.COMPLETIONS, "the completion received a bonus above 0",
    "between 0 and the accuracy", _SHARES, "with the bonus",
)  # fmt: skip
CLIPPED_RATE = _metric(
    "care/clipped_rate", MEAN, Over.ANSWERS,
    "the likelihood is at `algorithm.consistency.likelihood_clip`",
    "low; near 1 the bonus hardly distinguishes completions", _SHARES, "likelihood at the clip",
)  # fmt: skip
MISSING_ANSWERS = _metric(
    "care/missing_answer_rate", MEAN, Over.COMPLETIONS,
    "the completion has no well-formed answer, or an empty one", "near 0", _SHARES,
    "without an answer",
)  # fmt: skip
UNSCORED_ANSWERS = _metric(
    "care/unscored_answer_rate", MEAN, Over.COMPLETIONS,
    "an answer without a likelihood, because its tokens were not found",
    "0; more than 5% of the answers end the run in its first step", _SHARES,
    "answer without a likelihood",
)  # fmt: skip
SELECTION_RATE = _metric(
    "care/selection_rate", MEAN, Over.CHOICES,
    "the bonus distinguishes accurate completions",
    "above 0; the console warns after 20 steps near 0",
    Panel(_CARE, "Groups in which the bonus selects", "share", share=True), "share",
)  # fmt: skip
EMA_DISTANCE = _metric(
    "care/ema_distance", NONE, Over.STEP,
    "distance between policy and reference, relative to the policy's norm",
    "small and steady: the reference follows",
    Panel(_CARE, "EMA reference", "relative distance to the policy", smooth=False), "distance",
)  # fmt: skip
REFERENCE_DIFFERENCE = _metric(
    "care/logprob_difference", MEAN, Over.REFERENCE_TOKENS,
    "absolute difference of a token's log-probability between reference and policy",
    "0 in the first step (above `algorithm.reference.max_logprob_difference` the run stops), small",
    Panel(_CARE, "Answers under reference and policy", "log-probability difference"), "difference",
)  # fmt: skip

# ------------------------------------------------------------------ update

LOSS = _metric(
    "train/loss", MEAN, Over.LOSS_TERMS, "the loss, the KL term included",
    "near 0 with one update per rollout: advantages have the mean 0",
    Panel(_TRAINING, "Loss", "loss", from_zero=False),
)  # fmt: skip
KL = _metric(
    "train/kl", MEAN, Over.TRAINED,
    "the KL term (k3) of the policy to the reference, without its coefficient "
    "(`algorithm.kl_coefficient`)", "grows slowly",
    Panel(_TRAINING, "KL to the reference", "nats per token"), "KL",
)  # fmt: skip
CLIPPED_FRACTION = _metric(
    "train/clipped_fraction", MEAN, Over.TRAINED,
    "clipping removes the token's gradient",
    "below 0.2; 0 with one update per rollout",
)  # fmt: skip
GRAD_NORM = _metric(
    "train/grad_norm", NONE, Over.UPDATE, "norm of the gradient before clipping",
    "no growth over the steps", Panel(_TRAINING, "Gradient norm", "norm before clipping"), "norm",
)  # fmt: skip
LEARNING_RATE = _metric(
    "train/lr", NONE, Over.UPDATE, "learning rate", "",
    Panel(_TRAINING, "Learning rate", "learning rate", smooth=False), "rate",
)  # fmt: skip
BAD_STEP = _metric(
    "train/bad_step", NONE, Over.STEP,
    "1 if the step was left out because of non-finite numbers", "0",
)  # fmt: skip
BAD_STEPS = _metric(
    "train/bad_steps", SUM, Over.STEPS, "steps left out so far", "0",
    Panel(
        _TRAINING, "Steps left out", "steps that were not finite", smooth=False,
        needs_more_than_zero=True,
    ),
    "so far",
)  # fmt: skip

# ------------------------------------------------------------------ experts

ROUTING_DIFFERENCE = _metric(
    "moe/routing_difference", MEAN, Over.ROUTES,
    "the update's router would choose other experts than while sampling, which are used all the "
    "same (`model.moe.routing_replay`)",
    "near 0: rounding alone; more with `rollout.asynchronous`, since the router has changed",
    Panel(_TRAINING, "Routing that differs from sampling", "share of tokens and layers"),
    "share",
)  # fmt: skip
LOAD_BALANCE = _metric(
    "moe/load_balance", MEAN, Over.LAYERS,
    "tokens of the layer's busiest expert over the mean of its experts, padding not counted",
    "steady; 1 is balanced, the number of experts over those of a token is the worst",
    _LOADS, "mean of the layers",
)  # fmt: skip
LARGEST_LOAD = _metric(
    "moe/load_balance_max", MAX, Over.LAYERS, "the same ratio", "steady",
    _LOADS, "layer with the largest",
)  # fmt: skip
LOAD_OF_LAYER = declare(
    Pattern(
        "moe/load_balance_layer_LAYER", NONE, Over.STEP,
        "the same ratio of one layer, counted from 0", "steady",
    )
)  # fmt: skip

# ------------------------------------------------------------------ samples

SKIPPED = _metric("data/skipped", NONE, Over.STEP, "samples that could not be used", "0")
WORKER_MEMORY = _metric(
    "data/worker_memory_gib", MAX, Over.REPLICAS,
    "peak GiB of a decoding process", "below `data.worker_memory_gib`",
)  # fmt: skip
BY_PYAV = _metric(
    "data/videos_by_pyav", SUM, Over.REPLICAS,
    "videos that PyAV read because decord could not", "0",
)  # fmt: skip

# ------------------------------------------------------------------ memory

PROCESS_MEMORY = _metric(
    "memory/process_gib", MAX, Over.RANKS, "GiB of the rank's process",
    "does not grow from step to step", _MEMORY, "process",
)  # fmt: skip
MEDIA_MEMORY = _metric(
    "memory/media_gib", MAX, Over.REPLICAS,
    "GiB of decoded frames that all ranks of a model replica hold together: the step's, and those "
    "decoded ahead", "the same for every group size and layout", _MEMORY, "frames of a replica",
)  # fmt: skip
GPU_MEMORY = _metric(
    "memory/gpu_gib", MAX, Over.RANKS, "peak GiB of the rank's GPU since the previous record",
    "below the GPU's memory, near the plan's estimate", _MEMORY, "GPU",
)  # fmt: skip

# ------------------------------------------------------------------ seconds

DATA_TIME = _metric(
    "timing/data", SUM, Over.ROUNDS, "waiting for prompts", "near 0; if not, raise `data.workers`"
)
ROLLOUT_TIME = _metric(
    "timing/rollout", SUM, Over.ROUNDS, "sampling, or waiting for rollouts sampled ahead"
)
REWARD_TIME = _metric("timing/reward", SUM, Over.ROUNDS, "reward functions", "near 0")
SCORING_TIME = _metric("timing/scoring", SUM, Over.ROUNDS, "the reference's pass, and credit")
UPDATE_TIME = _metric("timing/update", NONE, Over.STEP, "all updates of the step")
STEP_TIME = _metric("timing/step", NONE, Over.STEP, "the whole step, without saving")
DISTANCE_TIME = _metric(
    "timing/ema_distance", NONE, Over.STEP, f"measuring `{EMA_DISTANCE}`", "near 0"
)
CHECKPOINT_TIME = _metric(
    "timing/checkpoint", NONE, Over.STEP,
    "time that saving blocked the run since the previous record, usually for the previous step",
    "near 0 with `checkpoint.asynchronous`",
    Panel(
        _MACHINE, "Blocked by saving", "seconds", smooth=False, needs_more_than_zero=True
    ),
    "seconds",
)  # fmt: skip
PHASES = (ROLLOUT_TIME, REWARD_TIME, SCORING_TIME, UPDATE_TIME)
"""The phases that the report stacks; the rest of `STEP_TIME` belongs to none of them."""

# ------------------------------------------------------------------ validation

VALIDATION = declare(
    Pattern(
        "validation/LEVEL/NAME", MEAN, Over.LEVEL,
        "one of the results of a level (`docs/evaluation.md`)", "accuracy and consistency rise",
    )
)  # fmt: skip


def declaration(name: str) -> Metric | None:
    """Return the metric of this name, declared or matching a pattern; None if unknown."""
    if name in DECLARED:
        return DECLARED[name]
    patterns = (metric for metric in DECLARED.values() if isinstance(metric, Pattern))
    return next((found for pattern in patterns if (found := pattern.match(name))), None)


def checked(values: Mapping[Metric, V]) -> dict[str, V]:
    """Return the same values by plain names.

    Raises:
        KeyError: a metric that is not declared.
    """
    for name in values:
        if declaration(name) is None:
            raise KeyError(f"the metric {name} is not declared in {__name__}")
    return {str(name): value for name, value in values.items()}


def panels_of(sheet: Sheet, recorded: Iterable[str]) -> dict[Panel, list[Metric]]:
    """Return the sheet's panels, each with its metrics, in the order of declaration.

    A pattern stands for all metrics that it matches among `recorded`, the names in a run's records.
    """
    panels: dict[Panel, list[Metric]] = {}
    for metric in DECLARED.values():
        if metric.panel is None or metric.panel.sheet is not sheet:
            continue
        drawn = [metric]
        if isinstance(metric, Pattern):
            unknown = [name for name in recorded if name not in DECLARED]
            drawn = [found for name in unknown if (found := metric.match(name))]
        panels.setdefault(metric.panel, []).extend(drawn)
    return panels
