"""Count the prompts and micro-batches of a recipe's step."""

from nemo_care.recipe.schema import Recipe, replicas_of


def prompts_of(recipe: Recipe) -> int:
    """Return the prompts of one replica's step."""
    return recipe.algorithm.prompts_per_step // replicas_of(recipe)


def micro_batches_of(recipe: Recipe) -> int:
    """Return the micro-batches of one replica's step."""
    return -(-prompts_of(recipe) // recipe.algorithm.groups_per_micro_batch)


def steps_ahead(recipe: Recipe) -> int:
    """Return the number of steps whose prompts engines sample together during training."""
    rollout = recipe.rollout
    asynchronous = rollout.backend == "vllm" and rollout.asynchronous
    return rollout.max_staleness if asynchronous else 0


def in_flight(recipe: Recipe, stage: int) -> int:
    """Return the number of micro-batches whose activations a stage holds: Megatron's 1F1B schedule
    fills the pipeline before the first backward, so stage s of PP holds up to PP - s."""
    return min(recipe.model.pipeline_model_parallel_size - stage, micro_batches_of(recipe))
