"""The checks of a command before any rank starts."""

from nemo_care.checks.probes import EVALUATE, TRAIN, Situation, found_by
from nemo_care.data.sources import RunData
from nemo_care.errors import InputError
from nemo_care.recipe.schema import Recipe


def check_world_size(recipe: Recipe, world_size: int) -> None:
    """Reject a number of started ranks that differs from the recipe's."""
    expected = recipe.trainer.world_size
    if world_size != expected:
        raise InputError(
            f"{world_size} ranks were started, but trainer.devices={recipe.trainer.devices} and "
            f"trainer.num_nodes={recipe.trainer.num_nodes} make {expected}: set them to the "
            "number of ranks that torchrun or srun starts"
        )


def check_training_inputs(recipe: Recipe) -> RunData:
    """Reject inputs that a training run can't use, and write the miniature's missing files.

    Returns the run's samples, which the checks have read.

    Raises:
        InputError: the first problem that a probe for training has found.
    """
    return _refuse(TRAIN, recipe)


def check_evaluation_inputs(recipe: Recipe) -> RunData:
    """Reject inputs that an evaluation can't use, and write the miniature's missing files.

    Returns the samples of the levels, which the checks have read.

    Raises:
        InputError: the first problem that a probe for evaluations has found.
    """
    return _refuse(EVALUATE, recipe)


def _refuse(face: str, recipe: Recipe) -> RunData:
    situation = Situation(recipe, writes=True)
    for problem in found_by(face, situation):
        raise InputError(problem)
    return RunData(situation.training, situation.levels)
