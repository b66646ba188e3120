"""The recipe's schema: every key, its type, its default and its range.

A recipe is a YAML file (see `recipes/`) merged over these dataclasses by Hydra and OmegaConf, so
an unknown key or a value of the wrong type is rejected before anything starts. `check_recipe` then
checks ranges and the keys against each other. Each `check_...` raises an InputError that names the
key, its value and the allowed values. Sizes are counts and lengths are tokens unless stated. Each
file beside this one holds the keys of one part, such as `algorithm.py`.
"""

import math
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from operator import attrgetter
from pathlib import PurePath

from omegaconf import OmegaConf

from nemo_care.errors import InputError
from nemo_care.recipe.algorithm import AlgorithmConfig
from nemo_care.recipe.data import DATA_KINDS, DataConfig, check_data
from nemo_care.recipe.evaluation import JUDGES, EvaluationConfig, check_evaluation, judged_by
from nemo_care.recipe.model import (
    FP8_RECIPES,
    ModelConfig,
    OptimizerConfig,
    check_model,
    expert_tensor_size,
)
from nemo_care.recipe.rollout import RolloutConfig, check_asynchronous, check_rollout
from nemo_care.recipe.trainer import CheckpointConfig, ExpManagerConfig, TrainerConfig
from nemo_care.recipe.values import check_values

# The usual number; more ranks suggest more machines.
_RANKS_OF_A_MACHINE = 8


@dataclass
class Recipe:
    """The complete description of a run."""

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
    """Return the resolved recipe as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(recipe))


def needs_reference(algorithm: AlgorithmConfig) -> bool:
    """Whether a training run keeps a reference: for the bonus or for the KL term."""
    return algorithm.consistency.bonus_coefficient > 0 or algorithm.kl_coefficient > 0


class _NamesIn(Collection[str]):
    """The keys of a table of the package, which is imported only when a recipe is checked.

    An entry added to the table is immediately a choice of the recipe. (The tables hold functions on
    tensors, and importing torch takes seconds that a command's --help should not need.)
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
    "rollout.backend": ("megatron", "vllm"),
    "rollout.truncated": ("keep", "mask", "penalise"),
    "rollout.vllm.placement": ("colocated", "separate"),
    "optimizer.schedule": ("cosine", "constant"),
    "evaluation.judge": JUDGES,
    "evaluation.untagged": ("wrong", "whole_text"),
    "data.train.kind": DATA_KINDS,
    "data.validation.kind": DATA_KINDS,
}

# Inclusive bounds; None is no bound.
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
    "model.expert_model_parallel_size": (1, None),
    "model.expert_tensor_parallel_size": (1, None),
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
    "rollout.temperature": (1e-3, None),
    "rollout.top_p": (1e-6, 1),
    "rollout.max_completion_tokens": (1, None),
    "rollout.length_penalty_share": (1e-3, 1),
    "rollout.groups_per_batch": (1, None),
    "rollout.max_logprob_difference": (0, None),
    "rollout.max_staleness": (1, None),
    "rollout.importance_sampling.cap": (1, None),
    "rollout.dynamic_sampling.max_rounds": (1, None),
    "rollout.vllm.tensor_parallel_size": (1, None),
    "rollout.vllm.gpu_memory_utilization": (0.01, 1),
    "rollout.vllm.kv_cache_gib": (1e-3, None),
    "rollout.vllm.sleep_level": (0, 2),
    "rollout.vllm.bucket_mib": (1, None),
    # Below the limit of collectives: ranks wait in one for the engine (ranks/process_groups.py).
    "rollout.vllm.timeout_seconds": (1, 6000),
    "rollout.vllm.engines": (1, None),
    "rollout.vllm.max_restarts": (0, None),
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
    "data.cache_gib": (1e-3, None),
    "evaluation.temperature": (0, None),
    "evaluation.top_p": (1e-6, 1),
    "evaluation.samples_per_batch": (1, None),
    "evaluation.peer_probe": (0, None),
    "evaluation.llm.temperature": (0, None),
    "evaluation.llm.concurrency": (1, None),
    "evaluation.llm.max_retries": (0, None),
    "evaluation.llm.timeout_seconds": (1e-3, None),
}


def check_recipe(recipe: Recipe) -> None:
    """Check values, ranges, and keys against each other."""
    check_values(recipe)
    for key, choices in CHOICES.items():
        value = attrgetter(key)(recipe)
        if value not in choices:
            raise InputError(f"{key}={value}: choose {' or '.join(choices)}")
    for key, (low, high) in RANGES.items():
        value = attrgetter(key)(recipe)
        if value is None:
            continue
        if (low is not None and value < low) or (high is not None and value > high):
            bounds = f"at least {low:g}" if high is None else f"between {low:g} and {high:g}"
            raise InputError(f"{key}={value}: must be {bounds}")
    _check_together(recipe)


_DURATION = re.compile(r"(\d+):(\d\d):(\d\d):(\d\d)")


def seconds_of(duration: str) -> float:
    """Return the seconds of "days:hours:minutes:seconds", NeMo's format of a duration.

    Raises:
        InputError: it has a different format.
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
            f"algorithm.consistency.kind={kind} scores every answer given every reasoning "
            "of its group, which needs algorithm.shared_prompt=true"
        )
    if not recipe.algorithm.shared_prompt and recipe.evaluation.peer_probe:
        raise InputError(
            f"evaluation.peer_probe={recipe.evaluation.peer_probe} scores every answer given "
            "every reasoning of a prompt, which needs algorithm.shared_prompt=true"
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
    fp8 = recipe.model.precision.fp8
    if recipe.rollout.cuda_graphs and fp8.enabled and fp8.rollout:
        raise InputError(
            "rollout.cuda_graphs=true with model.precision.fp8.rollout=true: quantisation is not "
            "captured; set one of them to false"
        )


def replicas_of(recipe: Recipe) -> int:
    """Return the number of model replicas (the data-parallel size) of a recipe checked before."""
    model, trainer = recipe.model, recipe.trainer
    size = model.tensor_model_parallel_size * model.pipeline_model_parallel_size
    return trainer.world_size // size


def check_world(recipe: Recipe) -> None:
    """Check that the number of ranks is a multiple of a model replica's ranks."""
    trainer, model = recipe.trainer, recipe.model
    tensor, pipeline = model.tensor_model_parallel_size, model.pipeline_model_parallel_size
    world, ranks = trainer.world_size, tensor * pipeline
    experts = model.expert_model_parallel_size * expert_tensor_size(model) * pipeline
    if world % ranks == 0 and world % experts == 0:
        return
    if world % ranks == 0:
        raise InputError(
            f"trainer.devices * trainer.num_nodes = {world} ranks are not a multiple of "
            "model.expert_model_parallel_size * model.expert_tensor_parallel_size * "
            f"model.pipeline_model_parallel_size = {model.expert_model_parallel_size} * "
            f"{expert_tensor_size(model)} * {pipeline} = {experts}: set another "
            "model.expert_model_parallel_size, or more ranks"
        )
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
    """Check what only a training run requires, beyond `check_recipe` and `check_world`."""
    replicas = replicas_of(recipe)
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
    if judged_by(recipe.evaluation, "likelihood") and not needs_reference(recipe.algorithm):
        key = "judge" if recipe.evaluation.judge == "likelihood" else "further_judges"
        raise InputError(
            f"evaluation.{key}=likelihood judges with the run's reference, and this run has none: "
            "algorithm.consistency.bonus_coefficient and algorithm.kl_coefficient are 0; choose "
            "another judge, or validate with nemo-care evaluate and evaluation.reference"
        )
    check_asynchronous(recipe.rollout)
