"""Values that no key takes: numbers that are not finite, empty texts, lone braces."""

import re
from dataclasses import fields, is_dataclass
from typing import get_args, get_type_hints

import pytest
from omegaconf import OmegaConf

from nemo_care.errors import InputError
from nemo_care.recipe.compose import compose_recipe, to_recipe
from nemo_care.recipe.data import SourceConfig
from nemo_care.recipe.schema import Recipe, check_recipe


def keys_of(kind: type, schema: type = Recipe, prefix: str = "") -> list[str]:
    """Keys of the schema that hold a value of a type, alone or in a list or mapping."""
    keys = []
    for field in fields(schema):
        hint = get_type_hints(schema)[field.name]
        if isinstance(hint, type) and is_dataclass(hint):
            keys += keys_of(kind, hint, f"{prefix}{field.name}.")
            continue
        inner = [hint, *get_args(hint), *(a for arg in get_args(hint) for a in get_args(arg))]
        if kind in inner:
            keys.append(prefix + field.name)
    return keys


def with_value(key: str, value: object) -> Recipe:
    """A recipe that is fine but for that value; a list or mapping has it as its only item."""
    recipe = Recipe()
    recipe.trainer.max_steps = 1
    recipe.model.hf_path = "model"
    *path, name = key.split(".")
    owner = recipe
    for part in path:
        owner = getattr(owner, part)
    hint = str(get_type_hints(type(owner))[name])
    setattr(owner, name, [value] if "list[" in hint else {"x": value} if "dict[" in hint else value)
    return recipe


FREE = ("exp_manager.wandb_logger_kwargs", "exp_manager.mlflow_logger_kwargs")


def test_the_recipe_of_these_tests_is_fine_otherwise():
    check_recipe(with_value("trainer.seed", 1))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("key", keys_of(float))
def test_numbers_that_are_not_finite_are_refused(key, value):
    with pytest.raises(InputError, match=f"^{key}.*={value}: must be a finite number"):
        check_recipe(with_value(key, value))


@pytest.mark.parametrize("value", ["", " "])
@pytest.mark.parametrize("key", [key for key in keys_of(str) if key not in FREE])
def test_empty_texts_are_refused(key, value):
    with pytest.raises(InputError, match=f"^{key}.* is empty: give it a value"):
        check_recipe(with_value(key, value))


def test_there_are_as_many_such_keys_as_one_would_think():
    assert {"rollout.temperature", "algorithm.reward_weights"} <= {*keys_of(float)}
    assert len(keys_of(float)) > 30
    assert {"model.hf_path", "exp_manager.explicit_log_dir", "rollout.vllm.ray_address"} <= {
        *keys_of(str)
    }
    assert len(keys_of(str)) > 20


def test_sources_and_names_of_levels_are_looked_at_too():
    recipe = with_value("trainer.seed", 1)
    recipe.data.train.sources = [SourceConfig(root="a"), SourceConfig(root="")]
    with pytest.raises(InputError, match=r"^data\.train\.sources\[1\]\.root is empty"):
        check_recipe(recipe)
    recipe.data.train.sources = None
    recipe.data.validation.annotations = {"": "file"}
    with pytest.raises(InputError, match=r"^data\.validation\.annotations .*is empty"):
        check_recipe(recipe)


@pytest.mark.parametrize("text", ["nan", "-1e999"])
def test_numbers_of_the_command_line_that_are_not_finite(text):
    with pytest.raises(InputError, match=r"rollout\.temperature=.*finite"):
        compose_recipe(["--config-name", "tiny_cpu", f"rollout.temperature={text}"])


@pytest.mark.parametrize("text", ["-.inf", "1.0e999"])
def test_numbers_of_a_file_that_are_not_finite(text):
    config = OmegaConf.create(
        f"{{trainer: {{max_steps: 1}}, model: {{hf_path: m}}, optimizer: {{lr: {text}}}}}"
    )
    with pytest.raises(InputError, match=r"optimizer\.lr=.*finite"):
        to_recipe(config)


@pytest.mark.parametrize(
    ("key", "value", "parts"),
    [
        ("algorithm.group_size", 1, ["algorithm.group_size=1", "at least 2"]),
        ("rollout.top_p", 1.5, ["rollout.top_p=1.5", "between"]),
        ("algorithm.consistency.kind", "sparse", ["kind=sparse", "or dense or counterfactual"]),
        ("data.validation.max_frames", 2, ["data.video.min_frames", "data.validation.max_frames"]),
        ("trainer.resume", "maybe", ["trainer.resume=maybe", "auto or never"]),
        ("data.train.kind", "parquet", ["data.train.kind=parquet", "seed_bench_r1", "video_r1"]),
        ("model.sequence_parallel", True, ["model.sequence_parallel"]),
        ("data.train.sources", SourceConfig(root="x", weight=0), ["sources[0].weight=0", "above"]),
        ("data.train.sources", SourceConfig(root="x", kind="csv"), ["sources[0].kind=csv"]),
    ],
)
def test_a_value_that_its_key_does_not_take_is_named_with_those_it_takes(key, value, parts):
    with pytest.raises(InputError) as raised:
        check_recipe(with_value(key, value))
    assert all(part in str(raised.value) for part in parts)


@pytest.mark.parametrize(
    ("sources", "part"),
    [
        ("[]", "data.train.sources is empty"),
        ("[{kind: jsonl}]", "data.train.sources[0].root"),
        ("[{root: x, wait: 1}]", "wait"),
    ],
)
def test_sources_of_a_file_that_are_not_whole_are_named(sources, part):
    given = (
        f"trainer: {{max_steps: 1}}\nmodel: {{hf_path: m}}\ndata: {{train: {{sources: {sources}}}}}"
    )
    config = OmegaConf.create(given)
    with pytest.raises(InputError, match=re.escape(part)):
        to_recipe(config)


@pytest.mark.parametrize("name", ["../../x", "..", ".", "/x", "a/../../x"])
def test_a_run_does_not_leave_its_folder(name):
    with pytest.raises(InputError, match=r"exp_manager\.explicit_log_dir"):
        check_recipe(with_value("exp_manager.name", name))


@pytest.mark.parametrize("name", ["x", "ablations/x", "..x"])
def test_a_run_may_have_a_folder_inside(name):
    check_recipe(with_value("exp_manager.name", name))


def test_arguments_of_loggers_may_be_empty():
    for key in FREE:
        check_recipe(with_value(key, ""))


@pytest.mark.parametrize(
    "template",
    [
        *("{question} {", "{question} }", "{question} {}", "{question} {0}", "{question!x}"),
        *("{question!}", "{question:d}", "{question:{width}}", "{question.text}", "{question[0]}"),
        *("{question", "question}", "hello", '{question} {"answer": "A"}', "{question:{}}"),
    ],
)
def test_braces_of_a_prompt_that_are_no_field_are_one_line_that_says_to_double_them(template):
    with pytest.raises(InputError) as raised:
        check_recipe(with_value("data.prompt_template", template))
    message = str(raised.value)
    assert "\n" not in message
    assert message.startswith("data.prompt_template: ")
    assert message.endswith("double every brace that is text: {{ and }}")


@pytest.mark.parametrize(
    "template", ["{question}", '{question} {{"answer": "A"}}', "{question:>9}"]
)
def test_doubled_braces_of_a_prompt_are_text(template):
    check_recipe(with_value("data.prompt_template", template))
