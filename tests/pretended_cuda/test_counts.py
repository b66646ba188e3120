"""Kernels, waits, uploads and float32 products of a training step on a GPU, by phase.

The bounds are what there is. A change that makes the CPU wait once more per token or micro-batch,
or launches one more kernel per layer and token, fails here; one that needs fewer lowers the bound.
"""

import copy
from collections import Counter

import pytest
from small_runs import small_recipe, small_trainer

from nemo_care.models.decoding_cache import DecodingCache
from nemo_care.planning.work import Efficiency
from nemo_care.ranks.process_groups import Layout
from nemo_care.rollouts.fixed_decoding import LOOK_EVERY
from nemo_care.training.step import Step

# Of one forward pass of the vision tower: transformers reads the grids back, and indexes with
# windows that it has sorted on the CPU.
VISION_WAITS = 9
# Of one batch or micro-batch: token ids, positions, segments, frames and windows.
BATCH_UPLOADS = 20
MICRO_BATCHES = 4
ROLLOUT_BATCHES = 2


def total(counter: Counter) -> int:
    return sum(counter.values())


def second_step(ranks, job):
    """Train two steps; what the second one's phases do, and the kernels of a layer for a token."""
    from cuda_counts import COUNTS

    trainer = small_trainer(job["recipe"], ranks, job["folder"])
    layers, before = [], {}
    layer = trainer.policy.model.language_model.decoder.layers[0]

    def begin(module, args, kwargs):
        before["kernels"] = copy.copy(COUNTS.kernels)

    def end(module, args, kwargs, output):
        cache = kwargs["packed_seq_params"]
        if isinstance(cache, DecodingCache):
            layers.append((len(cache._lengths), COUNTS.kernels - before["kernels"]))

    layer.register_forward_pre_hook(begin, with_kwargs=True)
    layer.register_forward_hook(end, with_kwargs=True)
    for number in (1, 2):
        layers.clear()
        phases, names = {}, []

        def shown(name, phases=phases, names=names):
            if names:
                phases[names[-1]] = copy.deepcopy(COUNTS)
            names.append(name)
            COUNTS.clear()

        trainer.step = number
        step = Step(number, shown=shown)
        trainer.run_training_step(step)
        shown("end")
    return {
        "phases": phases,
        "layers": layers,
        "bad": step.metrics["train/bad_step"],
        "lengths": [[c.length for c in group.completions] for group in step.groups],
        "parameters": len(list(trainer.policy.model.parameters())),
    }


@pytest.fixture(scope="module", params=[False, True], ids=["default", "cuda_graphs"])
def step(request, on_pretended_gpu, checkpoint, world, tmp_path_factory):
    recipe = small_recipe(checkpoint, world)
    recipe.model.precision.dtype = "bf16"
    recipe.optimizer.offload = recipe.algorithm.reference.offload = True
    recipe.rollout.cuda_graphs = request.param
    recipe.rollout.groups_per_batch = 3
    # The tiny model is not accurate in bf16.
    recipe.rollout.max_logprob_difference = 1.0
    recipe.algorithm.reference.max_logprob_difference = 1.0
    job = {"recipe": recipe, "folder": tmp_path_factory.mktemp("run")}
    (found,) = on_pretended_gpu(Layout(), second_step, job)
    assert found["bad"] == 0
    return {**found, "graphs": request.param, "max_tokens": recipe.rollout.max_completion_tokens}


def test_a_layer_takes_few_kernels_for_a_token(step):
    """24 for one group, which the plan counts with."""
    calls = {}
    for prompts, kernels in step["layers"]:
        calls.setdefault(prompts, []).append((total(kernels), kernels))
    assert pytest.approx(Efficiency().layer_microseconds, rel=0.05) == 12 * 24
    for prompts in calls:
        # Several groups have a kernel each for their prompts, and are joined and sorted.
        bound = 24 if prompts == 1 else 24 + 3 + prompts
        counts = [count for count, _ in calls[prompts]]
        # A few more once some completions have ended, and for the cache in the first call.
        assert max(counts) <= bound + 4, calls[prompts]
    # All three prompts of the first batch, and the one of the second, begin without ended ones.
    for prompts, bound in ((1, 24), (3, 30)):
        assert min(count for count, _ in calls[prompts]) <= bound, calls[prompts]


def test_between_looks_at_the_end_a_rollout_does_not_wait(step):
    waits = step["phases"]["rollout"].waits
    per_batch = VISION_WAITS + 2  # tokens and log-probabilities at its end
    if step["graphs"]:
        looks = (step["max_tokens"] - 1) // LOOK_EVERY
        assert total(waits) <= ROLLOUT_BATCHES * (per_batch + looks) + 1, waits
        return
    batches = [step["lengths"][:3], step["lengths"][3:]]
    tokens = sum(max(map(max, lengths)) for lengths in batches)
    # Whenever completions have ended, the cache finds out whether all of a prompt have.
    ends = sum(len({n for row in lengths for n in row}) for lengths in batches)
    assert total(waits) <= ROLLOUT_BATCHES * per_batch + tokens + 2 * ends + 1, waits


def test_scoring_and_update_wait_per_micro_batch_only(step):
    scoring, update = (step["phases"][name].waits for name in ("scoring", "update"))
    assert total(scoring) <= MICRO_BATCHES * (VISION_WAITS + 6) + 3, scoring
    # Megatron's norm without fused kernels reads each parameter's, and an offloaded average is
    # written back parameter by parameter.
    assert total(update) <= MICRO_BATCHES * (VISION_WAITS + 5) + 2 * step["parameters"] + 8, update


def test_uploads_are_those_of_the_batches(step):
    """The state of optimizer and reference is offloaded to pinned memory."""
    rollout, scoring, update = (
        step["phases"][name].uploads for name in ("rollout", "scoring", "update")
    )
    assert total(rollout) <= ROLLOUT_BATCHES * (BATCH_UPLOADS + 8), rollout
    assert total(scoring) <= MICRO_BATCHES * BATCH_UPLOADS + 4, scoring
    # Two more are backward's, of an index on the CPU.
    assert total(update) <= MICRO_BATCHES * (BATCH_UPLOADS + 5) + 3, update


def test_the_only_products_in_float32_are_the_rotary_angles(step):
    products = {place for phase in step["phases"].values() for place in phase.float32_products}
    assert products == {"bmm models/language_model.py:LanguageModel._preprocess"}
