"""Rewards of the user's own: found by import path, weighted, recorded, and never swallowed."""

import math
import re
import sys
import textwrap
from pathlib import Path

import numpy
import pytest
import torch
from records import lines
from small_runs import small_recipe, small_trainer

from nemo_care.data.samples import Sample
from nemo_care.errors import InputError
from nemo_care.objective.rewards import base_reward
from nemo_care.recipe.algorithm import AlgorithmConfig
from nemo_care.scoring.reward_functions import load_rewards, reward_value

REPOSITORY = Path(__file__).parents[2]
SAMPLE = Sample("the-prompt", "which way ?", "B")
MODULE = """
import os
from pathlib import Path

def letters(completion, sample):
    return len(completion) % 7 / 2 + len(sample.solution)

def shout(*, completion, **more):
    return -1.5 if "it" in completion else 2

def fails(completion, sample):
    raise KeyError("no such thing")

def leaves(completion, sample):
    raise SystemExit(0)

def gives_nan(completion, sample):
    return float("nan")

def positional(text, sample):
    return 0.0

def counted(completion, sample):
    with Path("calls").open("a") as file:
        file.write(f"{os.getpid()}\\n")
    return 0.25

def format(completion, sample):
    return 0.0

def total(completion, sample):
    return 0.0

number = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A folder with the modules above, importable during the test."""
    folder = tmp_path / "own"
    (folder / "kept_rewards").mkdir(parents=True)
    (folder / "kept_rewards" / "__init__.py").touch()
    for name in ("own_rewards.py", "kept_rewards/more.py"):
        (folder / name).write_text(MODULE)
    (folder / "broken_rewards.py").write_text("import os\n\nos.no_such_name\n")
    (folder / "torn_rewards.py").write_text("def reward(:\n")
    (folder / "needy_rewards.py").write_text("import a_package_that_nobody_has\n")
    (folder / "script_rewards.py").write_text("raise SystemExit(0)\n")
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    known = set(sys.modules)
    yield folder
    for name in set(sys.modules) - known:
        if "_rewards" in name:
            del sys.modules[name]


@pytest.fixture
def recipe(checkpoint, world):
    return small_recipe(checkpoint, world)


def config(*rewards: str, weights=None, bonus=0.5) -> AlgorithmConfig:
    made = AlgorithmConfig(rewards=list(rewards), reward_weights=weights)
    made.consistency.bonus_coefficient = bonus
    return made


# ---------------------------------------------------------------------- what a recipe may name


def test_rewards_are_found_by_import_path_in_the_recipes_order(module):
    rewards = load_rewards(
        config("format", "kept_rewards.more.letters", "accuracy", "own_rewards.shout")
    )
    assert list(rewards) == ["format", "letters", "accuracy", "shout"]
    text = "<think> it moves </think> <answer> B </answer>"
    values = [reward_value(name, reward, text, SAMPLE) for name, reward in rewards.items()]
    assert values == [1.0, len(text) % 7 / 2 + 1, 1.0, -1.5]
    assert all(isinstance(value, float) for value in values)


def test_format_keeps_its_minimum_of_reasoning_words():
    text = "<think> it moves </think> <answer> B </answer>"
    for words, expected in ((2, 1.0), (3, 0.0)):
        made = AlgorithmConfig(min_reasoning_words=words)
        assert reward_value("format", load_rewards(made)["format"], text, SAMPLE) == expected


@pytest.mark.parametrize(
    ("made", "parts"),
    [
        (config(), ["algorithm.rewards is empty"]),
        (config("accuracy", "formt"), ["'formt' is unknown", "accuracy, format"]),
        (config("accuracy", "own/rewards.py:f"), ["'own/rewards.py:f' is unknown"]),
        (config("accuracy", "own_rewards..f"), ["'own_rewards..f' is unknown"]),
        (config("accuracy", "accuracy"), ["accuracy and accuracy", "name it once"]),
        (
            config("accuracy", "own_rewards.letters", "kept_rewards.more.letters"),
            ["own_rewards.letters and kept_rewards.more.letters", "reward/letters", "rename"],
        ),
        (config("accuracy", "own_rewards.format"), ["own_rewards.format", "reward/format"]),
        (config("accuracy", "own_rewards.total"), ["own_rewards.total", "reward/total"]),
        (
            config("accuracy", "format", weights=[1.0]),
            ["algorithm.reward_weights has 1 numbers", "algorithm.rewards has 2", "null"],
        ),
        (config("accuracy", weights=[]), ["algorithm.reward_weights has 0 numbers"]),
        (config("accuracy", weights=[math.nan]), ["algorithm.reward_weights=[nan]", "finite"]),
        (
            config("format"),
            ["no accuracy", "algorithm.consistency.bonus_coefficient=0.5", "add accuracy"],
        ),
        (
            config("accuracy", "format", weights=[0.0, 0.0], bonus=0.0),
            ["algorithm.reward_weights=[0.0, 0.0]", "all rewards have weight 0"],
        ),
        (
            config("accuracy", "no_such_package.rewards.f"),
            ["no_such_package.rewards.f", "No module named 'no_such_package'", "working directory"],
        ),
        (
            config("accuracy", "needy_rewards.f"),
            ["needy_rewards.f", "a_package_that_nobody_has", "needy_rewards.py:1"],
        ),
        (
            config("accuracy", "broken_rewards.f"),
            ["broken_rewards.f", "AttributeError", "no_such_name", "broken_rewards.py:3"],
        ),
        (config("accuracy", "torn_rewards.f"), ["torn_rewards.f", "SyntaxError"]),
        (config("accuracy", "script_rewards.f"), ["script_rewards.f", "SystemExit"]),
        (config("accuracy", "own_rewards.no"), ["own_rewards.no", "module own_rewards has no no"]),
        (config("accuracy", "own_rewards.number"), ["own_rewards.number", "type int"]),
        (
            config("accuracy", "own_rewards.positional"),
            ["own_rewards.positional", "completion and sample", "'text'"],
        ),
    ],
)
def test_unusable_rewards_are_refused_with_key_and_remedy(module, made, parts):
    with pytest.raises(InputError) as caught:
        load_rewards(made)
    message = str(caught.value)
    assert "\n" not in message
    assert "algorithm.rewards" in message or "algorithm.reward_weights" in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    "made",
    [
        config("accuracy", "format", weights=[0.0, 0.0]),
        config("accuracy", "format", weights=[1.0, -0.5]),
        config("format", bonus=0.0),
        config("accuracy"),
    ],
)
def test_weights_may_be_zero_or_negative_and_rewards_left_out(made):
    assert list(load_rewards(made)) == made.rewards


def test_base_reward_is_the_weighted_sum():
    rewards = torch.tensor([[1.0, 0.0, 0.5], [1.0, 1.0, 0.0], [-3.0, 2.0, 0.25]])
    expected = [1 + 0.5 - 6, 0.5 + 4, 0.5 + 0.5]
    assert base_reward(rewards, [1, 0.5, 2]).tolist() == expected
    assert base_reward(rewards[:2], [1, 1]).tolist() == [2.0, 1.0, 0.5]


# ---------------------------------------------------------------------- what a reward may return


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1, 1.0),
        (True, 1.0),
        (-0.5, -0.5),
        (numpy.float32(0.5), 0.5),
        (numpy.bool_(True), 1.0),
        (torch.tensor(0.25), 0.25),
    ],
)
def test_scalars_of_any_library_are_numbers(value, expected):
    assert reward_value("mine", lambda completion, sample: value, "text", SAMPLE) == expected


@pytest.mark.parametrize(
    "value",
    [
        None,
        "1.0",
        [1.0],
        math.nan,
        math.inf,
        -math.inf,
        1e39,
        1j,
        numpy.ones(2),
        torch.ones(2),
        10**400,
    ],
    ids=str,
)
def test_anything_else_is_an_error_that_names_reward_and_prompt(value):
    with pytest.raises(ValueError, match=r"reward mine .* prompt the-prompt: .*finite number"):
        reward_value("mine", lambda completion, sample: value, "text", SAMPLE)


# ---------------------------------------------------------------------- in a run


def test_own_reward_is_weighted_recorded_and_learned_from(module, recipe, ranks, tmp_path):
    recipe.trainer.max_steps = 2
    recipe.algorithm.rewards = ["own_rewards.letters", "accuracy", "format", "own_rewards.shout"]
    recipe.algorithm.reward_weights = [2.0, 1.0, 0.5, 0.0]
    small_trainer(recipe, ranks, tmp_path / "run", saves=False).fit()
    for record in lines(tmp_path / "run" / "metrics.jsonl"):
        file = tmp_path / "run" / "rollouts" / f"step_{record['step']:06d}.jsonl"
        rows = lines(file)
        groups: dict[int, list[dict]] = {}
        for row in rows:
            text = row["completion"]
            assert row["reward/letters"] == pytest.approx(len(text) % 7 / 2 + 1)
            assert row["reward/shout"] == (-1.5 if "it" in text else 2)
            weighted = 2 * row["reward/letters"] + row["accuracy"] + 0.5 * row["format"]
            assert row["reward"] == pytest.approx(weighted + row["bonus"])
            # The bonus goes by the accuracy itself.
            assert row["bonus"] in (0, pytest.approx(0.5 * row["accuracy"]))
            groups.setdefault(row["prompt_index"], []).append(row)
        for group in groups.values():
            rewards = numpy.array([row["reward"] for row in group])
            expected = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-4)
            assert [row["advantage"] for row in group] == pytest.approx(expected, abs=1e-4)
        for key, name in (
            ("reward/letters", "reward/letters"),
            ("reward/shout", "reward/shout"),
            ("reward/accuracy", "accuracy"),
            ("reward/format", "format"),
            ("reward/total", "reward"),
        ):
            assert record[key] == pytest.approx(sum(row[name] for row in rows) / len(rows))
    assert any(row["advantage"] for row in rows)


def test_weights_of_one_change_nothing(recipe, ranks, tmp_path):
    recipe.trainer.max_steps = 1
    for name, weights in (("null", None), ("ones", [1.0, 1.0])):
        recipe.algorithm.reward_weights = weights
        small_trainer(recipe, ranks, tmp_path / name, saves=False).fit()
    plain, ones = (
        (tmp_path / name / "rollouts" / "step_000001.jsonl").read_text()
        for name in ("null", "ones")
    )
    assert plain == ones


@pytest.mark.slow  # a reward function has no state that a checkpoint could lose
def test_resumed_run_with_an_own_reward_equals_the_uninterrupted_one(
    module, recipe, ranks, tmp_path
):
    recipe.algorithm.rewards += ["own_rewards.letters"]
    for name, parts in (("whole", [2]), ("parts", [1, 2])):
        recipe.checkpoint.save_interval = 1
        for steps in parts:
            recipe.trainer.max_steps = steps
            small_trainer(recipe, ranks, tmp_path / name).fit()
    for file in sorted((tmp_path / "whole" / "rollouts").iterdir()):
        assert file.read_text() == (tmp_path / "parts" / "rollouts" / file.name).read_text()
    whole, parts = (
        [
            {k: v for k, v in record.items() if not k.startswith(("timing/", "memory/"))}
            for record in lines(tmp_path / name / "metrics.jsonl")
        ]
        for name in ("whole", "parts")
    )
    assert whole == parts


def test_rewards_that_are_left_out_are_null_in_the_records(module, recipe, ranks, tmp_path):
    recipe.trainer.max_steps = 1
    recipe.algorithm.rewards = ["own_rewards.letters"]
    recipe.algorithm.consistency.bonus_coefficient = 0.0
    small_trainer(recipe, ranks, tmp_path / "run", saves=False).fit()
    (record,) = lines(tmp_path / "run" / "metrics.jsonl")
    rows = lines(tmp_path / "run" / "rollouts" / "step_000001.jsonl")
    assert {(row["accuracy"], row["format"]) for row in rows} == {(None, None)}
    assert all(row["reward"] == row["reward/letters"] for row in rows)
    assert record["reward/total"] == record["reward/letters"] > 0
    for key in ("reward/accuracy", "reward/format", "rollout/groups_all_right"):
        assert record[key] is None


@pytest.mark.parametrize(
    ("reward", "error", "message"),
    [
        ("fails", RuntimeError, "reward fails .* of prompt {prompt}: KeyError: 'no such thing'"),
        # Leaving with status 0 must not look like a run that is done.
        ("leaves", RuntimeError, "reward leaves .* of prompt {prompt}: SystemExit: 0"),
        ("gives_nan", ValueError, "reward gives_nan returned nan .* of prompt {prompt}"),
    ],
)
def test_failing_reward_stops_the_run(module, recipe, ranks, tmp_path, reward, error, message):
    recipe.data.train.shuffle = False
    recipe.algorithm.rewards += [f"own_rewards.{reward}"]
    # Not even weight 0 hides it.
    recipe.algorithm.reward_weights = [1.0, 1.0, 0.0]
    trainer = small_trainer(recipe, ranks, tmp_path)
    prompt = trainer.prompts.order.sample(0).sample_id
    with pytest.raises(error, match=message.format(prompt=re.escape(prompt))) as caught:
        trainer.fit()
    if reward == "fails":
        assert isinstance(caught.value.__cause__, KeyError)
    assert not (tmp_path / "rollouts" / "step_000001.jsonl").exists()


def test_weighted_sum_that_is_too_large_stops_the_run(recipe, ranks, tmp_path):
    recipe.algorithm.reward_weights = [1e308, 1e308]
    with pytest.raises(ValueError, match=r"algorithm\.reward_weights"):
        small_trainer(recipe, ranks, tmp_path).fit()


# ---------------------------------------------------------------------- the command line


@pytest.fixture
def command(rank_server, module, world, tmp_path):
    """The installed command, whose path begins in another folder, started beside the modules."""
    script = tmp_path / "bin" / "nemo-care"
    script.parent.mkdir()
    script.write_text(
        "import sys\nfrom nemo_care.cli import main\nif __name__ == '__main__':\n"
        "    sys.exit(main())\n"
    )
    parts, keys = ("train", "validation"), ("kind=jsonl", f"root={world}")
    arguments = [
        *(script, "train", "--config-name", "tiny_cpu", "trainer.max_steps=1"),
        *("algorithm.prompts_per_step=4", "data.validation.annotations=null"),
        *("checkpoint.export=false", f"exp_manager.explicit_log_dir={tmp_path / 'run'}"),
        *(f"data.{part}.{key}" for part in parts for key in keys),
    ]
    return lambda *overrides: rank_server.run([*arguments, *overrides], module)


def test_bad_import_path_ends_with_status_2_and_one_line(command, module, tmp_path):
    done = command("algorithm.rewards=[accuracy,format,own_rewards.missing]")
    assert done.returncode == 2
    (message,) = [line for line in done.stderr.splitlines() if line.startswith("nemo-care: ")]
    assert "Traceback" not in done.stderr
    assert "own_rewards.missing" in message
    assert "algorithm.rewards" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_ranks_find_rewards_of_the_working_directory_and_agree(command, module, tmp_path):
    """Two ranks of one model: the leader calls the reward, both learn from it."""
    done = command(
        "trainer.devices=2",
        "model.tensor_model_parallel_size=2",
        "algorithm.rewards=[accuracy,format,own_rewards.counted]",
        "algorithm.reward_weights=[1,1,2]",
    )
    assert done.returncode == 0, done.stderr
    rows = lines(tmp_path / "run" / "rollouts" / "step_000001.jsonl")
    calls = (module / "calls").read_text().split()
    assert len(calls) == len(rows)
    assert len(set(calls)) == 1
    for row in rows:
        parts = row["accuracy"] + row["format"] + 2 * 0.25 + row["bonus"]
        assert row["reward"] == pytest.approx(parts)


@pytest.mark.slow
def test_reward_that_raises_ends_all_ranks_with_its_traceback(command, module, tmp_path):
    done = command(
        "trainer.devices=2",
        "model.pipeline_model_parallel_size=2",
        "algorithm.rewards=[accuracy,own_rewards.fails]",
    )
    assert done.returncode == 1
    assert "KeyError: 'no such thing'" in done.stderr
    assert re.search(r"reward fails failed for a completion of prompt \S+: KeyError", done.stderr)
    assert 'own_rewards.py", line' in done.stderr


# ---------------------------------------------------------------------- docs/rewards.md


def test_example_of_the_documentation_works(module):
    part = (REPOSITORY / "docs" / "rewards.md").read_text()
    code = textwrap.dedent(re.search(r"\n\n((?:    .*\n|\n)+)", part)[1])
    (module / "documented_rewards.py").write_text(code)
    name = re.search(r"def (\w+)\(", code)[1]
    assert f"my_rewards.{name}" in part
    rewards = load_rewards(config("accuracy", f"documented_rewards.{name}"))
    short, long = (
        reward_value(name, rewards[name], f"<think>{'so ' * words}</think>", SAMPLE)
        for words in (10, 1000)
    )
    assert short > long
