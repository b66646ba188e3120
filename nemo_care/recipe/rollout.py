"""The keys under `rollout` of the recipe's schema, and their checks (see schema.py)."""

from dataclasses import dataclass, field

from nemo_care.errors import InputError
from nemo_care.recipe.vllm import VLLMConfig, check_vllm


@dataclass
class ImportanceSamplingConfig:
    """Truncated importance sampling, for a sampler whose numbers differ from the trainer's
    (different kernels, 8 bits): each token's loss, except its KL term, is multiplied by
    min(pi_trainer / pi_rollout, cap), both before the update, without a gradient. Metrics:
    `rollout/importance_mean` (mean weight of the tokens), `rollout/importance_max` (largest ratio
    before the cap), `rollout/importance_truncated` (share of tokens above the cap) and
    `rollout/importance_ess` (effective sample size of the tokens, as a share). The ratio is that of
    the models at temperature 1 and without top_p, so it requires rollout.temperature=1. It
    corrects for differences between kernels, not for rollout.top_p: sampling among the likeliest
    tokens remains an approximation, as without this switch."""

    enabled: bool = False
    """Weight the tokens."""
    cap: float = 2.0
    """Largest weight; limits the effect of a token that the sampler found very unlikely."""


@dataclass
class DynamicSamplingConfig:
    """Dynamic sampling (DAPO, arXiv 2503.14476): a step samples rounds of
    algorithm.prompts_per_step prompts until that number of groups has a signal, which is a nonzero
    advantage, bonus included. It trains on the first of these in the order of the data; the
    remaining groups are set aside, marked `used: false` in rollouts/. If max_rounds give too few,
    groups without a signal complete the step. Metrics: `rollout/rounds`, `rollout/groups_sampled`
    and `rollout/groups_set_aside`. The metrics of rewards, answers, lengths and groups describe
    everything that was sampled, as without this switch; otherwise the policy would seem never to be
    certain. train/*, the differences of log-probabilities and importance_* describe what was
    trained on. An epoch has fewer steps, and `nemo-care plan` counts one round."""

    enabled: bool = False
    """Continue sampling until enough groups have a signal."""
    max_rounds: int = 4
    """Largest number of rounds per step, the first included."""


@dataclass
class RolloutConfig:
    """Sampling completions."""

    backend: str = "megatron"
    """megatron (the training ranks sample; needs nothing else) or vllm (vLLM engines sample, and
    receive the weights after each update)."""
    temperature: float = 1.0
    """Divides the logits before sampling."""
    top_p: float = 0.95
    """Sample among the likeliest tokens that together hold this probability; 1: among all."""
    max_completion_tokens: int = 768
    """Longer completions are cut off; without a closing tag they get no format reward."""
    truncated: str = "keep"
    """How the update treats a completion that was cut off: keep (as any completion), mask (it
    counts in its group's mean reward, but neither in the loss nor in the loss's mean) or penalise
    (adds a reward from 0 to -1, `reward/length_penalty`, when a completion approaches
    max_completion_tokens). See docs/objectives.md."""
    length_penalty_share: float = 0.2
    """For truncated=penalise: the last share of max_completion_tokens, in which the penalty grows
    from 0 to -1 (DAPO: 4096 of 20480 tokens)."""
    groups_per_batch: int = 1
    """Number of groups generated together; vllm chooses it by itself."""
    cuda_graphs: bool = False
    """For backend=megatron: decode in steps of a fixed shape, which CUDA captures once for each
    batch and replays, instead of launching every kernel for every token. Completions
    that have ended are computed until all have ended. On a CPU the steps run without being captured
    and give the same tokens. Not with 8-bit rollouts. Not run on a GPU yet."""
    max_logprob_difference: float = 0.05
    """Limit for the mean absolute difference between a token's log-probability in rollout and in
    training. Above it the first step stops the run, because weights or positions must be wrong on
    one side. Later steps are reported in the console. Weights that are s optimizer steps older
    (rollout/staleness) differ by themselves, so their completions have 1 + s times this limit."""
    record_log_probs: bool = False
    """Write the text and log-probability of each token of a completion to rollouts/, for the tints
    of `nemo-care view`. The files get about four times as large."""
    importance_sampling: ImportanceSamplingConfig = field(default_factory=ImportanceSamplingConfig)
    dynamic_sampling: DynamicSamplingConfig = field(default_factory=DynamicSamplingConfig)
    asynchronous: bool = False
    """Sample the next step's prompts while a step is rewarded, scored and trained, with the weights
    from before its update. Requires backend=vllm and vllm.placement=separate. From the second step
    on, completions are older than the policy, which importance_sampling can correct; a resumed run
    is not bit-equal to an uninterrupted one (see docs/vllm.md). Metrics:
    `rollout/staleness`, the optimizer steps between the weights that sampled a step's groups (the
    oldest of its rounds) and those that its update starts from: 0 in the first step, then at most
    max_staleness * algorithm.updates_per_rollout; `timing/rollout` is then the time that the step
    has waited for completions, and for the engines to receive the weights and the next prompts."""
    max_staleness: int = 1
    """With asynchronous: the number of steps that engines are ahead. They get the prompts of this
    number of steps together, and new weights when all are sampled, so completions are at most this
    many steps older than the policy. Above 1, weights are sent less often and a slow completion
    delays training less, but more completions are older."""
    vllm: VLLMConfig = field(default_factory=VLLMConfig)

    @property
    def masks_truncated(self) -> bool:
        """Whether completions that were cut off get no advantage and no part in the loss."""
        return self.truncated == "mask"


def check_rollout(rollout: RolloutConfig) -> None:
    """Check the keys under `rollout` against each other."""
    # The generator's log-probabilities are at temperature 1. At any other temperature the tokens
    # come from different distributions, for which their ratio is wrong.
    if rollout.importance_sampling.enabled and rollout.temperature != 1:
        raise InputError(
            f"rollout.temperature={rollout.temperature:g}: rollout.importance_sampling compares "
            "sampler and trainer at temperature 1; set rollout.temperature=1, or "
            "rollout.importance_sampling.enabled=false"
        )
    if rollout.backend == "vllm":
        if rollout.cuda_graphs:
            raise InputError(
                "rollout.cuda_graphs=true is for rollout.backend=megatron; vllm captures graphs "
                "unless rollout.vllm.enforce_eager=true: set it to false"
            )
        check_vllm(rollout.vllm)


def check_asynchronous(rollout: RolloutConfig) -> None:
    """Check that the engines of a training run can sample while it trains.

    An evaluation with the recipe of such a run can use any backend, so this is not part of
    `check_rollout`.
    """
    if not rollout.asynchronous:
        return
    if rollout.backend != "vllm" or rollout.vllm.placement != "separate":
        raise InputError(
            f"rollout.asynchronous=true with rollout.backend={rollout.backend} and "
            f"rollout.vllm.placement={rollout.vllm.placement}: sampling during training needs "
            "separate GPUs; set rollout.backend=vllm and rollout.vllm.placement=separate, or "
            "rollout.asynchronous=false"
        )
