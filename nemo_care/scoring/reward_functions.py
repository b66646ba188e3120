"""The rewards that a recipe names: ours, and the user's own by import path.

A reward of the user is a function that anything importable may hold, such as a file in the folder
that the command is started in:

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
"""What the length penalty of rollout.truncated=penalise is called in records."""

# `reward/total` is a metric already.
_TAKEN = (*OURS, "total", LENGTH_PENALTY)


class Reward(Protocol):
    """What a reward is called with: a completion's whole text and the question that it answers."""

    def __call__(self, *, completion: str, sample: Sample) -> float:
        """One finite number, larger for a better completion."""
        ...


def reward_name(entry: str) -> str:
    """What an entry of `algorithm.rewards` is called in records: a custom reward's function."""
    return entry.rpartition(".")[2]


def reward_weights(config: AlgorithmConfig) -> list[float]:
    """The weight of each entry of `algorithm.rewards`."""
    if config.reward_weights is None:
        return [1.0] * len(config.rewards)
    return config.reward_weights


def load_rewards(config: AlgorithmConfig) -> dict[str, Reward]:
    """Each reward's function by its name, in the recipe's order.

    Raises:
        InputError: rewards, weights and bonus do not fit together, or an import path does not lead
            to a function that can be called as a reward.
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
        raise InputError("algorithm.rewards is empty: name one reward at least, such as accuracy")
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
                f"algorithm.rewards: {entry}: the metric reward/{name} is another one's: rename "
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
            f"algorithm.rewards has no accuracy, on which the bonus of "
            f"algorithm.consistency.bonus_coefficient={bonus:g} goes: add accuracy (with weight 0 "
            "it counts for the bonus only), or set the coefficient to 0"
        )
    if bonus == 0 and not any(weights):
        raise InputError(
            f"algorithm.reward_weights={weights}: nothing is left to learn from: give one reward "
            "another weight than 0"
        )


def _load(path: str) -> Reward:
    module_path, _, name = path.rpartition(".")
    try:
        module = importlib.import_module(module_path)
    # A script that has no main guard may end the process when it is imported.
    except (Exception, SystemExit) as error:
        raise InputError(
            f"algorithm.rewards: {path} can't be imported ({_reason(error)}): check the path and "
            "the module, which must be installed or lie in the working directory"
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
        # Some functions written in C do not tell their arguments.
        pass
    return function


def _reason(error: BaseException) -> str:
    """What went wrong and in which line of the user's code, on one line."""
    internal = ("<frozen", importlib.__file__, __file__)
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(internal)
    ]
    where = f", {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return " ".join(f"{type(error).__name__}: {error}{where}".split())


def reward_value(name: str, reward: Reward, completion: str, sample: Sample) -> float:
    """Call a reward.

    Raises:
        RuntimeError: it raised something; names reward and prompt.
        ValueError: it gave something else than one finite number; names reward and prompt.
        InputError: the sample's problem_type is unknown to the accuracy.
    """
    try:
        value: object = reward(completion=completion, sample=sample)
    # sys.exit in a reward would end the run as if it were done.
    except (Exception, SystemExit) as error:
        if name in OURS:
            raise
        # Of the error's own type it might not survive the way to the other ranks; the leader keeps
        # the cause and prints its traceback.
        raise RuntimeError(
            f"reward {name} failed for a completion of prompt {sample.sample_id}: "
            f"{type(error).__name__}: {error}"
        ) from error
    number = _as_float(value)
    if not abs(number) <= torch.finfo(torch.float32).max:
        raise ValueError(
            f"reward {name} gave {reprlib.repr(value)} for a completion of prompt "
            f"{sample.sample_id}: it must return one finite number (float32)"
        )
    return number


def _as_float(value: object) -> float:
    """NaN for what is no number; NumPy's and torch's scalars are numbers, text is not."""
    if not isinstance(value, SupportsFloat) or isinstance(value, str):
        return math.nan
    try:
        return float(value)
    except Exception:
        # Such as an array of several.
        return math.nan
