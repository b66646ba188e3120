"""FLOPs of a step.

A multiplication and an addition count as two. A causal triangle counts as half of its square.
"""

from collections.abc import Sequence

from nemo_care.data.patches import Grid
from nemo_care.models.architecture import Architecture
from nemo_care.models.family import Family
from nemo_care.models.vision_dealing import VisionDealing
from nemo_care.planning.shapes import Lengths
from nemo_care.recipe.schema import Recipe, needs_reference

# Rows of the vocabulary projection for an answer, when only answers are scored.
ANSWER_ROWS = 4


def _triangle(n: int) -> float:
    return n * (n + 1) / 2


def attention_flops(model: Architecture, lengths: Lengths, group: int, *, shared: bool) -> float:
    """Count attention's products (queries with keys, weights with values) of all layers."""
    prompt, completion = lengths.prompt, lengths.completion
    own = group * (completion * prompt + _triangle(completion))
    pairs = own + _triangle(prompt) * (1 if shared else group)
    return model.layers * pairs * 4.0 * model.query_size


def layer_flops(model: Architecture, tokens: int) -> float:
    """Count all layers' matrix products for `tokens` tokens, without attention itself.

    Of experts, a token passes through the active ones.
    """
    mlp = 6 * model.hidden_size * model.ffn_size
    if model.experts is not None:
        mlp = mlp * model.experts.active + 2 * model.hidden_size * model.experts.count
    per_token = (
        2 * model.hidden_size * (model.query_size + 2 * model.kv_size)
        + 2 * model.query_size * model.hidden_size
        + mlp
    )
    return float(model.layers * tokens * per_token)


def head_flops(model: Architecture, rows: int) -> float:
    """Count the output layer's FLOPs for `rows` positions."""
    return 2.0 * rows * model.hidden_size * model.vocab_size


def packed_tokens(lengths: Lengths, group: int, *, shared: bool) -> int:
    """Return the tokens of one group as the update computes them."""
    return (lengths.prompt if shared else group * lengths.prompt) + group * lengths.completion


def language_flops(
    model: Architecture, lengths: Lengths, group: int, *, shared: bool, rows: int
) -> float:
    """Count the language model's forward FLOPs of one group, with the output layer on `rows`."""
    return (
        layer_flops(model, packed_tokens(lengths, group, shared=shared))
        + attention_flops(model, lengths, group, shared=shared)
        + head_flops(model, rows)
    )


def group_flops(family: Family, lengths: Lengths, group: int, *, shared: bool, rows: int) -> float:
    """Count the forward FLOPs of one group, with the output layer on `rows` positions."""
    vision = (1 if shared else group) * family.vision_flops(lengths.grids)
    return vision + language_flops(family.architecture, lengths, group, shared=shared, rows=rows)


def frozen_tower_phase(recipe: Recipe) -> str:
    """Return the phase in which the ranks run a frozen vision tower: the first that needs it."""
    if recipe.rollout.backend == "megatron":
        return "rollout"
    return "scoring" if needs_reference(recipe.algorithm) else "update"


def vision_flops(
    recipe: Recipe, family: Family, grids: Sequence[Grid], phase: str, *, copies: int = 1
) -> tuple[float, float]:
    """Return forward FLOPs of the tower and of its mergers on a prompt in a phase, on all ranks.

    A frozen tower runs once, a trained one for each of the prompt's `copies`.
    """
    frozen, merger = recipe.model.freeze, family.merger_flops(grids)
    tower = family.vision_flops(grids) - merger
    if "vision" not in frozen:
        return copies * tower, copies * merger
    runs = phase == frozen_tower_phase(recipe)
    return runs * tower, merger * (runs if "merger" in frozen else copies)


def busiest_vision_flops(
    recipe: Recipe, family: Family, lengths: Lengths, prompts: int, phase: str = ""
) -> float:
    """Forward FLOPs of the vision tower on the rank of the first stage that computes most.

    `prompts` are those of one micro-batch, whose frames are dealt to the ranks or not. `phase`: of
    the step, by default one in which the tower runs.
    """
    grids, ranks = lengths.grids * prompts, recipe.model.tensor_model_parallel_size
    phase = phase or frozen_tower_phase(recipe)
    if not grids or not recipe.model.vision.shard:
        return sum(vision_flops(recipe, family, grids, phase))
    dealing = VisionDealing.of(family, grids, ranks)
    shares = [vision_flops(recipe, family, dealing.grids(rank), phase) for rank in range(ranks)]
    if "vision" in recipe.model.freeze and "merger" not in recipe.model.freeze:
        # Every rank runs the mergers on all frames.
        return max(tower for tower, _ in shares) + vision_flops(recipe, family, grids, phase)[1]
    return max(map(sum, shares))


def step_flops(recipe: Recipe, family: Family, lengths: Lengths) -> dict[str, float]:
    """Return the FLOPs of all GPUs together by phase, recomputation included."""
    algorithm, model = recipe.algorithm, family.architecture
    size, shared = algorithm.group_size, algorithm.shared_prompt
    tokens = size * lengths.completion
    prompt_only = lengths.prompt_only
    # vLLM caches prefixes: a prompt is computed once, with any training layout.
    engines = recipe.rollout.backend == "vllm"
    prefill = language_flops(model, prompt_only, size, shared=shared or engines, rows=size)
    prefill += (
        family.vision_flops(lengths.grids)
        if engines
        else sum(_vision_of_group(recipe, family, lengths, "rollout"))
    )
    whole = language_flops(model, lengths, size, shared=shared, rows=tokens)
    # Decoding adds the completions' share of a forward.
    decoding = whole - language_flops(model, prompt_only, size, shared=shared, rows=0)
    scored = tokens if algorithm.kl_coefficient > 0 else size * ANSWER_ROWS
    answers = language_flops(model, lengths, size, shared=shared, rows=scored)
    answers += sum(_vision_of_group(recipe, family, lengths, "scoring"))
    prompts = algorithm.prompts_per_step
    return {
        "rollout": prompts * (prefill + decoding),
        "scoring": prompts * answers if needs_reference(algorithm) else 0.0,
        "update": prompts * algorithm.updates_per_rollout * _update_flops(recipe, family, lengths),
    }


def _vision_of_group(
    recipe: Recipe, family: Family, lengths: Lengths, phase: str
) -> tuple[float, float]:
    copies = 1 if recipe.algorithm.shared_prompt else recipe.algorithm.group_size
    return vision_flops(recipe, family, lengths.grids, phase, copies=copies)


def _update_flops(recipe: Recipe, family: Family, lengths: Lengths) -> float:
    """Count forward and backward of one group, recomputation included.

    Backward takes two products for each of the forward pass, for the inputs' gradient and for the
    weights', which frozen ones don't need.
    """
    model, frozen = family.architecture, recipe.model.freeze
    size, shared = recipe.algorithm.group_size, recipe.algorithm.shared_prompt
    tokens, granularity = size * lengths.completion, recipe.model.recompute_granularity
    attention = attention_flops(model, lengths, size, shared=shared)
    layers = layer_flops(model, packed_tokens(lengths, size, shared=shared)) + attention
    head = head_flops(model, tokens)
    again = {"none": 0.0, "selective": attention, "full": layers}[granularity]
    # Backward computes the logits again (models/log_probs.py).
    language = 3 * (layers + head) + again + head
    if "language" in frozen:
        language -= layers - attention + head
    tower, merger = _vision_of_group(recipe, family, lengths, "update")
    if "vision" not in frozen:
        vision = (4 if granularity == "full" else 3) * (tower + merger)
        return language + vision - (merger if "merger" in frozen else 0.0)
    return language + tower + (1 if "merger" in frozen else 3) * merger
