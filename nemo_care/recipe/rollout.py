"""The keys under `rollout` of the recipe's schema, their ranges and checks (see schema.py)."""

from dataclasses import dataclass, field

from nemo_care.errors import InputError
from nemo_care.recipe.vllm import VLLMConfig, check_vllm


@dataclass
class ImportanceSamplingConfig:
    """Truncated importance sampling, for a sampler whose numbers differ from the trainer's (other
    kernels, 8 bits): each token's loss, its KL term excepted, is multiplied by
    min(pi_trainer / pi_rollout, cap), both before the update, without a gradient. Metrics:
    `rollout/importance_mean` (mean weight of the tokens), `rollout/importance_max` (largest ratio
    before the cap) and `rollout/importance_truncated` (share of tokens above the cap). The ratio is
    that of the models at temperature 1 and without top_p. So it asks for rollout.temperature=1; and
    it mends what kernels change, not what rollout.top_p leaves out: sampling among the likeliest
    tokens stays the approximation that it is without this switch."""

    enabled: bool = False
    """Weight the tokens."""
    cap: float = 2.0
    """Largest weight; it bounds what a token that the sampler found very unlikely can do."""


@dataclass
class DynamicSamplingConfig:
    """Dynamic sampling (DAPO, arXiv 2503.14476): a step samples round after round of
    algorithm.prompts_per_step prompts until so many groups have a signal, which is an advantage
    that is not 0, the bonus included. It trains on the first of these in the order of the data; the
    other groups are set aside, marked `used: false` in rollouts/. Where max_rounds give too few,
    groups without a signal fill the step up. Metrics: `rollout/rounds`, `rollout/groups_sampled`
    and `rollout/groups_set_aside`. The metrics of rewards, answers, lengths and groups describe all
    that was sampled, as they do without this switch, or the policy would look as if it were never
    sure; train/*, the differences of log-probabilities and importance_* describe what was trained
    on. An epoch has fewer steps, and `nemo-care plan` counts one round."""

    enabled: bool = False
    """Sample on until enough groups have a signal."""
    max_rounds: int = 4
    """Rounds of a step at most, the first included."""


@dataclass
class RolloutConfig:
    """Sampling completions."""

    backend: str = "megatron"
    """Who samples: megatron (the training ranks themselves; needs nothing) or vllm (vLLM's engines,
    which get the weights after each update)."""
    temperature: float = 1.0
    """Divides the logits before sampling."""
    top_p: float = 0.95
    """Sample among the likeliest tokens that hold this much probability together; 1: among all."""
    max_completion_tokens: int = 768
    """A longer completion is cut off; without a closing tag it has no format reward."""
    truncated: str = "keep"
    """What a completion that was cut off is to the update: keep (like any other), mask (it counts
    in its group's mean reward, but neither in the loss nor in the loss's mean) or penalise (a
    reward from 0 to -1, `reward/length_penalty`, is added where a completion comes near
    max_completion_tokens). See docs/objectives.md."""
    length_penalty_share: float = 0.2
    """Of truncated=penalise: the last share of max_completion_tokens, in which the penalty grows
    from 0 to -1 (DAPO: 4096 of 20480 tokens)."""
    groups_per_batch: int = 1
    """Groups that are generated together; vllm finds out by itself."""
    max_logprob_difference: float = 0.05
    """The mean difference between a token's log-probability in rollout and in training. Above it
    the first step stops the run, because weights or positions must be wrong on one side; later
    steps are told on the console, but not those whose rollout/staleness is above 0: older weights
    differ too."""
    record_log_probs: bool = False
    """Write the text and the log-probability of each token of a completion into rollouts/, by which
    `nemo-care view` tints it. The files get about four times as large."""
    importance_sampling: ImportanceSamplingConfig = field(default_factory=ImportanceSamplingConfig)
    dynamic_sampling: DynamicSamplingConfig = field(default_factory=DynamicSamplingConfig)
    asynchronous: bool = False
    """Needs backend=vllm and vllm.placement=separate: while a step is rewarded, scored and trained,
    the engines sample the next step's prompts, with the weights from before its update. From the
    second step on completions are so one step older than the policy, which importance_sampling can
    correct; a resumed run is not bit-equal to an uninterrupted one (see docs/vllm.md). Metrics:
    `rollout/staleness`, the optimizer steps between the weights that sampled a step's groups (the
    oldest of its rounds) and those that its update starts from: 0 in the first step, then
    algorithm.updates_per_rollout; and `timing/rollout` is then the time that the step has waited
    for completions and for the engines to take weights and the next prompts."""
    vllm: VLLMConfig = field(default_factory=VLLMConfig)


TRUNCATED = ("keep", "mask", "penalise")

# As config.RANGES.
ROLLOUT_RANGES: dict[str, tuple[float | None, float | None]] = {
    "rollout.temperature": (1e-3, None),
    "rollout.top_p": (1e-6, 1),
    "rollout.max_completion_tokens": (1, None),
    "rollout.length_penalty_share": (1e-3, 1),
    "rollout.groups_per_batch": (1, None),
    "rollout.max_logprob_difference": (0, None),
    "rollout.importance_sampling.cap": (1, None),
    "rollout.dynamic_sampling.max_rounds": (1, None),
    "rollout.vllm.tensor_parallel_size": (1, None),
    "rollout.vllm.gpu_memory_utilization": (0.01, 1),
    "rollout.vllm.kv_cache_gib": (1e-3, None),
    "rollout.vllm.sleep_level": (0, 2),
    "rollout.vllm.bucket_mib": (1, None),
    "rollout.vllm.timeout_seconds": (1, None),
}


def check_rollout(rollout: RolloutConfig) -> None:
    """Check the keys under `rollout` against each other.

    Raises:
        InputError: names the keys and what they may be.
    """
    # The generator's log-probabilities are those at temperature 1. At another one the tokens come
    # from other distributions, whose ratio theirs is not.
    if rollout.importance_sampling.enabled and rollout.temperature != 1:
        raise InputError(
            f"rollout.temperature={rollout.temperature:g}: rollout.importance_sampling compares "
            "sampler and trainer at temperature 1; set rollout.temperature=1, or "
            "rollout.importance_sampling.enabled=false"
        )
    if rollout.backend == "vllm":
        check_vllm(rollout.vllm)


def check_asynchronous(rollout: RolloutConfig) -> None:
    """Check that the engines of a training run can sample while it trains.

    An evaluation with the recipe of such a run may have any backend, so this is not of
    `check_rollout`.

    Raises:
        InputError: names the keys and what they may be.
    """
    if not rollout.asynchronous:
        return
    if rollout.backend != "vllm" or rollout.vllm.placement != "separate":
        raise InputError(
            f"rollout.asynchronous=true with rollout.backend={rollout.backend} and "
            f"rollout.vllm.placement={rollout.vllm.placement}: sampling beside training needs GPUs "
            "of its own; set rollout.backend=vllm and rollout.vllm.placement=separate, or "
            "rollout.asynchronous=false"
        )
