"""The command line that names a recipe: names of the user's choice, one run, texts as they are."""

import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from nemo_care.errors import InputError
from nemo_care.recipe.compose import compose_recipe


def composed(*arguments, name="grpo_care_qwen2_5_vl_7b"):
    return compose_recipe(["--config-name", name, *arguments])


def refusal(*arguments) -> str:
    with pytest.raises(InputError) as raised:
        composed(*arguments)
    message = str(raised.value)
    assert "\n" not in message
    return message


@pytest.fixture
def without_levels(tmp_path):
    """Composes a recipe whose data.validation.annotations is null."""
    (tmp_path / "mine.yaml").write_text(
        "defaults: [grpo_care_qwen2_5_vl_7b, _self_]\ndata: {validation: {annotations: null}}\n"
    )
    return lambda *arguments: composed("--config-path", str(tmp_path), *arguments, name="mine")


@pytest.mark.parametrize(
    ("plus", "override"), [("", "={L1: f}"), ("", ".L1=f"), ("+", ".L1=f"), ("++", "={L1: f}")]
)
def test_levels_are_named_on_the_command_line_where_the_recipe_has_none(
    without_levels, plus, override
):
    recipe = without_levels(f"{plus}data.validation.annotations{override}")
    assert recipe.data.validation.annotations == {"L1": "f"}
    # What opens the dictionary is no choice of the user's.
    assert recipe.exp_manager.name == "mine"


def test_a_recipe_that_inherits_no_levels_may_name_some(without_levels, tmp_path):
    assert without_levels().data.validation.annotations is None
    (tmp_path / "child.yaml").write_text(
        "defaults: [mine, _self_]\ndata: {validation: {annotations: {L9: g}}}\n"
    )
    recipe = composed("--config-path", str(tmp_path), name="child")
    assert recipe.data.validation.annotations == {"L9": "g"}


def test_printing_a_recipe_shows_the_levels_of_the_command_line(without_levels, capsys):
    assert without_levels("data.validation.annotations.L7=f", "--cfg", "job") is None
    assert "L7: f" in capsys.readouterr().out


def test_no_levels_and_a_level_contradict_each_other():
    message = refusal("data.validation.annotations=null", "data.validation.annotations.L1=f")
    assert message.endswith("data.validation.annotations.L1=f: give one of them")


@pytest.mark.parametrize("plus", ["", "+", "++"])
def test_arguments_of_loggers_need_no_plus(plus):
    recipe = composed(
        f"{plus}exp_manager.wandb_logger_kwargs.project=p",
        f"{plus}exp_manager.wandb_logger_kwargs.settings.init_timeout=5",
        f"{plus}exp_manager.mlflow_logger_kwargs={{project: p}}",
    )
    wandb = {"project": "p", "settings": {"init_timeout": 5}}
    assert recipe.exp_manager.wandb_logger_kwargs == wandb
    assert recipe.exp_manager.mlflow_logger_kwargs == {"project": "p"}


def test_other_keys_of_the_experiment_manager_are_still_refused():
    assert refusal("exp_manager.foo=p").startswith("unknown recipe key exp_manager.foo")
    assert refusal("+exp_manager.foo=p").startswith("unknown recipe key exp_manager.foo")


@pytest.mark.parametrize(
    "arguments",
    [
        ["-m"],
        ["--multirun", "trainer.seed=1,2"],
        ["--multi"],
        ["-rm"],
        ["hydra.mode=MULTIRUN"],
        ["++hydra.mode=multirun"],
        ["hydra/launcher=basic"],
        ["hydra.sweeper.params={trainer.seed: '1,2'}"],
    ],
)
def test_several_runs_of_one_command_are_refused(arguments):
    assert "one command trains one recipe" in refusal(*arguments)


@pytest.mark.parametrize("value", ["1,2", "range(1,3)", "choice(1,2)"])
def test_a_value_that_means_several_runs_is_refused(value):
    assert refusal(f"trainer.seed={value}").startswith(f"trainer.seed={value} means several runs")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--resolve"], ["--resolve", "--cfg job"]),
        (["--experimental-rerun", "x"], ["--experimental-rerun"]),
        (["--shell-completion"], ["--shell-completion"]),
        (["hydra.run.dir=/x"], ["hydra.run.dir", "exp_manager.explicit_log_dir"]),
        (["data.train.root=/a", "b"], ["b: not an option and not key=value"]),
    ],
)
def test_flags_and_keys_of_hydra_without_a_meaning_here_are_refused(arguments, parts):
    message = refusal(*arguments)
    for part in parts:
        assert part in message


@pytest.mark.parametrize("flags", [["-i"], ["--info", "searchpath"]])
def test_hydra_still_prints_about_itself(flags, capsys):
    assert composed(*flags) is None
    assert "Config search path" in capsys.readouterr().out


ODD_PATHS = (
    *("/a/it's", '/a/"b"', '/a/it\'s "b"', "/a/b,c", "/a/b=c", "/a/b#c", "/a/(b)", "/a/{b"),
    *("/a/[b", "/a/b%c&d@e", "/ü/ß", "/a~b", "/a;b", "/a!b", "/a<b>", "/a`b", "/a/b # c"),
    *("'/a", "/a,b'\\"),
)


@pytest.mark.parametrize("path", ODD_PATHS)
def test_a_path_that_hydra_would_not_take_is_refused_with_the_words_that_it_takes(path):
    message = refusal(f"data.train.root={path}")
    assert message.startswith(f"data.train.root={path}")
    # What the message says to type, as a shell reads it.
    remedy = message.split("needs quotes: ")[1].split("; a list needs brackets: ")[0]
    (word,) = shlex.split(remedy)
    assert OverridesParser.create().parse_override(word).value() == path


def test_the_remedy_for_a_list_and_a_dictionary_has_their_brackets():
    message = refusal("algorithm.rewards=accuracy,format")
    (word,) = shlex.split(message.split("a list needs brackets: ")[1])
    assert composed(word).algorithm.rewards == ["accuracy", "format"]
    message = refusal("data.validation.annotations={L1: /a#b}")
    assert "\"data.validation.annotations={NAME: 'TEXT'}\"" in message
    recipe = composed("data.validation.annotations={L1: '/a#b'}")
    assert recipe.data.validation.annotations["L1"] == "/a#b"
    assert "recipe file" in refusal("data.train.root=a\nb")
