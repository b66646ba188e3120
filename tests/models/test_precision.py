"""Number formats: what a recipe's keys become, and what is refused before anything starts."""

from dataclasses import replace

import pytest
import torch
from made_groups import make_groups, make_prompts
from small_runs import small_recipe, small_trainer

from nemo_care.errors import InputError
from nemo_care.groups.batching import BatchLayout
from nemo_care.models.architecture import Architecture
from nemo_care.models.family import Family
from nemo_care.models.precision import (
    check_fp8,
    check_gpu,
    check_transformer_engine,
    computing,
    token_multiple,
)
from nemo_care.models.transformer_config import transformer_config
from nemo_care.planning.gpus import read_gpu
from nemo_care.planning.precision import check_planned
from nemo_care.planning.shapes import read_model_shape
from nemo_care.ranks.process_groups import Layout
from nemo_care.recipe.compose import compose_recipe
from nemo_care.recipe.model import FP8_RECIPES, FP8Config
from nemo_care.recipe.schema import Recipe, check_recipe
from nemo_care.rollouts.generator import Sampling
from nemo_care.rollouts.megatron import MegatronGenerator
from nemo_care.training.build import build_model


def fp8(**keys) -> FP8Config:
    return FP8Config(enabled=True, **keys)


def family(size: str = "7B") -> Family:
    return read_model_shape(f"models/Qwen2.5-VL-{size}-Instruct").family


def shape(size: str = "7B") -> Architecture:
    return family(size).architecture


def config(precision: FP8Config | None, **keys):
    layout = Layout(tensor=4, pipeline=2)
    return transformer_config(family(), layout, torch.bfloat16, fp8=precision, **keys)


def test_bf16_is_megatrons_bf16():
    made = config(None)
    assert (made.bf16, made.params_dtype, made.fp8) == (True, torch.bfloat16, None)
    assert config(FP8Config()).fp8 is None
    plain = transformer_config(family(), Layout(), torch.float32)
    assert (plain.bf16, plain.params_dtype) == (False, torch.float32)


@pytest.mark.parametrize(
    ("recipe", "number_format"),
    [("delayed", "hybrid"), ("tensorwise", "hybrid"), ("blockwise", "e4m3"), ("mxfp8", "e4m3")],
)
def test_recipe_becomes_megatrons_settings(recipe, number_format):
    made = config(fp8(recipe=recipe))
    assert (made.fp8, made.fp8_recipe, made.fp8_param) == (number_format, recipe, False)
    assert not made.first_last_layers_bf16
    assert not any((made.fp8_dot_product_attention, made.fp8_multi_head_attention))
    assert config(fp8(recipe=recipe, format="hybrid")).fp8 == "hybrid"
    assert config(fp8(recipe=recipe, format="e4m3")).fp8 == "e4m3"
    history = (made.fp8_amax_history_len, made.fp8_amax_compute_algo)
    assert history == ((1024, "max") if recipe == "delayed" else (1, "most_recent"))


def test_layers_at_the_ends_stay_in_bf16():
    made = config(fp8(bf16_first_layers=2))
    assert made.first_last_layers_bf16
    assert (made.num_layers_at_start_in_bf16, made.num_layers_at_end_in_bf16) == (2, 0)


def test_recomputed_layers_keep_no_copies_of_weights():
    assert config(fp8(), recompute_granularity="full").disable_parameter_transpose_cache
    assert not config(fp8(), recompute_granularity="selective").disable_parameter_transpose_cache


REFUSED = [
    ({"recipe": "int8"}, "choose delayed or"),
    ({"format": "e5m2"}, "choose auto or"),
    ({"bf16_last_layers": -1}, "at least 0"),
    ({"param_gather": True}, "param_gather"),
    ({"update": False}, "update=false"),
    ({"recipe": "delayed", "bf16_first_layers": 1}, "tensorwise"),
    ({"recipe": "delayed", "scoring": True}, "scoring=true"),
    ({"recipe": "delayed", "rollout": True}, "rollout=true"),
]


def checked(keys: dict, **model) -> None:
    recipe = Recipe()
    recipe.model.hf_path = "anywhere"
    recipe.model.backend = "transformer_engine"
    recipe.trainer.max_steps = 1
    for key, value in model.items():
        setattr(recipe.model, key, value)
    recipe.model.precision.fp8 = fp8(**keys)
    check_recipe(recipe)


@pytest.mark.parametrize(("keys", "message"), REFUSED)
def test_what_can_not_work_is_refused_in_one_line(keys, message):
    checked({})
    with pytest.raises(InputError, match=message) as error:
        checked(keys)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("backend", ["auto", "local"])
def test_eight_bits_need_transformer_engines_layers(backend):
    with pytest.raises(InputError, match=r"needs model\.backend=transformer_engine"):
        checked({}, backend=backend)


def test_eight_bits_need_bf16():
    recipe = Recipe()
    recipe.model.backend = "transformer_engine"
    recipe.model.precision.dtype = "fp32"
    with pytest.raises(InputError, match=r"model\.precision\.dtype=fp32"):
        checked({}, precision=replace(recipe.model.precision))


def test_missing_transformer_engine_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("nemo_care.models.precision.find_spec", lambda name: None)
    recipe = Recipe()
    check_transformer_engine(recipe.model)
    recipe.model.backend = "transformer_engine"
    with pytest.raises(InputError, match=r"pip install .* -e '\.\[gpu\]'"):
        check_transformer_engine(recipe.model)


def test_delayed_scales_that_could_not_be_loaded_again_are_told_before_the_run(monkeypatch):
    recipe = Recipe()
    recipe.model.backend = "transformer_engine"
    recipe.model.precision.fp8 = fp8(recipe="delayed")
    found = {"transformer_engine"}
    monkeypatch.setattr(
        "nemo_care.models.precision.find_spec", lambda name: name if name in found else None
    )
    check_transformer_engine(recipe.model)
    found.add("transformer_engine.pytorch._extra_state")
    with pytest.raises(InputError, match="NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE=1"):
        check_transformer_engine(recipe.model)
    recipe.model.precision.fp8.recipe = "tensorwise"
    check_transformer_engine(recipe.model)
    recipe.model.precision.fp8.recipe = "delayed"
    monkeypatch.setenv("NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE", "1")
    check_transformer_engine(recipe.model)


GPUS = {"a100-80gb": (), "l40s-48gb": ("delayed", "tensorwise"),
        "h100-80gb": ("delayed", "tensorwise", "blockwise"), "b200-180gb": FP8_RECIPES}  # fmt: skip


@pytest.mark.parametrize("name", GPUS)
def test_gpus_have_the_recipes_that_transformer_engine_says(name):
    capability = read_gpu(name).capability
    for recipe in FP8_RECIPES:
        if recipe in GPUS[name]:
            check_gpu(fp8(recipe=recipe), capability, "12.9")
            continue
        with pytest.raises(InputError, match=f"recipe={recipe} needs"):
            check_gpu(fp8(recipe=recipe), capability, "12.9")


def test_blockwise_needs_cuda_12_9_and_mxfp8_no_consumer_blackwell():
    check_gpu(fp8(recipe="blockwise"), (9, 0), "13.0")
    for cuda in ("12.8", None):
        with pytest.raises(InputError, match=r"CUDA 12\.9"):
            check_gpu(fp8(recipe="blockwise"), (9, 0), cuda)
    with pytest.raises(InputError, match=r"below 12\.0"):
        check_gpu(fp8(recipe="mxfp8"), (12, 0), "12.9")


def test_matrices_of_a_rank_must_fit_the_products():
    eight = Layout(tensor=8)
    for recipe in ("delayed", "tensorwise", "blockwise"):
        check_fp8(fp8(recipe=recipe), shape("72B"), eight)
    # 29568 / 8 = 3696 is a multiple of 16 only.
    with pytest.raises(InputError, match="intermediate size is 3696"):
        check_fp8(fp8(recipe="mxfp8"), shape("72B"), eight)
    check_fp8(fp8(recipe="mxfp8"), shape("72B"), Layout(tensor=4))


def test_no_more_layers_in_bf16_than_a_stage_has():
    check_fp8(fp8(bf16_first_layers=7, bf16_last_layers=7), shape(), Layout(pipeline=4))
    with pytest.raises(InputError, match="bf16_last_layers=8"):
        check_fp8(fp8(bf16_last_layers=8), shape(), Layout(pipeline=4))


@pytest.mark.parametrize("recipe", FP8_RECIPES)
@pytest.mark.parametrize("tensor", [1, 2, 4, 8])
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("shared_prompt", [False, True])
def test_lengths_fit_the_products_of_every_rank(recipe, tensor, sequence_parallel, shared_prompt):
    layout = Layout(tensor=tensor, sequence_parallel=sequence_parallel)
    batches = BatchLayout.of(layout, 1, 0, shared_prompt=shared_prompt, fp8=fp8(recipe=recipe))
    scattered = sequence_parallel and tensor > 1
    local = batches.multiple // (tensor if scattered else 1)
    assert batches.multiple % (tensor if scattered else 1) == 0
    assert local % (32 if recipe == "mxfp8" else 16) == 0
    # What is exchanged is quantised by blocks of 128 tokens.
    assert local % 128 == 0 or not (scattered and recipe == "blockwise")
    # No more padding than that.
    assert local <= (128 if scattered and recipe == "blockwise" else 32)


def test_without_eight_bits_lengths_stay_as_they_were():
    for layout in (Layout(), Layout(tensor=8, sequence_parallel=True)):
        assert token_multiple(None, layout) == token_multiple(FP8Config(), layout) == 1


@pytest.fixture(scope="module")
def trainer(checkpoint, world, ranks, tmp_path_factory):
    return small_trainer(small_recipe(checkpoint, world), ranks, tmp_path_factory.mktemp("run"))


def test_padded_groups_give_the_same_gradients_and_likelihoods(
    trainer, checkpoint, world, tmp_path
):
    """Padding after the tokens does not change their results."""
    groups = make_groups(make_prompts(checkpoint, world, tmp_path), checkpoint)
    found = []
    for multiple in (16, 256):
        layout = replace(trainer.policy.layout, multiple=multiple)
        trainer.policy.model.zero_grad()
        trainer.policy.wrapped.zero_grad_buffer()
        for batch in layout.batches(groups):
            hidden = trainer.policy.model(batch.rows.inputs(trainer.policy.model))
            assert hidden.shape[0] % multiple == 0
            batch.log_probs(trainer.policy.model, hidden, batch.mask).sum().backward()
        found.append([p.main_grad.clone() for p in trainer.policy.model.parameters()])
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, atol=2e-4, rtol=1e-4)


def test_padded_decoding_samples_the_same_tokens(trainer, checkpoint, world, tmp_path, monkeypatch):
    prompts = make_prompts(checkpoint, world, tmp_path)
    model, tokenizer = trainer.policy.model, trainer.generator.tokenizer
    sampling = Sampling(group_size=3, temperature=1.0, top_p=0.95, max_tokens=12, seed=(7,))
    rows: set[int] = set()
    layer = model.language_model.decoder.layers[0]
    hook = layer.register_forward_pre_hook(
        lambda module, args, kwargs: rows.add(kwargs["hidden_states"].shape[0]), with_kwargs=True
    )
    found = []
    for precision in (None, fp8(rollout=True)):
        rows.clear()
        generator = MegatronGenerator(
            model, tokenizer, trainer.ranks, groups_per_batch=2, fp8=precision
        )
        groups = generator.generate(prompts, sampling)
        found.append([c.token_ids.tolist() for group in groups for c in group.completions])
        assert all(count % 16 == 0 for count in rows) is (precision is not None)
    hook.remove()
    assert found[0] == found[1]


def test_a_pass_in_bf16_puts_the_precision_back():
    made = config(fp8())
    with computing(made, fp8=False):
        assert made.fp8 is None
    assert made.fp8 == "hybrid"
    with computing(made, fp8=True):
        assert made.fp8 == "hybrid"


def test_reference_is_built_for_bf16_unless_it_scores_in_eight_bits(monkeypatch, ranks, checkpoint):
    recipe = Recipe()
    recipe.model.hf_path = str(checkpoint)
    recipe.model.precision.fp8.enabled = True
    assert build_model(recipe, ranks).config.fp8 == "hybrid"
    assert build_model(recipe, ranks, fp8=False).config.fp8 is None


@pytest.mark.parametrize("model", ["qwen2_5_vl_32b", "qwen2_5_vl_72b", "qwen3_vl_32b"])
def test_fp8_recipes_fit_their_models_and_gpus(model):
    recipe = compose_recipe(["--config-name", f"grpo_care_{model}_fp8"])
    assert recipe is not None
    hf = read_model_shape(recipe.model.hf_path).architecture
    check_planned(recipe, hf, read_gpu("h100-80gb"))
    with pytest.raises(InputError, match="--gpu a100-80gb"):
        check_planned(recipe, hf, read_gpu("a100-80gb"))
    precision = recipe.model.precision.fp8
    assert (precision.update, precision.scoring, precision.rollout) == (True, False, False)
