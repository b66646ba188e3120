"""The recipe's schema: every key, its type, its default and its range.

A recipe is a YAML file (see `recipes/`) merged over these dataclasses by Hydra and OmegaConf, so
an unknown key or a value of the wrong type is refused before anything starts. `check_recipe` then
checks ranges and the keys against each other. Sizes are counts, lengths are tokens unless said.
The keys under `data`, `evaluation`, `model`, `optimizer`, `rollout` and `rollout.vllm` lie in
`data_config.py`, `evaluation_config.py`, `model_config.py`, `rollout_config.py`, `vllm_config.py`.
"""

import math
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import PurePath
from typing import Any

from omegaconf import OmegaConf

from nemo_care.data_config import DATA_KINDS, MISSING, DataConfig, check_data
from nemo_care.errors import InputError
from nemo_care.evaluation_config import JUDGES, UNTAGGED, EvaluationConfig, check_evaluation
from nemo_care.model_config import FP8_RECIPES, ModelConfig, OptimizerConfig, check_model
from nemo_care.rollout_config import (
    ROLLOUT_RANGES,
    RolloutConfig,
    check_asynchronous,
    check_rollout,
)
from nemo_care.value_checks import check_values
from nemo_care.vllm_config import PLACEMENTS, ROLLOUT_BACKENDS

# What is usual; more ranks than that ask for more machines.
_RANKS_OF_A_MACHINE = 8


@dataclass
class TrainerConfig:
    """How long, on how many ranks, from which seed."""

    max_steps: int = MISSING  # type: ignore[assignment]
    """Steps of the whole run, each one rollout and algorithm.updates_per_rollout updates."""
    devices: int = 1
    """Ranks on one machine: GPUs, or processes where there is no GPU."""
    num_nodes: int = 1
    """Machines. More than one needs torchrun or srun to start the ranks."""
    cpu_threads: int = 1
    """Threads of each rank on a machine without GPUs; more only help models larger than tiny."""
    seed: int = 1234
    """Seed of data order and sampling."""
    resume: str = "auto"
    """auto: go on from the run directory's newest checkpoint; never: refuse if there is one."""
    validation_interval: int = 0
    """Validate every so many steps; 0: only before the first and after the last step."""
    max_time_per_run: str | None = None
    """days:hours:minutes:seconds after which the run saves and exits with status 75, to be started
    again; null: no limit."""
    max_bad_steps: int = 3
    """Steps in a row that may be left out because a log-probability, the loss or the gradient is
    NaN or infinite; one more stops the run. 0: the first stops it."""
    show_completion_every: int = 20
    """Print one sampled completion every so many steps; 0: never."""


@dataclass
class ConsistencyConfig:
    """The consistency bonus."""

    kind: str = "group"
    """Who gets it: group (the paper: those of a group's accurate completions whose answer is
    likely, compared with the others'), accurate (all of the accurate), dense (every completion
    with an answer, bonus_coefficient * answer likelihood each) or counterfactual (not in the paper:
    every completion with an answer, by how much likelier its answer is behind its own reasoning
    than behind the others'; may be negative)."""
    counterfactual_share: float = 1.0
    """Of kind=counterfactual: its share of the bonus; the rest is the paper's."""
    bonus_coefficient: float = 0.5
    """Size of the bonus relative to the accuracy; 0: no bonus (the GRPO baseline)."""
    margin: float = 0.01
    """How far below the mean answer likelihood a completion may lie and still get the bonus."""
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
    """Optimizer steps until which the reference stays what it was at the start."""
    ema_max_selection_rate: float = 1.0
    """The reference waits while the bonus tells accurate completions apart in a larger share of the
    groups than this (care/selection_rate); 1: it never waits, as in the paper. A step in which no
    group has two accurate answers, or without a bonus, does not wait either. For kind=group: a
    dense or counterfactual bonus hardly ever gives two completions the same, and so always waits.
    """
    offload: bool = False
    """Keep the reference in CPU memory and on the GPU only while it scores."""
    max_logprob_difference: float = 0.01
    """In the first step, where reference and policy are the same model, the mean difference
    between a token's log-probability in the scoring pass and in the update; above it the run stops,
    because one of the passes must be wrong."""


@dataclass
class AlgorithmConfig:
    """GRPO-CARE, and GRPO as its special case."""

    group_size: int = 8
    """G, completions per prompt."""
    prompts_per_step: int = 4
    """B, prompts per optimizer step over all ranks; a multiple of the data-parallel size."""
    groups_per_micro_batch: int = 1
    """Groups computed together; more is faster for tiny models and takes more memory."""
    shared_prompt: bool = True
    """Compute each prompt once for its group; false: once for each completion (the slow, simple
    way, for comparison)."""
    updates_per_rollout: int = 1
    """Optimizer steps on the same rollouts; above 1 the clipped surrogate applies."""
    clip_low: float = 0.2
    """The ratio is clipped below 1 - clip_low (several updates per rollout)."""
    clip_high: float = 0.2
    """The ratio is clipped above 1 + clip_high (several updates per rollout)."""
    advantage: str = "grpo"
    """How a completion's reward becomes its advantage: grpo (the paper: the reward's distance from
    the group's mean in standard deviations of the group)."""
    loss: str = "grpo"
    """The policy loss: grpo (the paper: clipped ratios, averaged over the tokens of each completion
    and then over all completions)."""
    kl_coefficient: float = 0.0
    """Weight of the k3 penalty against the reference; GRPO-CARE has none."""
    min_reasoning_words: int = 0
    """Words that the format reward asks for between the think tags; 0: the paper's reward."""
    rewards: list[str] = field(default_factory=lambda: ["accuracy", "format"])
    """Whose weighted sum is the base reward: accuracy, format, and functions of your own by import
    path, package.module.function (see docs/rewards.md)."""
    reward_weights: list[float] | None = None
    """A number for each of the rewards; 0: recorded but not counted; null: 1 each."""
    consistency: ConsistencyConfig = field(default_factory=ConsistencyConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)


@dataclass
class CheckpointConfig:
    """What is saved and when."""

    save_interval: int = 50
    """Steps between checkpoints; the last step is always saved."""
    asynchronous: bool = True
    """Training goes on while a copy of its state, in CPU memory, is written; false: it waits."""
    keep_last: int = 2
    """Newest checkpoints to keep; 0: all."""
    keep_every: int = 0
    """Keep besides each checkpoint whose step is a multiple of this; 0: none."""
    export: bool = True
    """Write a Hugging Face directory at the end of the run."""


@dataclass
class ExpManagerConfig:
    """NeMo's experiment manager: run directory and loggers."""

    explicit_log_dir: str | None = None
    """The run directory; null: exp_dir/name."""
    exp_dir: str | None = "runs"
    """Folder of run directories; null: nemo_experiments."""
    name: str | None = "default"
    """Name of the run directory there. Recipes that inherit base are called like their file, with
    the groups behind it that the command line chose (not the layout)."""
    create_tensorboard_logger: bool = True
    """Write TensorBoard files into the run directory."""
    create_wandb_logger: bool = False
    """Log to Weights & Biases, which needs its package."""
    wandb_logger_kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of that logger, such as project and name."""
    create_mlflow_logger: bool = False
    """Log to MLflow, which needs its package."""
    mlflow_logger_kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of that logger, such as experiment_name and tracking_uri."""


@dataclass
class Recipe:
    """Everything a run is made of."""

    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    data: DataConfig = field(default_factory=DataConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    exp_manager: ExpManagerConfig = field(default_factory=ExpManagerConfig)


def recipe_yaml(recipe: Recipe) -> str:
    """The resolved recipe as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(recipe))


def needs_reference(algorithm: AlgorithmConfig) -> bool:
    """Whether a training run keeps a reference: for the bonus or for the KL term."""
    return algorithm.consistency.bonus_coefficient > 0 or algorithm.kl_coefficient > 0


class _NamesIn(Collection[str]):
    """The keys of a table of the package, which is imported only when a recipe is checked.

    An entry added to the table is a choice of the recipe at once. (The tables hold functions on
    tensors, and importing torch takes seconds that a command's --help need not spend.)
    """

    def __init__(self, module: str, table: str) -> None:
        self._module = module
        self._table = table

    def _names(self) -> Collection[str]:
        return getattr(import_module(self._module), self._table)

    def __contains__(self, name: object) -> bool:
        return name in self._names()

    def __iter__(self) -> Iterator[str]:
        return iter(self._names())

    def __len__(self) -> int:
        return len(self._names())


CHOICES: dict[str, Collection[str]] = {
    "trainer.resume": ("auto", "never"),
    "model.backend": ("auto", "local", "transformer_engine"),
    "model.recompute_granularity": ("none", "selective", "full"),
    "model.precision.dtype": ("bf16", "fp32"),
    "model.precision.fp8.recipe": FP8_RECIPES,
    "model.precision.fp8.format": ("auto", "e4m3", "hybrid"),
    "algorithm.consistency.kind": _NamesIn("nemo_care.objective.bonuses", "BONUSES"),
    "algorithm.advantage": _NamesIn("nemo_care.objective.advantages", "ADVANTAGES"),
    "algorithm.loss": _NamesIn("nemo_care.objective.losses", "LOSSES"),
    "rollout.backend": ROLLOUT_BACKENDS,
    "rollout.vllm.placement": PLACEMENTS,
    "optimizer.schedule": ("cosine", "constant"),
    "evaluation.judge": JUDGES,
    "evaluation.untagged": UNTAGGED,
    "data.train.kind": DATA_KINDS,
    "data.validation.kind": DATA_KINDS,
}

# Bounds, themselves allowed; None is no bound.
RANGES: dict[str, tuple[float | None, float | None]] = {
    "trainer.max_steps": (1, None),
    "trainer.devices": (1, None),
    "trainer.num_nodes": (1, None),
    "trainer.cpu_threads": (1, None),
    "trainer.seed": (0, None),
    "trainer.validation_interval": (0, None),
    "trainer.max_bad_steps": (0, None),
    "trainer.show_completion_every": (0, None),
    "model.tensor_model_parallel_size": (1, None),
    "model.pipeline_model_parallel_size": (1, None),
    "model.precision.fp8.bf16_first_layers": (0, None),
    "model.precision.fp8.bf16_last_layers": (0, None),
    "algorithm.group_size": (2, None),
    "algorithm.prompts_per_step": (1, None),
    "algorithm.groups_per_micro_batch": (1, None),
    "algorithm.updates_per_rollout": (1, None),
    "algorithm.clip_low": (0, 1),
    "algorithm.clip_high": (0, None),
    "algorithm.kl_coefficient": (0, None),
    "algorithm.min_reasoning_words": (0, None),
    "algorithm.consistency.bonus_coefficient": (0, None),
    "algorithm.consistency.counterfactual_share": (0, 1),
    "algorithm.consistency.margin": (0, 1),
    "algorithm.consistency.likelihood_clip": (0, 1),
    "algorithm.consistency.accuracy_threshold": (0, 1),
    "algorithm.reference.ema_decay": (0, 1),
    "algorithm.reference.ema_update_every": (0, None),
    "algorithm.reference.ema_start_step": (0, None),
    "algorithm.reference.ema_max_selection_rate": (0, 1),
    "algorithm.reference.max_logprob_difference": (0, None),
    **ROLLOUT_RANGES,
    "optimizer.lr": (0, None),
    "optimizer.min_lr": (0, None),
    "optimizer.warmup_steps": (0, None),
    "optimizer.decay_steps": (1, None),
    "optimizer.weight_decay": (0, None),
    "optimizer.beta1": (0, 1),
    "optimizer.beta2": (0, 1),
    "optimizer.eps": (0, None),
    "optimizer.clip_grad": (1e-9, None),
    "checkpoint.save_interval": (1, None),
    "checkpoint.keep_last": (0, None),
    "checkpoint.keep_every": (0, None),
    "data.video.fps": (1e-3, None),
    "data.video.min_frames": (2, None),
    "data.video.max_frames": (2, None),
    "data.video.min_pixels": (784, None),
    "data.video.max_pixels": (784, None),
    "data.image.min_pixels": (784, None),
    "data.image.max_pixels": (784, None),
    "data.validation.samples_per_level": (1, None),
    "data.validation.max_frames": (2, None),
    "data.max_prompt_tokens": (1, None),
    "data.max_skipped_fraction": (0, 1),
    "data.workers": (0, None),
    "data.prefetch_steps": (1, None),
    "data.seconds_per_sample": (1e-3, None),
    "data.worker_memory_gib": (0.25, None),
    "evaluation.temperature": (0, None),
    "evaluation.top_p": (1e-6, 1),
    "evaluation.samples_per_batch": (1, None),
    "evaluation.llm.temperature": (0, None),
    "evaluation.llm.concurrency": (1, None),
    "evaluation.llm.max_retries": (0, None),
    "evaluation.llm.timeout_seconds": (1e-3, None),
}


def _value(recipe: Recipe, key: str) -> Any:
    value: Any = recipe
    for part in key.split("."):
        value = getattr(value, part)
    return value


def check_recipe(recipe: Recipe) -> None:
    """Check values, ranges, and keys against each other.

    Raises:
        InputError: names the key, its value and what it may be.
    """
    check_values(recipe)
    for key, choices in CHOICES.items():
        if _value(recipe, key) not in choices:
            raise InputError(f"{key}={_value(recipe, key)}: choose {' or '.join(choices)}")
    for key, (low, high) in RANGES.items():
        value = _value(recipe, key)
        if value is None:
            continue
        if (low is not None and value < low) or (high is not None and value > high):
            bounds = f"at least {low:g}" if high is None else f"between {low:g} and {high:g}"
            raise InputError(f"{key}={value}: must be {bounds}")
    _check_together(recipe)


_DURATION = re.compile(r"(\d+):(\d\d):(\d\d):(\d\d)")


def seconds_of(duration: str) -> float:
    """Seconds of "days:hours:minutes:seconds", NeMo's way to write a duration.

    Raises:
        InputError: it is written otherwise.
    """
    match = _DURATION.fullmatch(duration)
    if match is None:
        raise InputError(
            f"trainer.max_time_per_run={duration}: write days:hours:minutes:seconds, such as "
            "00:03:45:00"
        )
    days, hours, minutes, seconds = map(int, match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def _check_together(recipe: Recipe) -> None:
    if recipe.trainer.max_time_per_run is not None:
        seconds_of(recipe.trainer.max_time_per_run)
    from nemo_care.objective.bonuses import BONUSES

    kind = recipe.algorithm.consistency.kind
    if not recipe.algorithm.shared_prompt and BONUSES[kind].needs_pairs:
        raise InputError(
            f"algorithm.consistency.kind={kind} scores every answer behind every reasoning "
            "of its group, which needs algorithm.shared_prompt=true"
        )
    name = PurePath(recipe.exp_manager.name or "default")
    if name.is_absolute() or ".." in name.parts or not name.parts:
        raise InputError(
            f"exp_manager.name={name}: must be a folder inside exp_manager.exp_dir; another place "
            "for the run directory is exp_manager.explicit_log_dir"
        )
    check_data(recipe.data)
    check_evaluation(recipe.evaluation)
    check_model(recipe.model)
    check_rollout(recipe.rollout)


def check_world(recipe: Recipe) -> None:
    """Check that the ranks make whole replicas of a model that the layout divides.

    Raises:
        InputError: names the keys and what would fit.
    """
    trainer, model = recipe.trainer, recipe.model
    tensor, pipeline = model.tensor_model_parallel_size, model.pipeline_model_parallel_size
    world, ranks = trainer.devices * trainer.num_nodes, tensor * pipeline
    if world % ranks == 0:
        return
    nodes = math.lcm(trainer.devices, ranks) // trainer.devices
    remedy = (
        f"trainer.devices={ranks}"
        if trainer.num_nodes == 1 and trainer.devices < ranks <= _RANKS_OF_A_MACHINE
        else f"trainer.num_nodes={nodes} (or a multiple)"
    )
    raise InputError(
        f"trainer.devices * trainer.num_nodes = {trainer.devices} * {trainer.num_nodes} = {world} "
        "ranks are not a multiple of model.tensor_model_parallel_size * "
        f"model.pipeline_model_parallel_size = {tensor} * {pipeline} = {ranks}: set {remedy}, or "
        f"two sizes whose product divides {world}"
    )


def check_training(recipe: Recipe) -> None:
    """Check what only a training run needs, beyond `check_recipe` and `check_world`.

    Raises:
        InputError: names the key, its value and what it may be.
    """
    model, world = recipe.model, recipe.trainer.devices * recipe.trainer.num_nodes
    replicas = world // (model.tensor_model_parallel_size * model.pipeline_model_parallel_size)
    if recipe.algorithm.prompts_per_step % replicas:
        raise InputError(
            f"algorithm.prompts_per_step={recipe.algorithm.prompts_per_step} is not a multiple of "
            f"the data-parallel size {replicas}"
        )
    if recipe.data.train.root is None and recipe.data.train.sources is None:
        raise InputError(
            "data.train.root has no value: give it, or data.train.sources, in the recipe or as "
            "an override"
        )
    if recipe.evaluation.judge == "likelihood" and not needs_reference(recipe.algorithm):
        raise InputError(
            "evaluation.judge=likelihood judges with the run's reference, and this run has none: "
            "algorithm.consistency.bonus_coefficient and algorithm.kl_coefficient are 0; choose "
            "another judge, or validate with nemo-care evaluate and evaluation.reference"
        )
    check_asynchronous(recipe.rollout)
