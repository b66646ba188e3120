"""8-bit products on a GPU: near bf16 with every recipe, and padding that changes nothing.

The bounds were chosen by reasoning and have not been measured on a GPU yet. e4m3 has 4 bits: a
rounding is off by up to 2^-4 = 6% of a number, on average by 2%, and products of some hundred
rounded numbers by about 4% of their size; four layers make log-probabilities of a few nats
differ by a tenth or so. The recipes' own bound of the mean difference is 0.1
(recipes/precision/fp8.yaml).
"""

import pytest
import torch
from gpu_passes import Job, assert_same, needs_transformer_engine, passes_of

from nemo_care.errors import InputError
from nemo_care.models.precision import check_gpu
from nemo_care.recipe.model import FP8_RECIPES

pytestmark = pytest.mark.gpu
NEAR_BF16 = {"mean": 0.1, "largest": 2.0, "gradient": 0.35}
# Scales change with the padding only where it holds the largest number.
SAME_SCALES = {"mean": 0.03, "largest": 0.6, "gradient": 0.15}


@pytest.fixture(autouse=True)
def _transformer_engine(monkeypatch):
    needs_transformer_engine()
    # Recent ones require it to load delayed scales; no checkpoint is loaded here.
    monkeypatch.setenv("NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE", "1")


def fp8_recipe(job: Job, name: str, **keys):
    """Skips with the reason where the device or its CUDA does not run the recipe."""
    recipe = job.recipe("bf16", "transformer_engine")
    fp8 = recipe.model.precision.fp8
    fp8.enabled, fp8.recipe = True, name
    for key, value in keys.items():
        setattr(fp8, key, value)
    try:
        check_gpu(fp8, torch.cuda.get_device_capability(), torch.version.cuda)
    except InputError as error:
        pytest.skip(str(error))
    return recipe


@pytest.mark.parametrize("name", FP8_RECIPES)
def test_update_is_near_bf16_and_really_in_8_bits(job: Job, name):
    ours = passes_of(job, fp8_recipe(job, name))
    bf16 = passes_of(job, job.recipe("bf16", "transformer_engine"))
    assert_same(ours, bf16, **NEAR_BF16)
    assert (ours.log_probs - bf16.log_probs).abs().mean() > 1e-5


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("name", FP8_RECIPES)
def test_padding_changes_no_result(job: Job, name, recompute):
    recipe = fp8_recipe(job, name)
    recipe.model.recompute_granularity = recompute
    least = passes_of(job, recipe)
    more = passes_of(job, recipe, multiple=256)
    assert_same(more, least, **SAME_SCALES)


@pytest.mark.parametrize("name", [name for name in FP8_RECIPES if name != "delayed"])
def test_first_and_last_layers_in_bf16_are_nearer(job: Job, name):
    bf16 = passes_of(job, job.recipe("bf16", "transformer_engine")).log_probs
    all_layers, ends = (
        passes_of(job, fp8_recipe(job, name, **keys)).log_probs
        for keys in ({}, {"bf16_first_layers": 2, "bf16_last_layers": 2})
    )
    # Four layers: with two at either end nothing is left in 8 bits.
    assert (ends - bf16).abs().mean() < (all_layers - bf16).abs().mean()


@pytest.mark.parametrize("name", [name for name in FP8_RECIPES if name != "delayed"])
def test_a_whole_step_in_8_bits_trains(job: Job, tmp_path, name):
    from small_runs import one_step, small_trainer

    recipe = fp8_recipe(job, name, scoring=True, rollout=True)
    recipe.rollout.max_logprob_difference = 0.1
    recipe.algorithm.reference.max_logprob_difference = 0.1
    trainer = small_trainer(recipe, job.ranks, tmp_path)
    metrics = one_step(trainer, 1).metrics
    assert metrics["train/bad_step"] == 0
    assert metrics["train/grad_norm"] > 0
