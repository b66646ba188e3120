"""`nemo-care evaluate`: what it writes, how it goes on, what it refuses, in every layout.

Most tests run the command line in this process, on the process groups that the tests share; a kill
and a layout of two ranks really start processes.
"""

import json
import os
import re
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from forked_ranks import RankServer
from made_commands import assert_refused
from made_data import write_lines, write_seed_bench_r1, write_video_r1
from made_endpoint import refuses, says
from records import lines
from small_runs import small_recipe, small_trainer
from tiny_qwen3_vl import EXPERTS, write_tiny_qwen3

from nemo_care.cli import main
from nemo_care.objective.rewards import evaluation_accuracy
from nemo_care.ranks.process_groups import Ranks
from nemo_care.recipe.schema import recipe_yaml
from nemo_care.rollouts.megatron import MegatronGenerator

LEVELS = ("L1", "L2", "L3")
# Overrides; each level takes a second.
ONE_LEVEL = [f"~data.validation.annotations.{level}" for level in LEVELS[1:]]


def results_of(folder: Path) -> dict:
    return json.loads((folder / "evaluation.json").read_text())


def command(world: Path, folder: Path, *overrides: str) -> list[str]:
    return [
        *("evaluate", "--config-name", "tiny_cpu"),
        *("data.validation.kind=jsonl", f"data.validation.root={world}"),
        f"exp_manager.explicit_log_dir={folder}",
        *("evaluation.samples_per_batch=8", "data.workers=0"),
        *map(str, overrides),
    ]


@pytest.fixture
def run(ranks, monkeypatch, capfd):
    """Run a command line on the shared process groups; gives status, stdout and stderr."""

    class SharedRanks(Ranks):
        def __new__(cls, *arguments, **settings):
            return ranks

    monkeypatch.setattr("nemo_care.ranks.process_groups.Ranks", SharedRanks)
    monkeypatch.setattr(ranks, "close", lambda: None)

    def run(arguments: list[str]) -> tuple[int, str, str]:
        return (main(arguments), *capfd.readouterr())

    return run


@pytest.fixture
def evaluate(run, world):
    """Evaluate the tiny checkpoint on the small miniature."""
    return lambda folder, *overrides: run(command(world, folder, *overrides))


@pytest.fixture
def generated(monkeypatch):
    """Indices of the samples that are generated from now on."""
    indices: list[int] = []
    generate = MegatronGenerator.generate

    def recording(self, prompts, sampling):
        indices.extend(prompt.index for prompt in prompts)
        return generate(self, prompts, sampling)

    monkeypatch.setattr(MegatronGenerator, "generate", recording)
    return indices


def mean(values) -> float | None:
    known = [float(value) for value in values if value is not None]
    return pytest.approx(sum(known) / len(known)) if known else None


def assert_results_follow_from_rows(folder: Path, skipped: dict[str, int]) -> None:
    results = results_of(folder)
    for level, result in results.items():
        rows = lines(folder / "evaluation" / f"{level}.jsonl")
        well_formed = [row for row in rows if row["format"] == 1]
        assert result["count"] == len(rows)
        assert result["accuracy"] == mean(row["accuracy"] for row in rows)
        assert result["format_rate"] == mean(row["format"] for row in rows)
        assert result["consistency_rate"] == mean(row["consistent"] for row in well_formed)
        assert result["completion_tokens"] == mean(row["tokens"] for row in rows)
        assert result["unjudged"] == sum(row["consistent"] is None for row in rows)
        assert result["skipped"] == skipped.get(level, 0)
        for row in rows:
            wanted = evaluation_accuracy(row["problem_type"], row["completion"], row["solution"])
            assert row["accuracy"] == wanted
            assert 0 < row["tokens"] <= 28


def test_miniature_is_evaluated_level_by_level_with_the_probe(evaluate, tmp_path):
    status, out, err = evaluate(tmp_path / "run")
    assert status == 0, err
    results = results_of(tmp_path / "run")
    assert tuple(results) == LEVELS
    assert_results_follow_from_rows(tmp_path / "run", {})
    for level, result in results.items():
        rows = lines(tmp_path / "run" / "evaluation" / f"{level}.jsonl")
        assert [row["index"] for row in rows] == list(range(8))
        assert {row["consistent"] for row in rows} <= {True, False}
        assert result["probe_implied"] == mean(row["probe_implied"] for row in rows)
        assert f"{result['accuracy']:.2f}" in out
    assert (tmp_path / "run" / "evaluation" / "skipped.jsonl").read_text() == ""
    assert str(tmp_path / "run" / "evaluation.json") in out


def test_every_measure_is_in_the_results_and_in_one_table(evaluate, tmp_path):
    status, out, err = evaluate(
        tmp_path / "run",
        *("evaluation.further_judges=[likelihood]", "evaluation.option_shuffle=true"),
        *("evaluation.peer_probe=4", "data.validation.samples_per_level=6", *ONE_LEVEL),
    )
    assert status == 0, err
    result = results_of(tmp_path / "run")["L1"]
    rows = lines(tmp_path / "run" / "evaluation" / "L1.jsonl")
    well_formed = [row for row in rows if row["format"] == 1]
    columns = {
        "consistency_rate_likelihood": "consistent_likelihood",
        "shuffle_rate": "shuffle_follows",
    }
    for name, column in columns.items():
        known = [row[column] for row in well_formed if row[column] is not None]
        assert result["intervals"][name]["count"] == len(known) > 0
        assert result[name] == mean(known)
        agreeing = [
            row[column] == row["consistent"] for row in well_formed if row[column] is not None
        ]
        assert result["intervals"][name]["agreement"] == mean(agreeing)
    # The rule reads the reasoning alone: the answer that it implies decides its verdict.
    assert result["implied_rate"] == result["consistency_rate"]
    peers = [row["peer_probe"] for row in rows if row["peer_probe"] is not None]
    assert result["intervals"]["peer_probe"]["count"] == len(peers) > 0
    assert result["peer_probe"] == mean(peers)
    _, table = out.split("Measures")
    for heading in ("judge", "likelihood", "implied answer", "option shuffle", "peer probe"):
        assert re.search(rf" {heading} ", table)
    assert f"{result['peer_probe']:.2f}" in table
    assert_refused(
        evaluate(tmp_path / "run", "evaluation.further_judges=[likelihood]", *ONE_LEVEL),
        "evaluation.option_shuffle: True -> False",
        "evaluation.peer_probe: 4 -> 0",
    )


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["evaluation.further_judges=[llm]"], ["evaluation.further_judges", "rule or likelihood"]),
        (
            ["evaluation.further_judges=[rule]"],
            ["evaluation.further_judges", "rule is the judge already"],
        ),
        (["evaluation.peer_probe=1"], ["evaluation.peer_probe=1", "set it to 2 or more"]),
        (
            ["evaluation.peer_probe=2", "algorithm.shared_prompt=false"],
            ["evaluation.peer_probe=2", "algorithm.shared_prompt=true"],
        ),
    ],
)
def test_measures_that_could_not_be_made_are_refused(evaluate, tmp_path, overrides, parts):
    assert_refused(evaluate(tmp_path, *overrides), *parts)


def test_an_untagged_reply_is_wrong_or_its_own_answer(evaluate, tmp_path, monkeypatch):
    generate = MegatronGenerator.generate

    def untagged(self, prompts, sampling):
        groups = generate(self, prompts, sampling)
        for group in groups:
            text = group.prompt.sample.solution if group.prompt.index % 2 else "It goes left."
            group.completions = [replace(group.completions[0], text=f" {text}\n")]
        return groups

    monkeypatch.setattr(MegatronGenerator, "generate", untagged)
    for value, right in (("wrong", 0.0), ("whole_text", 1.0)):
        status, _, err = evaluate(tmp_path / value, f"evaluation.untagged={value}", *ONE_LEVEL)
        assert status == 0, err
        rows = lines(tmp_path / value / "evaluation" / "L1.jsonl")
        assert [row["accuracy"] for row in rows] == [0.0, right] * 4
        assert {row["format"] for row in rows} == {0}
    assert_refused(
        evaluate(tmp_path / "wrong", "evaluation.untagged=whole_text", *ONE_LEVEL),
        "evaluation.untagged: 'wrong' -> 'whole_text'",
    )
    assert_refused(evaluate(tmp_path / "none", "evaluation.untagged=whole"), "evaluation.untagged")


def published(root: Path, kind: str, **levels: str) -> list[str]:
    return [
        f"data.validation.kind={kind}",
        f"data.validation.root={root}",
        *(f"data.validation.annotations.{level}={file}" for level, file in levels.items()),
        *("data.max_prompt_tokens=16384", "data.max_skipped_fraction=0.4"),
        *("data.image.min_pixels=784", "data.image.max_pixels=784"),
    ]


def test_seed_bench_r1_lists_what_it_skips_and_counts_by_task_type(evaluate, tmp_path):
    root = write_seed_bench_r1(tmp_path / "data", train=1, validation=6)
    level2 = root / "annotations/validation_L2.jsonl"
    write_lines(level2, ["{", *level2.read_text().splitlines()])
    (missing,) = (root / "images").glob("*/P01_15_15.png")
    missing.unlink()
    files = {level: f"annotations/validation_{level}.jsonl" for level in LEVELS}
    status, _, err = evaluate(tmp_path / "run", *published(root, "seed_bench_r1", **files))
    assert status == 0, err

    bad_line, image = lines(tmp_path / "run/evaluation/skipped.jsonl")
    assert (bad_line["level"], bad_line["sample_id"]) == ("L2", "validation_L2.jsonl:1")
    assert (image["level"], image["index"], image["sample_id"]) == ("L3", 2, "15")
    assert "P01_15_15.png: image not readable" in image["reason"]
    assert_results_follow_from_rows(tmp_path / "run", {"L2": 1, "L3": 1})
    by_task_type = results_of(tmp_path / "run")["L3"]["by_task_type"]
    assert {name: part["count"] for name, part in by_task_type.items()} == {"Hobbies": 5}


def test_video_r1_is_evaluated_for_every_answer_kind(evaluate, tmp_path):
    root = write_video_r1(tmp_path / "data", count=5)
    overrides = published(root, "video_r1", L1="Video-R1-260k.json")
    judge = "evaluation.judge=likelihood"
    status, _, err = evaluate(tmp_path / "run", *overrides, *ONE_LEVEL, judge)
    assert status == 0, err
    assert_results_follow_from_rows(tmp_path / "run", {})
    rows = lines(tmp_path / "run" / "evaluation" / "L1.jsonl")
    assert len({row["problem_type"] for row in rows}) == 5
    assert [row["judge_note"] for row in rows[1:]] == ["the question has no options"] * 4
    assert results_of(tmp_path / "run")["L1"]["unjudged"] == 4


def test_killed_evaluation_goes_on_where_it_was_and_equals_an_uninterrupted_one(
    rank_server, evaluate, world, tmp_path, generated
):
    overrides = [
        *("data.validation.annotations.L1=train.jsonl", "evaluation.judge=likelihood", *ONE_LEVEL),
        *("data.validation.samples_per_level=18", "evaluation.samples_per_batch=2"),
    ]
    rows = tmp_path / "killed" / "evaluation" / "L1.jsonl"
    ranks = rank_server.start(
        1, ["-m", "nemo_care", *command(world, tmp_path / "killed", *overrides)]
    )
    began = time.monotonic()
    while not (rows.is_file() and rows.read_text().count("\n") >= 6):
        assert time.monotonic() - began < 60
        time.sleep(0.002)
    os.kill(ranks.pids[0], signal.SIGKILL)
    assert ranks.wait() == [-signal.SIGKILL]
    done = [row["index"] for row in lines(rows)]
    assert 6 <= len(done) < 18
    with rows.open("ab") as file:
        file.write('{"index": 17, "completion": "torn in the middle of é'.encode()[:-1])

    assert evaluate(tmp_path / "killed", *overrides)[0] == 0
    assert generated == list(range(len(done), 18))
    assert evaluate(tmp_path / "whole", *overrides)[0] == 0
    for file in (tmp_path / "whole" / "evaluation").glob("*.jsonl"):
        assert file.read_text() == (tmp_path / "killed" / "evaluation" / file.name).read_text()
    assert results_of(tmp_path / "whole") == results_of(tmp_path / "killed")


def test_broken_files_of_an_evaluation_are_named(evaluate, tmp_path):
    folder = tmp_path / "run"
    assert evaluate(folder)[0] == 0
    results, rows = "evaluation.json", "evaluation/L2.jsonl"
    whole = {name: (folder / name).read_bytes() for name in (results, rows)}
    first, second, rest = whole[rows].split(b"\n", 2)
    torn = b'{\n "L1": {\n  "accu'
    for name, content, said in (
        (results, torn, ":3: not valid JSON"),
        (results, b'{"L1": 0.5}', ": level 'L1': not a JSON object"),
        (results, b'{"L1": {"count": 3, "skipped": null}}', '"skipped" is not a whole number'),
        ("evaluation/settings.json", torn, ":3: not valid JSON"),
        ("evaluation/settings.json", b"[]", ": not a JSON object"),
    ):
        before = (folder / name).read_bytes()
        (folder / name).write_bytes(content)
        assert_refused(evaluate(folder), str(folder / name), said)
        (folder / name).write_bytes(before)
    # Rows are read while there are no results, and results come back from the rows.
    (folder / results).unlink()
    for line, said in (
        (second[:-9], ":2: not valid JSON"),
        (second.replace(b'"index": 1', b'"index": "1"'), ':2: "index" is not a whole number'),
        (b"[]", ":2: not a JSON object"),
        (second.replace(b'"consistent"', b'"consistence"'), ':2: "consistent" is missing'),
    ):
        (folder / rows).write_bytes(b"\n".join((first, line, rest)))
        assert_refused(evaluate(folder), f"{folder / rows}{said}", "correct or remove the line")
    (folder / rows).write_bytes(b"\n".join((first, rest)))  # as the message says
    assert evaluate(folder)[0] == 0
    again, before = results_of(folder), json.loads(whole[results])
    assert (again["L1"], again["L3"]) == (before["L1"], before["L3"])
    assert again["L2"]["count"] == before["L2"]["count"] == 8


def test_language_model_judges_and_is_not_asked_twice(evaluate, endpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    endpoint.answer = lambda request: says("The reasoning names it.\nCONSISTENT")
    asked = ["evaluation.judge=llm", "evaluation.llm.model=judge-1", *ONE_LEVEL]
    asked.append(f"evaluation.llm.base_url={endpoint.url}")
    status, _, err = evaluate(tmp_path, *asked)
    assert status == 0, err
    rows = lines(tmp_path / "evaluation/L1.jsonl")
    assert {row["consistent"] for row in rows if row["format"]} == {True}
    assert rows[0]["judge_reply"] == "The reasoning names it.\nCONSISTENT"
    count = len(endpoint.requests)
    assert 0 < count <= len(rows)
    shutil.rmtree(tmp_path / "evaluation")
    assert evaluate(tmp_path, *asked)[0] == 0
    assert len(endpoint.requests) == count
    assert_results_follow_from_rows(tmp_path, {})


def test_completions_that_an_outage_left_unjudged_are_judged_by_the_next_start(
    evaluate, endpoint, tmp_path, monkeypatch
):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    answers = iter([says("CONSISTENT")])
    endpoint.answer = lambda request: next(answers, refuses(500))
    asked = ["evaluation.judge=llm", "evaluation.llm.model=judge-1", "evaluation.llm.max_retries=0"]
    asked += [f"evaluation.llm.base_url={endpoint.url}", "evaluation.llm.concurrency=1"]
    asked += ONE_LEVEL[1:]
    assert evaluate(tmp_path, *asked)[0] == 0
    before = results_of(tmp_path)
    assert before["L1"]["unjudged"] > 1
    completions = {
        level: [row["completion"] for row in lines(tmp_path / f"evaluation/{level}.jsonl")]
        for level in before
    }

    def unexpected(*arguments):
        raise AssertionError("nothing is to be generated")

    monkeypatch.setattr(MegatronGenerator, "generate", unexpected)
    endpoint.answer = lambda request: says("INCONSISTENT")
    assert evaluate(tmp_path, *asked)[0] == 0
    after = results_of(tmp_path)
    for level in before:
        rows = lines(tmp_path / f"evaluation/{level}.jsonl")
        assert [row["completion"] for row in rows] == completions[level]
        judged = [row for row in rows if row["format"]]
        assert not any("judge_error" in row for row in judged)
        assert after[level]["accuracy"] == before[level]["accuracy"]
        assert after[level]["unjudged"] == len(rows) - len(judged)
        right = [row["consistent"] for row in judged].count(True)
        assert right == (level == "L1")
        assert after[level]["consistency_rate"] == pytest.approx(right / len(judged))


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 75, marks=pytest.mark.slow)],
)
def test_ctrl_c_ends_an_evaluation_at_once_whatever_its_judge_does(
    rank_server, world, endpoint, tmp_path, monkeypatch, number, status
):
    """Requests in flight do not hold it up, nor those that wait."""
    endpoint.answer = lambda request: says("CONSISTENT") if endpoint.released.wait(100) else None
    asked = ["evaluation.judge=llm", "evaluation.llm.model=judge-1", "evaluation.llm.concurrency=2"]
    asked.append(f"evaluation.llm.base_url={endpoint.url}")
    ranks = rank_server.start(1, ["-m", "nemo_care", *command(world, tmp_path, *asked)])
    assert endpoint.wait_for(lambda: endpoint.in_flight == 2)
    os.kill(ranks.pids[0], number)
    assert ranks.wait(10) == [status], ranks.output()
    assert "Traceback" not in ranks.output()
    assert f"nemo-care: ended at once: {number.name} was received" in ranks.output()


def test_complete_evaluation_only_shows_its_table_again(evaluate, tmp_path, monkeypatch):
    _, first, _ = evaluate(tmp_path, *ONE_LEVEL)

    def unexpected(*arguments):
        raise AssertionError("no model is needed")

    monkeypatch.setattr("nemo_care.training.build.build_model", unexpected)
    status, again, _ = evaluate(tmp_path, *ONE_LEVEL)
    assert (status, again) == (0, first)
    # What can't change a row may change.
    other = ["evaluation.samples_per_batch=3", "evaluation.llm.concurrency=2"]
    assert evaluate(tmp_path, *ONE_LEVEL, *other)[0] == 0


def test_rows_that_two_evaluations_wrote_count_once(evaluate, tmp_path, generated):
    """Older versions let two work in one directory."""
    assert evaluate(tmp_path / "run", *ONE_LEVEL)[0] == 0
    before = results_of(tmp_path / "run")
    file = tmp_path / "run/evaluation/L1.jsonl"
    rows = lines(file)
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *rows[:5]]))
    doubled = json.loads(json.dumps(before))
    doubled["L1"]["count"] += 5
    (tmp_path / "run/evaluation.json").write_text(json.dumps(doubled))
    generated.clear()
    assert evaluate(tmp_path / "run", *ONE_LEVEL)[0] == 0
    assert results_of(tmp_path / "run") == before
    assert lines(file) == rows
    assert generated == []


def test_rows_of_other_settings_are_not_mixed(evaluate, tmp_path, copied_checkpoint):
    overrides = [f"evaluation.checkpoint={copied_checkpoint}", *ONE_LEVEL]
    assert evaluate(tmp_path / "run", *overrides)[0] == 0
    remedy = ["exp_manager.explicit_log_dir", "remove the folder evaluation"]
    for override, changed in (
        ("evaluation.temperature=0", "evaluation.temperature: 1.0 -> 0"),
        ("data.video.max_frames=4", "data.video.max_frames: 8 -> 4"),
        ("evaluation.checkpoint=null", "evaluation.checkpoint.folder"),
    ):
        assert_refused(evaluate(tmp_path / "run", *overrides, override), changed, *remedy)
    weights = copied_checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes())
    assert_refused(evaluate(tmp_path / "run", *overrides), "evaluation.checkpoint.files", *remedy)
    # The remedy, with the results of the old rows still there.
    shutil.rmtree(tmp_path / "run" / "evaluation")
    assert evaluate(tmp_path / "run", *overrides, "evaluation.temperature=0")[0] == 0
    assert_results_follow_from_rows(tmp_path / "run", {})


def test_skipped_samples_are_asked_again_once_they_are_mended(evaluate, world, tmp_path, generated):
    root = tmp_path / "damaged"
    shutil.copytree(world, root)
    video = root / lines(root / "validation_L1.jsonl")[2]["videos"][0]
    content = video.read_bytes()
    video.write_bytes(b"no video")
    overrides = [f"data.validation.root={root}", "data.max_skipped_fraction=0.1"]
    overrides.append("evaluation.samples_per_batch=4")
    refused = evaluate(tmp_path / "run", *overrides)
    assert_refused(refused, "1 of 8 samples of level L1", "max_skipped_fraction=0.1", str(video))
    assert generated == [0, 1, 3]
    assert not (tmp_path / "run" / "evaluation.json").exists()
    video.write_bytes(content)
    assert evaluate(tmp_path / "run", *overrides)[0] == 0
    assert generated[3:12] == [2, 4, 5, 6, 7, 0, 1, 2, 3]
    assert (tmp_path / "run" / "evaluation" / "skipped.jsonl").read_text() == ""
    assert_results_follow_from_rows(tmp_path / "run", {})


@pytest.fixture(scope="module")
def trained(checkpoint, world, ranks, tmp_path_factory):
    """A run with validation by the likelihood judge after its last step; folder and summary."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = small_recipe(checkpoint, world)
    recipe.trainer.max_steps = 2
    recipe.checkpoint.export = True
    recipe.algorithm.min_reasoning_words = 4
    recipe.data.validation.annotations = {"L1": "validation_L1.jsonl"}
    recipe.evaluation.judge = "likelihood"
    recipe.evaluation.forced_reasoning_probe = True
    trainer = small_trainer(recipe, ranks, folder)
    trainer.files.write_recipe(recipe_yaml(recipe))
    return folder, trainer.fit()


def of_the_run(folder: Path) -> list[str]:
    """What makes an evaluation ask what the run's validation asked."""
    return [
        *("trainer.seed=3", "evaluation.temperature=0", "rollout.max_completion_tokens=24"),
        *("evaluation.judge=likelihood", f"evaluation.reference={folder}"),
        *(*ONE_LEVEL, "evaluation.samples_per_batch=8"),
        # Other micro-batches would round otherwise.
        "algorithm.groups_per_micro_batch=1",
    ]


@pytest.mark.parametrize("name", ["checkpoints/step_000002", "export"])
def test_a_runs_last_checkpoint_shows_what_its_last_validation_showed(
    evaluate, trained, tmp_path, name
):
    folder, summary = trained
    checkpoint = f"evaluation.checkpoint={folder / name}"
    status, _, err = evaluate(tmp_path, checkpoint, *of_the_run(folder))
    assert status == 0, err
    assert results_of(tmp_path) == summary["end"]
    # Training did something, and the reference is not the policy.
    assert summary["start"]["L1"]["probe_true"] != summary["end"]["L1"]["probe_true"]


def test_the_reference_of_a_run_is_its_moving_average(evaluate, trained, tmp_path):
    folder, summary = trained
    rows = []
    for reference in (folder, folder / "export"):
        overrides = [f"evaluation.checkpoint={folder}", *of_the_run(folder)]
        name = str(reference == folder)
        assert evaluate(tmp_path / name, *overrides, f"evaluation.reference={reference}")[0] == 0
        rows.append(lines(tmp_path / name / "evaluation" / "L1.jsonl"))
    assert results_of(tmp_path / "True") == summary["end"]
    for average, policy in zip(*rows, strict=True):
        assert average["completion"] == policy["completion"]
        assert average["option_likelihoods"] != policy["option_likelihoods"]


def test_rollouts_of_a_run_are_judged_by_the_rule_only(trained):
    rows = lines(trained[0] / "rollouts" / "step_000001.jsonl")
    assert {row["consistent"] for row in rows} == {None}


def test_validation_lists_what_it_skips_once(checkpoint, world, ranks, tmp_path):
    root = tmp_path / "damaged"
    shutil.copytree(world, root)
    record = lines(root / "validation_L1.jsonl")[3]
    (root / record["videos"][0]).write_bytes(b"no video")
    recipe = small_recipe(checkpoint, world)
    recipe.trainer.max_steps = recipe.trainer.validation_interval = 1
    recipe.data.validation.root = str(root)
    recipe.data.validation.annotations = {"L1": "validation_L1.jsonl"}
    small_trainer(recipe, ranks, tmp_path / "run").fit()
    recipe.trainer.max_steps = 2
    summary = small_trainer(recipe, ranks, tmp_path / "run").fit()
    (skipped,) = lines(tmp_path / "run" / "skipped.jsonl")
    assert (skipped["step"], skipped["level"], skipped["index"]) == (0, "L1", 3)
    assert skipped["sample_id"] == record["id"]
    assert "not readable" in skipped["reason"]
    assert (summary["end"]["L1"]["skipped"], summary["end"]["L1"]["count"]) == (1, 7)


def test_another_architecture_is_refused(evaluate, trained, tmp_path, copied_checkpoint):
    file = copied_checkpoint / "config.json"
    config = json.loads(file.read_text())
    text = config["text_config"]
    text["num_hidden_layers"], text["layer_types"] = 2, text["layer_types"][:2]
    file.write_text(json.dumps(config))
    given = evaluate(tmp_path, f"evaluation.checkpoint={copied_checkpoint}")
    assert_refused(
        given, "evaluation.checkpoint", "num_hidden_layers is 2, the model's is 4", "model.hf_path"
    )
    # The other way round, with a run's checkpoint.
    result = evaluate(
        tmp_path / "run",
        f"model.hf_path={copied_checkpoint}",
        f"evaluation.checkpoint={trained[0]}",
    )
    assert_refused(result, "evaluation.checkpoint", "not the architecture of model.hf_path")


def test_a_run_without_a_reference_can_not_judge(evaluate, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "nemo_care.training.model_source.stored_shapes", lambda path: {"policy.weight": ()}
    )
    result = evaluate(tmp_path, "evaluation.judge=likelihood", f"evaluation.reference={trained[0]}")
    assert_refused(result, "evaluation.reference", "had no reference")


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("data.validation.annotations=null", ["data.validation.annotations"]),
        ("data.validation.root=null", ["data.validation.root", "set annotations to null"]),
        ("+data.validation.annotations.skipped=x", ["'skipped'", "can't name a file"]),
        ("evaluation.checkpoint=/no/such", ["evaluation.checkpoint", "/no/such", "no such folder"]),
        ("evaluation.checkpoint=docs", ["evaluation.checkpoint", "no checkpoint there"]),
        ("evaluation.judge=llm", ["evaluation.llm.base_url"]),
        ("trainer.num_nodes=2", ["trainer.num_nodes=2", "torchrun"]),
    ],
)
def test_unusable_input_is_refused_in_one_line(evaluate, tmp_path, override, parts):
    assert_refused(evaluate(tmp_path, override), *parts)


def test_what_only_training_needs_is_not_asked_for(evaluate, tmp_path):
    result = evaluate(
        tmp_path,
        *("data.train.root=null", "algorithm.rewards=[no.such_reward]"),
        *("algorithm.prompts_per_step=3", "data.validation.samples_per_level=1", *ONE_LEVEL),
    )
    assert result[0] == 0, result[2]


def test_training_judged_by_likelihood_needs_a_reference(run, world, tmp_path):
    result = run(
        [
            *("train", "--config-name", "tiny_cpu", "evaluation.judge=likelihood"),
            "algorithm.consistency.bonus_coefficient=0",
        ]
    )
    assert_refused(result, "evaluation.judge=likelihood", "algorithm.kl_coefficient")


def assert_same_evaluation(ours: Path, wanted: Path) -> None:
    """Rows and results, up to the last digits."""
    assert results_of(ours).keys() == results_of(wanted).keys()
    for level in results_of(wanted):
        pairs = zip(
            *(lines(folder / "evaluation" / f"{level}.jsonl") for folder in (ours, wanted)),
            strict=True,
        )
        for mine, row in pairs:
            assert set(mine) == set(row)
            for key, value in row.items():
                if isinstance(value, float | dict):
                    value = pytest.approx(value, abs=1e-5)
                assert mine[key] == value, key
        mine, result = results_of(ours)[level], results_of(wanted)[level]
        intervals, wanted_intervals = mine.pop("intervals"), result.pop("intervals")
        assert mine == pytest.approx(result, abs=1e-5)
        assert set(intervals) == set(wanted_intervals)
        for name, interval in wanted_intervals.items():
            assert intervals[name] == pytest.approx(interval, abs=1e-4), name


def evaluate_on_two_ranks(server: RankServer, world: Path, folder: Path, *overrides: str) -> None:
    """Ranks that find each other as torchrun's do."""
    _, *arguments = command(world, folder, "trainer.devices=2", *overrides)
    server.start(2, ["-m", "nemo_care", "evaluate", *arguments]).succeed()


def test_two_replicas_share_the_samples(rank_server, evaluate, world, tmp_path):
    """The last batch of a level leaves the second replica nothing to do; media come ahead."""
    overrides = [
        *("data.validation.samples_per_level=5", "evaluation.judge=likelihood"),
        *("evaluation.further_judges=[rule]", "evaluation.option_shuffle=true"),
        *("evaluation.peer_probe=3", "~data.validation.annotations.L3"),
    ]
    two = ["evaluation.samples_per_batch=2", "data.workers=1"]
    evaluate_on_two_ranks(rank_server, world, tmp_path / "two", *overrides, *two)
    assert evaluate(tmp_path / "one", *overrides)[0] == 0
    assert_same_evaluation(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_replicas_that_share_experts_evaluate_in_step(rank_server, evaluate, world, tmp_path):
    """The second replica has fewer prompts, none at last, and shorter completions."""
    checkpoint = write_tiny_qwen3(tmp_path / "checkpoint", EXPERTS)
    overrides = [
        *(f"model.hf_path={checkpoint}", "data.validation.samples_per_level=3"),
        *("evaluation.judge=likelihood", "evaluation.option_shuffle=true"),
        *("evaluation.peer_probe=2", "~data.validation.annotations.L3"),
    ]
    shared = ["evaluation.samples_per_batch=1", "model.expert_model_parallel_size=2"]
    evaluate_on_two_ranks(rank_server, world, tmp_path / "two", *overrides, *shared)
    assert evaluate(tmp_path / "one", *overrides)[0] == 0
    assert_same_evaluation(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        ["model.tensor_model_parallel_size=2", "model.sequence_parallel=true"],
        ["model.pipeline_model_parallel_size=2"],
    ],
)
def test_a_model_on_two_ranks_shows_the_same(
    rank_server, evaluate, trained, world, tmp_path, layout
):
    overrides = [
        *(f"evaluation.checkpoint={trained[0]}", f"evaluation.reference={trained[0]}"),
        "evaluation.judge=likelihood",
    ]
    evaluate_on_two_ranks(rank_server, world, tmp_path / "two", *overrides, *layout)
    assert evaluate(tmp_path / "one", *overrides)[0] == 0
    assert_same_evaluation(tmp_path / "two", tmp_path / "one")


@pytest.mark.parametrize(("bytes_less", "said"), [(0, "its content changed"), (9, "were written")])
def test_a_damaged_checkpoint_is_refused_by_its_files_name(
    evaluate, trained, tmp_path, bytes_less, said
):
    run = shutil.copytree(trained[0], tmp_path / "run")
    (checkpoint,) = (run / "checkpoints").iterdir()
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    (name,) = [name for name, record in files.items() if record["part"] == "policy"]
    content = bytearray((checkpoint / name).read_bytes())
    content[len(content) // 2] ^= 1
    (checkpoint / name).write_bytes(content[: len(content) - bytes_less])
    result = evaluate(tmp_path / "evaluation", f"evaluation.checkpoint={run}")
    assert_refused(result, "evaluation.checkpoint", name, said, "name another step_")
