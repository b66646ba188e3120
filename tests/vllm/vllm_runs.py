"""A small recipe whose rollouts come from vLLM."""

from small_runs import small_recipe


def vllm_recipe(checkpoint, world):
    recipe = small_recipe(checkpoint, world)
    recipe.rollout.backend = "vllm"
    recipe.rollout.vllm.kv_cache_gib = 0.25
    recipe.rollout.vllm.enforce_eager = True
    recipe.rollout.vllm.timeout_seconds = 600
    return recipe


def texts(groups):
    return [[c.text for c in group.completions] for group in groups]
