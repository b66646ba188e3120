"""What can be refused before any rank starts: checkpoint, tokenizer, layout, rewards, data."""

from transformers import Qwen2_5_VLConfig

from nemo_care.algorithms.reward_functions import load_rewards
from nemo_care.config import Recipe, check_training, check_world
from nemo_care.data.prompts import PromptBuilder
from nemo_care.data.sources import read_levels, read_training, training_sources
from nemo_care.data.tokenizer import load_tokenizer
from nemo_care.errors import InputError
from nemo_care.evaluation.files import check_level_names
from nemo_care.miniature import ensure_files
from nemo_care.model_source import evaluated_model, judging_model
from nemo_care.models.hf_config import read_hf_config
from nemo_care.models.precision import check_fp8, check_transformer_engine
from nemo_care.models.qwen2_5_vl import check_layout
from nemo_care.models.weights import check_weights
from nemo_care.parallel.process_groups import Layout


def layout_of(recipe: Recipe) -> Layout:
    """The parallel layout that a recipe asks for."""
    model = recipe.model
    return Layout(
        tensor=model.tensor_model_parallel_size,
        pipeline=model.pipeline_model_parallel_size,
        sequence_parallel=model.sequence_parallel,
    )


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


def check_training_inputs(recipe: Recipe) -> None:
    """Refuse what a training run can't work with, and write the miniature's files where missing.

    Raises:
        InputError: a missing or foreign checkpoint or tokenizer, a layout that does not divide
            model and ranks, kernels that are not there, rewards that can't be imported or called,
            unusable annotations or prompt template.
    """
    _check_model(recipe)
    check_training(recipe)
    check_weights(recipe.model.hf_path)
    load_rewards(recipe.algorithm)
    for source in training_sources(recipe.data):
        ensure_files(source.kind, source.root)
    read_training(recipe.data, seed=recipe.trainer.seed)
    _check_levels(recipe)


def check_evaluation_inputs(recipe: Recipe) -> None:
    """Refuse what an evaluation can't work with, and write the miniature's files where missing.

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
    _check_levels(recipe)


def _check_model(recipe: Recipe) -> Qwen2_5_VLConfig:
    hf = read_hf_config(recipe.model.hf_path)
    check_layout(hf, layout_of(recipe))
    check_world(recipe)
    check_fp8(recipe.model.precision.fp8, hf, layout_of(recipe))
    check_transformer_engine(recipe.model)
    PromptBuilder(recipe.data, hf, load_tokenizer(recipe.model.hf_path, hf))
    return hf


def _check_levels(recipe: Recipe) -> None:
    validation = recipe.data.validation
    if validation.annotations and validation.root is not None:
        ensure_files(validation.kind, validation.root)
    read_levels(recipe.data, seed=recipe.trainer.seed)
