"""How many prompts and micro-batches a recipe makes of a step."""

from nemo_care.recipe.schema import Recipe, replicas_of


def prompts_of(recipe: Recipe) -> int:
    """Prompts of one replica's step."""
    return recipe.algorithm.prompts_per_step // replicas_of(recipe)


def micro_batches_of(recipe: Recipe) -> int:
    """Micro-batches of one replica's step."""
    return -(-prompts_of(recipe) // recipe.algorithm.groups_per_micro_batch)


def in_flight(recipe: Recipe, stage: int) -> int:
    """Micro-batches whose activations a stage holds: Megatron's 1F1B schedule fills the pipeline
    before the first backward, so stage s of PP holds up to PP - s."""
    return min(recipe.model.pipeline_model_parallel_size - stage, micro_batches_of(recipe))
