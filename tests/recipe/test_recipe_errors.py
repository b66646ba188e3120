"""A mistake in a recipe or on the command line is one line that names the nearest valid names."""

import pytest

from nemo_care.errors import InputError
from nemo_care.recipe.compose import compose_recipe

BASE = "grpo_care_qwen2_5_vl_7b"
ROLLOUT_FP8 = "model.precision.fp8.rollout=true"


def refusal(*arguments: object) -> str:
    with pytest.raises(InputError) as raised:
        compose_recipe([str(argument) for argument in arguments])
    message = str(raised.value)
    assert "\n" not in message
    assert "search path" not in message
    return message


@pytest.fixture
def own(tmp_path):
    """Writes files into a folder of recipes; gives the message with which `mine` is refused."""

    def own(**files: str) -> str:
        for name, text in files.items():
            file = tmp_path / f"{name.replace('__', '/')}.yaml"
            file.parent.mkdir(exist_ok=True)
            file.write_text(text)
        return refusal("--config-path", tmp_path, "--config-name", "mine")

    return own


@pytest.mark.parametrize("key", ["trainer.max_stpes=3", "+trainer.max_stpes=3"])
def test_key_of_the_command_line(key):
    message = refusal("--config-name", BASE, key)
    assert message.startswith("unknown recipe key trainer.max_stpes; did you mean trainer.max_step")


def test_key_of_an_earlier_version():
    message = refusal("--config-name", BASE, "model.freeze_vision=true")
    assert message.startswith("unknown recipe key model.freeze_vision; did you mean ")
    assert "model.freeze," in message


def test_key_of_a_recipe_file(own):
    message = own(mine=f"defaults: [{BASE}, _self_]\nalgorithm: {{group_sise: 4}}\n")
    assert message.startswith("mine.yaml: unknown recipe key algorithm.group_sise")
    assert "did you mean algorithm.group_size" in message


def test_key_and_value_of_a_group_file(own):
    mine = f"defaults: [{BASE}, override layout: big, _self_]\n"
    group = "# @package _global_\nmodel: {tensor_paralel_size: 2}\n"
    message = own(mine=mine, layout__big=group)
    assert message.startswith("layout/big.yaml: unknown recipe key model.tensor_paralel_size")
    assert "model.tensor_model_parallel_size" in message
    group = "# @package _global_\nmodel: {tensor_model_parallel_size: two}\n"
    message = own(mine=mine, layout__big=group)
    assert message.startswith("layout/big.yaml: model.tensor_model_parallel_size: Value 'two'")


@pytest.mark.parametrize(
    ("group", "keys"), [("layout", "trainer: {devices: 2}"), ("data", "data: {workers: 1}")]
)
def test_group_file_with_full_keys_that_does_not_say_so(own, group, keys):
    mine = f"defaults: [{BASE}, override {group}: big, _self_]\n"
    message = own(mine=mine, **{f"{group}__big": keys})
    assert message.startswith(f"{group}/big.yaml: begin this file with the line `# @package")


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("data=vidoe_r1", ["data=vidoe_r1", "seed_bench_r1 or video_r1"]),
        ("+ablation=dense", ["ablation=dense", "dense_bonus"]),
        ("layuot=7b_1x8_h100", ["layuot", "did you mean layout?"]),
        ("+ablations=grpo", ["ablations", "did you mean ablation"]),
        ("ablation=grpo", ["+ablation=grpo"]),
        ("model.hf_path=${oc.env:NO_SUCH}", ["Environment variable 'NO_SUCH' not found"]),
    ],
)
def test_group_or_choice_that_does_not_exist(override, parts):
    message = refusal("--config-name", BASE, override)
    for part in parts:
        assert part in message


def test_group_of_a_recipe_file_that_does_not_exist(own):
    message = own(mine=f"defaults: [{BASE}, layuot: big, _self_]\n")
    assert (
        message == "layuot/big: there is no group layuot; groups: ablation, data, layout, model, "
        "objective, precision, rollout"
    )


def test_recipe_that_does_not_exist(own):
    message = refusal("--config-name", "grpo_care_qwen_7b")
    assert "there is no recipe grpo_care_qwen_7b; did you mean" in message
    assert BASE in message
    assert "recipes: grpo_care_qwen2_5_vl_32b" in refusal("--config-name", "no_such_thing")
    # Those of the user's own folder are near too, and what a recipe inherits may be mistyped.
    message = own(mine="defaults: [thiers, _self_]\n", theirs="defaults: [tiny_cpu, _self_]\n")
    assert message == "there is no recipe thiers; did you mean theirs?"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--config-name"],
        ["--config-name="],
        ["--config-name", "--cfg", "job"],
        ["--config-name", "trainer.max_steps=3"],
        ["trainer.max_steps=3"],
    ],
)
def test_config_name_without_a_value(arguments):
    message = refusal(*arguments)
    assert message.startswith("--config-name is missing or has no value; recipes: grpo_care_")


@pytest.mark.parametrize("arguments", [["--config-path"], ["--config-path=no/such/folder"]])
def test_config_path_that_is_no_folder(arguments):
    message = refusal("--config-name", BASE, *arguments)
    assert message.startswith("--config-path")
    assert message.endswith("no such folder")


def test_yaml_that_does_not_parse_is_named_by_its_line(own, tmp_path):
    message = own(mine="defaults: [tiny_cpu, _self_]\n trainer: {seed: 1}\n")
    assert message.startswith(f"{tmp_path}/mine.yaml:2: ")


def test_cuda_graphs_are_refused_where_they_can_not_be_captured():
    graphs = "rollout.cuda_graphs=true"
    with_vllm = refusal("--config-name", BASE, graphs, "rollout.backend=vllm")
    assert with_vllm.startswith(f"{graphs} is for rollout.backend=megatron")
    assert with_vllm.endswith("set it to false")
    in_ranks = ["rollout=megatron", graphs]
    eight_bits = refusal(
        "--config-name", f"{BASE.replace('7b', '72b')}_fp8", *in_ranks, ROLLOUT_FP8
    )
    assert eight_bits.startswith(f"{graphs} with {ROLLOUT_FP8}: ")
    assert eight_bits.endswith("set one of them to false")
    compose_recipe(["--config-name", BASE, *in_ranks])


def test_an_engine_can_not_be_waited_for_longer_than_a_collective_waits():
    message = refusal("--config-name", BASE, "rollout.vllm.timeout_seconds=7200")
    assert message.startswith("rollout.vllm.timeout_seconds=7200")
    assert "6000" in message
