"""The rewards that a recipe names: the built-in ones, and the user's functions by import path.

A user's reward is a function in any importable module, such as a file in the folder in which the
command is started:

    def my_reward(completion: str, sample: Sample) -> float: ...

It is called with these two keywords and returns one finite number, larger for a better completion.
"""

import importlib
import inspect
import math
import reprlib
import traceback
from functools import partial
from typing import Protocol, SupportsFloat

import torch

from nemo_care.data.samples import Sample
from nemo_care.errors import InputError
from nemo_care.objective.rewards import accuracy_reward, format_reward
from nemo_care.recipe.algorithm import AlgorithmConfig

OURS = ("accuracy", "format")
LENGTH_PENALTY = "length_penalty"
"""Name of the length penalty of rollout.truncated=penalise in records."""

# `reward/total` is already a metric.
_TAKEN = (*OURS, "total", LENGTH_PENALTY)


class Reward(Protocol):
    """A reward: called with a completion's whole text and the question that it answers."""

    def __call__(self, *, completion: str, sample: Sample) -> float:
        """Return one finite number, larger for a better completion."""
        ...


def reward_name(entry: str) -> str:
    """Return the name of an entry of `algorithm.rewards` in records: for an import path its
    function."""
    return entry.rpartition(".")[2]


def reward_weights(config: AlgorithmConfig) -> list[float]:
    """Return the weight of each entry of `algorithm.rewards`."""
    if config.reward_weights is None:
        return [1.0] * len(config.rewards)
    return config.reward_weights


def load_rewards(config: AlgorithmConfig) -> dict[str, Reward]:
    """Return each reward's function by its name, in the recipe's order.

    Raises:
        InputError: rewards, weights and bonus do not fit together, or an import path does not name
        a function that can be called as a reward.
    """
    _check_names(config)
    _check_weights(config)
    ours: dict[str, Reward] = {
        "accuracy": _accuracy,
        "format": partial(_format, config.min_reasoning_words),
    }
    return {reward_name(entry): ours.get(entry) or _load(entry) for entry in config.rewards}


def _accuracy(completion: str, sample: Sample) -> float:
    return accuracy_reward(sample.problem_type, completion, sample.solution)


def _format(min_reasoning_words: int, completion: str, sample: Sample) -> float:
    return format_reward(completion, min_reasoning_words=min_reasoning_words)


def _check_names(config: AlgorithmConfig) -> None:
    if not config.rewards:
        raise InputError("algorithm.rewards is empty: name at least one reward, such as accuracy")
    seen: dict[str, str] = {}
    for entry in config.rewards:
        if entry not in OURS and not _is_import_path(entry):
            raise InputError(
                f"algorithm.rewards: {entry!r} is unknown: use {', '.join(OURS)} or the import "
                "path of a function, package.module.function"
            )
        name = reward_name(entry)
        if entry not in OURS and name in _TAKEN:
            raise InputError(
                f"algorithm.rewards: {entry}: the metric reward/{name} already exists: rename "
                "the function"
            )
        if name in seen:
            remedy = "name it once" if seen[name] == entry else "rename one of the functions"
            raise InputError(
                f"algorithm.rewards: {seen[name]} and {entry} would both be reward/{name} in the "
                f"records: {remedy}"
            )
        seen[name] = entry


def _is_import_path(entry: str) -> bool:
    parts = entry.split(".")
    return len(parts) > 1 and all(part.isidentifier() for part in parts)


def _check_weights(config: AlgorithmConfig) -> None:
    weights, bonus = reward_weights(config), config.consistency.bonus_coefficient
    if len(weights) != len(config.rewards):
        raise InputError(
            f"algorithm.reward_weights has {len(weights)} numbers, algorithm.rewards has "
            f"{len(config.rewards)} rewards: give one number for each, or null for 1 each"
        )
    if not all(map(math.isfinite, weights)):
        raise InputError(f"algorithm.reward_weights={weights}: weights must be finite numbers")
    if bonus > 0 and "accuracy" not in config.rewards:
        raise InputError(
            f"algorithm.rewards has no accuracy, which the bonus of "
            f"algorithm.consistency.bonus_coefficient={bonus:g} needs: add accuracy (with weight 0 "
            "it counts for the bonus only), or set the coefficient to 0"
        )
    if bonus == 0 and not any(weights):
        raise InputError(
            f"algorithm.reward_weights={weights}: all rewards have weight 0: give at least one a "
            "nonzero weight"
        )


def _load(path: str) -> Reward:
    module_path, _, name = path.rpartition(".")
    try:
        module = importlib.import_module(module_path)
    # A script without a main guard can end the process when it is imported.
    except (Exception, SystemExit) as error:
        raise InputError(
            f"algorithm.rewards: {path} can't be imported ({_reason(error)}): check the path and "
            "the module, which must be installed or in the working directory"
        ) from error
    function = getattr(module, name, None)
    if function is None:
        raise InputError(
            f"algorithm.rewards: {path}: the module {module_path} has no {name}: check the name "
            "of the function"
        )
    if not callable(function):
        raise InputError(
            f"algorithm.rewards: {path} can't be called, it is of type {type(function).__name__}: "
            f"name a function, def {name}(completion, sample)"
        )
    try:
        inspect.signature(function).bind(completion="", sample=None)
    except TypeError as error:
        raise InputError(
            f"algorithm.rewards: {path} can't be called with the keywords completion and sample "
            f"({error}): define it as def {name}(completion, sample)"
        ) from error
    except ValueError:
        # Some functions written in C have no readable signature.
        pass
    return function


def _reason(error: BaseException) -> str:
    """Return the error and the line of the user's code, as one line."""
    internal = ("<frozen", importlib.__file__, __file__)
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(internal)
    ]
    where = f", {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return " ".join(f"{type(error).__name__}: {error}{where}".split())


def reward_value(name: str, reward: Reward, completion: str, sample: Sample) -> float:
    """Call a reward and return its value.

    Raises:
        RuntimeError: it raised an error; names reward and prompt.
        ValueError: it did not return one finite number; names reward and prompt.
        InputError: accuracy does not support the sample's problem_type.
    """
    try:
        value: object = reward(completion=completion, sample=sample)
    # sys.exit in a reward would end the run as if it were complete.
    except (Exception, SystemExit) as error:
        if name in OURS:
            raise
        # An error of the original type might not be picklable for the other ranks; the leader keeps
        # the cause and prints its traceback.
        raise RuntimeError(
            f"reward {name} failed for a completion of prompt {sample.sample_id}: "
            f"{type(error).__name__}: {error}"
        ) from error
    number = _as_float(value)
    if not abs(number) <= torch.finfo(torch.float32).max:
        raise ValueError(
            f"reward {name} returned {reprlib.repr(value)} for a completion of prompt "
            f"{sample.sample_id}: it must return one finite number (float32)"
        )
    return number


def _as_float(value: object) -> float:
    """Convert NumPy's and torch's scalars, but not text, to a float; NaN for anything else."""
    if not isinstance(value, SupportsFloat) or isinstance(value, str):
        return math.nan
    try:
        return float(value)
    except Exception:
        # For example an array of several numbers.
        return math.nan
