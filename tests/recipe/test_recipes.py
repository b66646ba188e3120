"""The recipes that come with the package: they compose, fit their models, and do what they say."""

import math
import re
from copy import deepcopy
from functools import cache
from operator import attrgetter

import pytest
from transformers import Qwen2_5_VLConfig

from nemo_care.errors import InputError
from nemo_care.models.families.qwen2_5_vl.family import Qwen25VLFamily
from nemo_care.models.transformer_config import check_layout
from nemo_care.planning.shapes import read_model_shape
from nemo_care.ranks.process_groups import Layout
from nemo_care.recipe.compose import compose_recipe, recipe_changes, recipe_names
from nemo_care.recipe.schema import Recipe, check_training, check_world
from nemo_care.rollouts.build import check_engines

PAPER = "grpo_care_qwen2_5_vl_7b"
SIZES = ("3b", "7b", "32b", "72b")
GPUS_OF_A_NODE = 8
# The published configurations of Qwen2.5-VL-*-Instruct.
SHAPES = {
    "3b": {"num_attention_heads": 16, "num_key_value_heads": 2, "num_hidden_layers": 36,
           "hidden_size": 2048, "intermediate_size": 11008},
    "7b": {"num_attention_heads": 28, "num_key_value_heads": 4, "num_hidden_layers": 28,
           "hidden_size": 3584, "intermediate_size": 18944},
    "32b": {"num_attention_heads": 40, "num_key_value_heads": 8, "num_hidden_layers": 64,
            "hidden_size": 5120, "intermediate_size": 27648},
    "72b": {"num_attention_heads": 64, "num_key_value_heads": 8, "num_hidden_layers": 80,
            "hidden_size": 8192, "intermediate_size": 29568},
}  # fmt: skip


@cache
def composed(name: str, *overrides: str) -> Recipe:
    """A recipe, composed once; read only."""
    recipe = compose_recipe(["--config-name", name, *overrides])
    assert recipe is not None
    return recipe


def changes(old: Recipe, new: Recipe) -> list[str]:
    """What differs, but for the run's name."""
    changes = recipe_changes(old, new).items()
    return [f"{key}: {a} -> {b}" for key, (a, b) in changes if not key.startswith("exp_manager.")]


@pytest.fixture(autouse=True)
def _no_folders_of_the_user(monkeypatch):
    for name in ("NEMO_CARE_MODELS", "NEMO_CARE_DATA"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_fits_the_schema_and_runs_under_its_own_name(name):
    assert composed(name).exp_manager.name == name


def test_only_what_a_user_can_run_is_listed():
    listed = recipe_names()
    assert {"tiny_cpu", "tiny_cpu_grpo", *(f"grpo_care_qwen2_5_vl_{s}" for s in SIZES)} < {*listed}
    assert not {"base", "qwen2_5_vl_7b", "seed_bench_r1", "grpo"} & {*listed}


@pytest.mark.parametrize(("size", "nodes"), [("3b", 1), ("7b", 1), ("32b", 4), ("72b", 8)])
def test_layout_divides_the_model_and_fills_nodes_of_eight_gpus(size, nodes):
    recipe = composed(f"grpo_care_qwen2_5_vl_{size}")
    family = Qwen25VLFamily(Qwen2_5_VLConfig(text_config=SHAPES[size]))
    check_layout(family.architecture, Layout.of(recipe))
    assert (recipe.trainer.num_nodes, recipe.trainer.devices) == (nodes, GPUS_OF_A_NODE)
    # Tensor parallelism talks in every layer: it stays inside a node.
    assert GPUS_OF_A_NODE % recipe.model.tensor_model_parallel_size == 0
    assert recipe.model.sequence_parallel
    assert recipe.model.hf_path == f"models/Qwen2.5-VL-{size.upper()}-Instruct"


@pytest.mark.parametrize(
    ("size", "nodes"), [("4b", 1), ("8b", 1), ("32b", 4), ("30b_a3b", 2), ("235b_a22b", 16)]
)
def test_layout_of_the_second_family_divides_its_published_models(size, nodes):
    recipe = composed(f"grpo_care_qwen3_vl_{size}")
    name = f"Qwen3-VL-{size.upper().replace('_', '-')}-Instruct"
    check_layout(read_model_shape(f"nowhere/{name}").architecture, Layout.of(recipe))
    assert (recipe.trainer.num_nodes, recipe.trainer.devices) == (nodes, GPUS_OF_A_NODE)
    assert recipe.model.sequence_parallel
    assert recipe.model.hf_path == f"models/{name}"


def test_sizes_differ_in_model_layout_and_number_of_prompts_only():
    layout = {
        "trainer.devices",
        "trainer.num_nodes",
        "model.tensor_model_parallel_size",
        "model.pipeline_model_parallel_size",
        "model.expert_model_parallel_size",
        "algorithm.reference.offload",
        "optimizer.offload",
        "rollout.groups_per_batch",
        "evaluation.samples_per_batch",
        # The second family samples in the training ranks.
        "rollout.backend",
        "rollout.vllm.tensor_parallel_size",
        "rollout.vllm.gpu_memory_utilization",
    }
    names = [f"qwen2_5_vl_{size}" for size in SIZES]
    names += [f"qwen3_vl_{size}" for size in ("4b", "8b", "32b", "30b_a3b", "235b_a22b")]
    for name, prompts in zip(names, (4, 4, 8, 16, 4, 4, 8, 4, 32), strict=True):
        recipe = composed(f"grpo_care_{name}")
        keys = {change.split(":")[0] for change in changes(composed(PAPER), recipe)}
        allowed = {*layout, "model.hf_path", "algorithm.prompts_per_step", "trainer.max_steps"}
        assert keys <= allowed
        assert recipe.algorithm.prompts_per_step == prompts
        assert recipe.trainer.max_steps == math.ceil(6000 / prompts)


def test_7b_recipe_has_the_settings_of_the_paper():
    paper = {
        "algorithm.group_size": 8,
        "algorithm.prompts_per_step": 4,
        "algorithm.updates_per_rollout": 1,
        "algorithm.kl_coefficient": 0.0,
        "algorithm.min_reasoning_words": 0,
        "algorithm.rewards": ["accuracy", "format"],
        "algorithm.reward_weights": None,
        "algorithm.consistency.kind": "group",
        "algorithm.consistency.bonus_coefficient": 0.5,
        "algorithm.consistency.margin": 0.0,
        "algorithm.consistency.likelihood_clip": 0.95,
        "algorithm.consistency.accuracy_threshold": 0.1,
        "algorithm.reference.ema_decay": 0.995,
        "algorithm.reference.ema_update_every": 10,
        "rollout.temperature": 1.0,
        "rollout.top_p": 0.95,
        "rollout.max_completion_tokens": 768,
        "optimizer.lr": 1e-6,
        "optimizer.schedule": "cosine",
        "optimizer.weight_decay": 0.01,
        "optimizer.clip_grad": 5.0,
        "model.precision.dtype": "bf16",
        "model.freeze": [],
        "data.max_prompt_tokens": 16384,
        "data.video.fps": 2.0,
        "data.video.min_frames": 4,
        "data.video.max_frames": 16,
        "data.video.max_pixels": 128 * 28 * 28,
        "data.image.max_pixels": 401408,
        "data.train.kind": "seed_bench_r1",
        "data.train.annotations": "annotations/training_6k.jsonl",
        "data.train.root": "data/SEED-Bench-R1",
        "data.validation.kind": "seed_bench_r1",
        "data.validation.root": "data/SEED-Bench-R1",
        "data.validation.annotations": {
            level: f"annotations/validation_{level}.jsonl" for level in ("L1", "L2", "L3")
        },
        "data.validation.samples_per_level": None,
        "data.validation.max_frames": None,
        # One epoch of 6,000 samples with 4 of them a step.
        "trainer.max_steps": 1500,
    }
    recipe = composed(PAPER)
    assert {key: attrgetter(key)(recipe) for key in paper} == paper


def test_video_r1_recipe_changes_data_steps_margin_and_frames_of_validation():
    recipe = composed(f"{PAPER}_video_r1")
    assert changes(composed(PAPER), recipe) == [
        "trainer.max_steps: 1500 -> 1000",
        "algorithm.consistency.margin: 0.0 -> 0.01",
        "data.train.kind: seed_bench_r1 -> video_r1",
        "data.train.root: data/SEED-Bench-R1 -> data/Video-R1-data",
        "data.train.annotations: annotations/training_6k.jsonl -> Video-R1-260k.json",
        "data.validation.kind: seed_bench_r1 -> video_r1",
        "data.validation.root: data/SEED-Bench-R1 -> data/Video-R1-eval",
        "data.validation.annotations.MMVU: None -> eval_mmvu.json",
        "data.validation.annotations.MVBench: None -> eval_mvbench.json",
        "data.validation.annotations.TempCompass: None -> eval_tempcompass.json",
        "data.validation.annotations.Video-MME: None -> eval_videomme.json",
        "data.validation.annotations.Video-MMMU: None -> eval_videommmu.json",
        "data.validation.annotations.VSI-Bench: None -> eval_vsibench.json",
        "data.validation.max_frames: None -> 32",
    ]
    assert "L1" not in recipe.data.validation.annotations


ABLATIONS = {
    "grpo": [
        "algorithm.kl_coefficient: 0.0 -> 0.04",
        "algorithm.consistency.bonus_coefficient: 0.5 -> 0.0",
        "algorithm.reference.ema_update_every: 10 -> 0",
    ],
    "no_kl_no_bonus": ["algorithm.consistency.bonus_coefficient: 0.5 -> 0.0"],
    "kl_to_ema": [
        "algorithm.kl_coefficient: 0.0 -> 0.04",
        "algorithm.consistency.bonus_coefficient: 0.5 -> 0.0",
    ],
    "frozen_reference": ["algorithm.reference.ema_update_every: 10 -> 0"],
    "dense_bonus": ["algorithm.consistency.kind: group -> dense"],
    "counterfactual": [
        "algorithm.consistency.kind: group -> counterfactual",
        "algorithm.consistency.bonus_coefficient: 0.5 -> 1.0",
    ],
    "accurate_bonus": ["algorithm.consistency.kind: group -> accurate"],
    "margin_0_01": ["algorithm.consistency.margin: 0.0 -> 0.01"],
}


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_ablation_changes_what_it_says_and_nothing_else(ablation):
    recipe = composed(PAPER, f"+ablation={ablation}")
    assert changes(composed(PAPER), recipe) == ABLATIONS[ablation]
    # In a run directory of its own.
    assert recipe.exp_manager.name == f"{PAPER}_{ablation}"


@pytest.mark.parametrize("model", ["qwen2_5_vl_32b", "qwen2_5_vl_72b", "qwen3_vl_32b"])
def test_fp8_recipe_changes_precision_kernels_and_the_first_step_s_bounds_only(model):
    base = f"grpo_care_{model}"
    wanted = [
        "model.backend: auto -> transformer_engine",
        "model.precision.fp8.enabled: False -> True",
        "algorithm.reference.max_logprob_difference: 0.01 -> 0.1",
        "rollout.max_logprob_difference: 0.05 -> 0.1",
    ]
    assert changes(composed(base), composed(f"{base}_fp8")) == wanted
    # As a group it does the same, in a run directory of its own.
    other = composed(base, "+precision=fp8")
    assert changes(composed(base), other) == wanted
    assert other.exp_manager.name == f"{base}_fp8"


def test_big_recipes_sample_with_vllm_where_it_samples_their_family():
    for name in recipe_names():
        backend = "vllm" if "qwen2_5_vl" in name else "megatron"
        assert composed(name).rollout.backend == backend, name
        assert not composed(name).rollout.asynchronous


ROLLOUTS = [
    ("qwen2_5_vl_7b", "megatron"),
    *((f"qwen2_5_vl_{size}", kind) for size in SIZES for kind in ("vllm", "vllm_async")),
    *((f"qwen3_vl_{size}", kind) for size in ("4b", "8b") for kind in ("vllm", "vllm_async")),
    *(("qwen3_vl_30b_a3b", kind) for kind in ("vllm", "vllm_async")),
    # Its engines have no room on the training GPUs.
    ("qwen3_vl_235b_a22b", "vllm_async"),
]


@pytest.mark.parametrize(("name", "rollout"), ROLLOUTS)
def test_every_rollout_of_a_big_recipe_has_engines_that_fit_its_ranks(name, rollout, monkeypatch):
    # As in a plan: the GPUs of this machine do not count.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    base = f"grpo_care_{name}"
    recipe = composed(base, f"rollout={rollout}")
    architecture = read_model_shape(recipe.model.hf_path).architecture
    check_world(recipe)
    check_training(recipe)
    check_engines(recipe, architecture)
    engines = recipe.rollout.vllm
    on_machine = recipe.trainer.devices + len(engines.gpus or ())
    assert on_machine == GPUS_OF_A_NODE
    assert (engines.tensor_parallel_size > 1) == (rollout != "megatron")
    assert recipe.rollout.asynchronous == (rollout == "vllm_async")
    # A run resumes with any of them.
    assert recipe.exp_manager.name == base


def test_asynchronous_rollouts_weight_the_tokens_of_older_weights():
    recipe = composed(PAPER, "rollout=vllm_async")
    assert recipe.rollout.importance_sampling.enabled
    assert recipe.rollout.max_staleness == 1


def test_the_rollout_of_the_users_own_recipe_is_a_choice_too(tmp_path):
    (tmp_path / "ours.yaml").write_text("defaults: [tiny_cpu, _self_]\n")
    command = ["--config-path", str(tmp_path), "--config-name", "ours"]
    default, engines = (compose_recipe([*command, *more]) for more in ([], ["rollout=vllm"]))
    assert changes(default, engines) == ["rollout.backend: megatron -> vllm"]
    with pytest.raises(InputError, match=r"rollout\.vllm\.gpus .* or rollout\.vllm\.ray_address"):
        compose_recipe([*command, "rollout=vllm_async"])


def test_margin_0_undoes_the_margin_of_video_r1():
    base = f"{PAPER}_video_r1"
    recipe = composed(base, "+ablation=margin_0")
    assert changes(composed(base), recipe) == ["algorithm.consistency.margin: 0.01 -> 0.0"]


def test_groups_are_exchanged_on_the_command_line():
    overrides = ["data=video_r1", "layout=7b_1x8_h100", "+ablation=grpo"]
    recipe = composed("grpo_care_qwen2_5_vl_3b", *overrides)
    assert recipe.data.train.kind == "video_r1"
    assert recipe.model.tensor_model_parallel_size == 4
    assert recipe.algorithm.kl_coefficient == 0.04
    # The layout is not part of the name: a run goes on with any.
    assert recipe.exp_manager.name == "grpo_care_qwen2_5_vl_3b_video_r1_grpo"


def test_an_epoch_has_fewer_steps_with_more_prompts_each():
    assert composed(PAPER, "algorithm.prompts_per_step=32").trainer.max_steps == 188
    both = ["algorithm.prompts_per_step=32", "trainer.max_steps=7"]
    assert composed(PAPER, *both).trainer.max_steps == 7


def test_models_and_data_lie_where_the_user_says_once(monkeypatch):
    monkeypatch.setenv("NEMO_CARE_MODELS", "/m")
    monkeypatch.setenv("NEMO_CARE_DATA", "/d")
    recipe = compose_recipe(["--config-name", f"{PAPER}_video_r1"])
    assert recipe.model.hf_path == "/m/Qwen2.5-VL-7B-Instruct"
    assert recipe.data.train.root == "/d/Video-R1-data"
    assert recipe.data.validation.root == "/d/Video-R1-eval"


def test_recipe_of_the_users_own_folder_runs_under_its_own_name(tmp_path):
    (tmp_path / "ours.yaml").write_text("defaults: [tiny_cpu, layout: two, _self_]\n")
    (tmp_path / "layout").mkdir()
    file = tmp_path / "layout" / "two.yaml"
    file.write_text("# @package _global_\ntrainer: {devices: 2}\n")
    recipe = compose_recipe(["--config-path", str(tmp_path), "--config-name", "ours"])
    assert (recipe.exp_manager.name, recipe.trainer.devices) == ("ours", 2)


def test_changed_keys_of_two_recipes_are_named():
    old, new = (compose_recipe(["--config-name", "tiny_cpu"]) for _ in range(2))
    assert recipe_changes(old, new) == {}
    new.algorithm.consistency.margin = 0.1
    assert recipe_changes(old, new) == {"algorithm.consistency.margin": [0.01, 0.1]}


def test_hydra_alone_composes_what_nemo_s_runner_does(tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").write_text(
        "defaults: [tiny_cpu, _self_]\ntrainer: {max_steps: '${multiply:2,21}'}\n"
    )
    command = ["--config-path", str(tmp_path), "--config-name", "mine", "rollout.top_p=0.5"]
    alone = compose_recipe(command)
    assert alone is not None
    assert (alone.trainer.max_steps, alone.rollout.top_p) == (42, 0.5)
    from nemo.core.config import hydra_runner

    asked = []
    monkeypatch.setattr(
        "hydra.main",
        lambda version_base, config_path: asked.append("NeMo") or hydra_runner(config_path),
    )
    assert compose_recipe(command) == alone
    assert asked == ["NeMo"]


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        # A 72B on one node; then layouts that would need a quarter more, and a laptop's two ranks.
        ({"num_nodes": 1}, "set trainer.num_nodes=4 (or a multiple)"),
        ({"num_nodes": 1, "tensor": 4, "pipeline": 5}, "trainer.num_nodes=5 (or a multiple)"),
        ({"num_nodes": 1, "devices": 1, "tensor": 2, "pipeline": 1}, "set trainer.devices=2"),
    ],
)
def test_ranks_that_make_no_whole_replica_are_refused_with_numbers_that_do(changes, remedy):
    recipe = deepcopy(composed("grpo_care_qwen2_5_vl_72b"))
    check_world(recipe)
    recipe.trainer.num_nodes = changes["num_nodes"]
    recipe.trainer.devices = changes.get("devices", GPUS_OF_A_NODE)
    recipe.model.tensor_model_parallel_size = changes.get("tensor", 8)
    recipe.model.pipeline_model_parallel_size = changes.get("pipeline", 4)
    with pytest.raises(InputError, match=re.escape(remedy)):
        check_world(recipe)
