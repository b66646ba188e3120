"""What can be refused before any rank starts: checkpoint, tokenizer, layout, rewards, data."""

from collections.abc import Callable
from pathlib import Path

from transformers import Qwen2_5_VLConfig

from nemo_care.data.annotations import Annotations
from nemo_care.data.mixing import TrainingData
from nemo_care.data.prompts import PromptBuilder
from nemo_care.data.sources import RunData, read_levels, read_training, training_sources
from nemo_care.data.tokenizer import load_tokenizer
from nemo_care.errors import InputError
from nemo_care.evaluation.files import check_level_names
from nemo_care.miniature import ensure_files
from nemo_care.models.hf_config import read_hf_config
from nemo_care.models.hf_tensors import check_weights
from nemo_care.models.precision import check_fp8, check_transformer_engine
from nemo_care.models.qwen2_5_vl import check_layout
from nemo_care.ranks.process_groups import Layout
from nemo_care.recipe.schema import Recipe, check_training, check_world
from nemo_care.rollouts.build import check_rollouts
from nemo_care.scoring.reward_functions import load_rewards
from nemo_care.training.model_source import evaluated_model, judging_model


def check_world_size(recipe: Recipe, world_size: int) -> None:
    """Refuse a number of started ranks that is not the recipe's.

    Raises:
        InputError: names the keys.
    """
    expected = recipe.trainer.devices * recipe.trainer.num_nodes
    if world_size != expected:
        raise InputError(
            f"{world_size} ranks were started, but trainer.devices={recipe.trainer.devices} and "
            f"trainer.num_nodes={recipe.trainer.num_nodes} make {expected}: set them to what "
            "torchrun or srun starts"
        )


def check_training_inputs(recipe: Recipe) -> RunData:
    """Refuse what a training run can't work with, and write the miniature's files where missing.

    Returns the samples of the run, which the checks have read.

    Raises:
        InputError: a missing or foreign checkpoint or tokenizer, a layout that does not divide
            model and ranks, kernels that are not there, rewards that can't be imported or called,
            unusable annotations or prompt template.
    """
    for check in _checks_before_data(recipe):
        check()
    return RunData(_check_training_data(recipe), _check_levels(recipe))


def training_checks(recipe: Recipe, *, writes: bool = True) -> list[Callable[[], object]]:
    """The parts of `check_training_inputs`, in its order; each raises its own InputError.

    Without `writes` the miniature's files are left to the run that needs them, and not read where
    they are missing.
    """
    return [
        *_checks_before_data(recipe),
        lambda: _check_training_data(recipe, writes),
        lambda: _check_levels(recipe, writes),
    ]


def check_evaluation_inputs(recipe: Recipe) -> RunData:
    """Refuse what an evaluation can't work with, and write the miniature's files where missing.

    Returns the samples of the levels, which the checks have read.

    Raises:
        InputError: no validation data, a missing or foreign model or tokenizer, a layout that does
            not divide the model, unusable annotations or prompt template.
    """
    if not recipe.data.validation.annotations:
        raise InputError(
            "data.validation.annotations has no value: name a file of samples for each level to "
            "evaluate on"
        )
    check_level_names(list(recipe.data.validation.annotations))
    hf = _check_model(recipe)
    for source in (evaluated_model(recipe), judging_model(recipe)):
        if source is not None:
            source.check(hf)
    return RunData(None, _check_levels(recipe))


def _checks_before_data(recipe: Recipe) -> list[Callable[[], object]]:
    return [
        *_model_checks(recipe),
        lambda: check_training(recipe),
        lambda: check_weights(recipe.model.hf_path),
        lambda: load_rewards(recipe.algorithm),
    ]


def _model_checks(recipe: Recipe) -> list[Callable[[], object]]:
    path = recipe.model.hf_path

    def check_prompts() -> None:
        hf = read_hf_config(path)
        PromptBuilder(recipe.data, hf, load_tokenizer(path, hf))

    return [
        lambda: check_layout(read_hf_config(path), Layout.of(recipe)),
        lambda: check_world(recipe),
        lambda: check_fp8(recipe.model.precision.fp8, read_hf_config(path), Layout.of(recipe)),
        lambda: check_transformer_engine(recipe.model),
        lambda: check_rollouts(recipe),
        check_prompts,
    ]


def _check_model(recipe: Recipe) -> Qwen2_5_VLConfig:
    for check in _model_checks(recipe):
        check()
    return read_hf_config(recipe.model.hf_path)


def _check_training_data(recipe: Recipe, writes: bool = True) -> TrainingData | None:
    """The training data; None only for a miniature that is not written yet."""
    # The parts can be asked one by one: without a source there is nothing to read.
    check_training(recipe)
    sources = training_sources(recipe.data)
    there = [_is_there(source.kind, source.root, writes) for source in sources]
    return read_training(recipe.data, seed=recipe.trainer.seed) if all(there) else None


def _check_levels(recipe: Recipe, writes: bool = True) -> dict[str, Annotations]:
    """The levels' samples; none for a miniature that is not written yet."""
    validation = recipe.data.validation
    is_named = bool(validation.annotations) and validation.root is not None
    if not is_named or _is_there(validation.kind, str(validation.root), writes):
        return read_levels(recipe.data, seed=recipe.trainer.seed)
    return {}


def _is_there(kind: str, root: str, writes: bool) -> bool:
    """Whether a data set can be read now; False only for a miniature that is not written yet."""
    if writes:
        ensure_files(kind, root)
        return True
    return kind != "miniature" or Path(root).exists()
