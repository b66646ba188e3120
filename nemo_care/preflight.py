"""What can be refused before any rank starts: checkpoint, tokenizer, layout, rewards, data."""

from nemo_care.algorithms.reward_functions import load_rewards
from nemo_care.config import Recipe
from nemo_care.data.prompts import PromptBuilder
from nemo_care.data.sources import read_levels, read_training
from nemo_care.data.tokenizer import load_tokenizer
from nemo_care.errors import InputError
from nemo_care.miniature import write_missing_worlds
from nemo_care.models.hf_config import read_hf_config
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


def check_inputs(recipe: Recipe) -> None:
    """Refuse what can't work, and write the miniature's files where they are missing.

    Raises:
        InputError: a missing or foreign checkpoint or tokenizer, a layout that does not divide the
            model, rewards that can't be imported or called, unusable annotations or prompt
            template.
    """
    hf = read_hf_config(recipe.model.hf_path)
    check_weights(recipe.model.hf_path)
    check_layout(hf, layout_of(recipe))
    PromptBuilder(recipe.data, hf, load_tokenizer(recipe.model.hf_path, hf))
    load_rewards(recipe.algorithm)
    write_missing_worlds(recipe.data)
    read_training(recipe.data, seed=recipe.trainer.seed)
    read_levels(recipe.data, seed=recipe.trainer.seed)
