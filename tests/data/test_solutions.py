"""Solutions that no answer can match: normalised where their meaning is plain, else set aside."""

import json
import time

import pytest
from made_data import read_made, seed_bench_r1_record, video_r1_record, write_lines

from nemo_care.data.prompts import ANSWER_HINTS
from nemo_care.data.solutions import normalised_solution
from nemo_care.data.sources import read_levels, read_source, read_training
from nemo_care.objective.rewards import PROBLEM_TYPES, accuracy_reward, evaluation_accuracy
from nemo_care.recipe.schema import DataConfig

OPTIONS = {"A": "a red cup", "B": "A Knife", "C": "12 cm", "D": "none of these"}
GOOD = {"id": "good", "question": "which ?", "solution": "A", "options": OPTIONS}


def read(tmp_path, *records, for_training=True, kind="jsonl"):
    write_lines(tmp_path / "a.jsonl", [*records])
    return read_source(kind, str(tmp_path), "a.jsonl", seed=1, for_training=for_training)


def line(problem_type, solution, **fields):
    return {"question": "which ?", "problem_type": problem_type, "solution": solution, **fields}


def refused(tmp_path, record, *, for_training=True) -> str:
    annotations = read(tmp_path, GOOD, record, for_training=for_training)
    assert len(annotations.samples) == 1
    (bad,) = annotations.bad
    assert bad.sample_id == "a.jsonl:2"
    assert '"solution"' in bad.reason
    assert "\n" not in bad.reason
    return bad.reason


@pytest.mark.parametrize(
    "given",
    [
        *("B", "(B)", "B.", "B)", "b", "(b)", "[B]", "B:", " B ", "Ｂ", "（Ｂ）", "Answer: B"),
        *("the correct answer is B.", "Option B", "<answer>B</answer>", "<answer> (b) </answer>"),
        *("A Knife", "a knife", "B. A Knife", "(b) a knife", "B)  A\tKnife"),
    ],
)
def test_what_plainly_means_an_option_becomes_its_letter(tmp_path, given):
    annotations = read(tmp_path, {**GOOD, "solution": given})
    (sample,) = annotations.samples
    assert sample.solution == "B"
    assert accuracy_reward(sample.problem_type, "<answer>B</answer>", sample.solution) == 1
    if given.strip() == "B":
        assert annotations.normalised == []
    else:
        (note,) = annotations.normalised
        assert (note.where, note.given, note.solution) == ("a.jsonl:1", given, "B")


@pytest.mark.parametrize(
    "given", ["E", "(E)", "12", "a blue cup", "A or B", "AB", "C. a red cup", "?"]
)
def test_a_choice_among_no_options_is_set_aside(tmp_path, given):
    reason = refused(tmp_path, {**GOOD, "solution": given})
    assert "A, B, C, D" in reason
    assert repr(given) in reason


def test_a_choice_that_could_mean_two_options_is_set_aside(tmp_path):
    swapped = {"A": "b", "B": "a", "C": "Up", "D": "up"}
    for given in ("b", "a", "UP"):
        refused(tmp_path, {**GOOD, "options": swapped, "solution": given})
    for given, letter in (("A", "A"), ("B.", "B"), ("up", "D"), ("Up", "C")):
        (sample,) = read(tmp_path, {**GOOD, "options": swapped, "solution": given}).samples
        assert sample.solution == letter


@pytest.mark.parametrize(
    ("given", "solution"),
    [("(B)", "B"), ("B.", "B"), ("b", "b"), ("(b)", "b"), ("left", "left"), ("42", "42")],
)
def test_a_choice_without_options_loses_what_stands_around_its_letter(given, solution):
    assert normalised_solution("multiple choice", given, {}) == solution


@pytest.mark.parametrize(
    ("problem_type", "given", "solution"),
    [
        ("numerical", "−3", "-3"),
        ("numerical", "３．１４", "3.14"),
        ("regression", "<answer>−42</answer>", "-42"),
        ("OCR", "<answer>no entry</answer>", "no entry"),
    ],
)
def test_plain_numbers_and_tags_are_normalised(tmp_path, problem_type, given, solution):
    annotations = read(tmp_path, line(problem_type, given))
    assert annotations.samples[0].solution == solution
    assert [note.given for note in annotations.normalised] == [given]


@pytest.mark.parametrize(
    ("problem_type", "solution", "part"),
    [
        ("numerical", "12 cm", "quantity"),
        ("numerical", "50%", "quantity"),
        ("numerical", r"$\frac{1}{2}$", "math"),
        ("numerical", "1/2", "math"),
        ("numerical", "twelve", "no finite number"),
        ("numerical", "nan", "no finite number"),
        ("numerical", "NaN", "no finite number"),
        ("numerical", "inf", "no finite number"),
        ("numerical", "1e999", "no finite number"),
        ("regression", "nan", "no finite number"),
        ("regression", "12 cm", "quantity"),
        ("regression", "0", "close to 0"),
        ("regression", "-0.0", "close to 0"),
        ("regression", "1e-9", "close to 0"),
        ("free-form", "?!", "scores 0"),
        ("quantity", "about 12 cm", "number with or without a unit"),
        ("quantity", "twelve", "number with or without a unit"),
        ("math", "the left one", "without words"),
        ("math", r"\frac{1}{", "mathematical expression"),
        ("math", "x+" * 600 + "1", "1000 characters"),
        *((problem_type, " ", "is empty") for problem_type in PROBLEM_TYPES),
        *((problem_type, "<answer> </answer>", "is empty") for problem_type in PROBLEM_TYPES),
    ],
)
def test_a_solution_that_no_answer_matches_is_set_aside(tmp_path, problem_type, solution, part):
    assert part in refused(tmp_path, line(problem_type, solution))


@pytest.mark.parametrize(
    ("problem_type", "solution"),
    [
        ("numerical", "3.14"),
        ("numerical", "1,234"),
        ("numerical", "-7"),
        ("regression", "0.001"),
        ("regression", "42"),
        ("OCR", "出口"),
        ("free-form", "猫在树上"),
        # The best answer gets 2/3.
        ("free-form", "yes"),
        ("free-form", "猫"),
        ("quantity", "12 cm"),
        ("quantity", "50%"),
        ("quantity", "−3 °C"),
        ("math", r"$\frac{1}{2}$"),
        ("math", r"x^2 + \sin(x)"),
        ("math", "１２"),
    ],
)
def test_a_solution_that_an_answer_matches_is_left_as_it_is(tmp_path, problem_type, solution):
    annotations = read(tmp_path, line(problem_type, solution))
    (sample,) = annotations.samples
    assert sample.solution == solution
    assert annotations.normalised == []
    best = accuracy_reward(problem_type, f"<answer>{solution}</answer>", solution)
    assert best == pytest.approx(2 / 3 if solution in ("yes", "猫") else 1, abs=1e-4)


def test_validation_goes_by_the_evaluations_accuracy(tmp_path):
    record = line("regression", "0")
    assert "close to 0" in refused(tmp_path, record)
    (sample,) = read(tmp_path, record, for_training=False).samples
    assert evaluation_accuracy("regression", "<answer>0</answer>", sample.solution) == 1
    assert "no finite number" in refused(tmp_path, line("regression", "nan"), for_training=False)


def test_runs_read_training_and_validation_each_by_its_own_accuracy(tmp_path):
    write_lines(tmp_path / "a.jsonl", [GOOD, line("regression", "0"), line("numerical", "50%")])
    config = DataConfig(max_skipped_fraction=0.9)
    config.train.root = config.validation.root = str(tmp_path)
    config.train.annotations = "a.jsonl"
    config.validation.annotations = {"L1": "a.jsonl"}
    config.validation.samples_per_level = 1
    (training,) = read_training(config, seed=1).sources
    assert [bad.sample_id for bad in training.bad] == ["a.jsonl:2", "a.jsonl:3"]
    level = read_levels(config, seed=1)["L1"]
    assert [bad.sample_id for bad in level.bad] == ["a.jsonl:3"]
    assert len(level.samples) == 1


def test_every_layout_normalises_and_refuses(tmp_path):
    video = {**video_r1_record(0), "solution": "<answer>(b)</answer>"}
    none = {**video_r1_record(2), "problem_type": "numerical", "solution": "<answer>5%</answer>"}
    annotations = read(tmp_path, video, none, kind="video_r1")
    assert annotations.samples[0].solution == "B"
    assert [note.given for note in annotations.normalised] == ["(b)"]
    assert "quantity" in annotations.bad[0].reason
    golden = {**seed_bench_r1_record(0, training=False), "golden_choice_idx": "b."}
    annotations = read(tmp_path, golden, {**golden, "golden_choice_idx": "E"}, kind="seed_bench_r1")
    assert annotations.samples[0].solution == "B"
    assert '"golden_choice_idx"' in annotations.bad[0].reason
    # The tags that the published files have are no deviation.
    assert read(tmp_path, video_r1_record(0), kind="video_r1").normalised == []


def test_every_problem_type_has_a_hint():
    assert set(ANSWER_HINTS) == set(PROBLEM_TYPES)


def test_reading_many_lines_stays_quick(tmp_path):
    """A line more costs what its JSON costs, not a start of a library or a process."""
    kinds = ["multiple choice", "numerical", "OCR", "free-form", "regression", "quantity", "math"]
    with (tmp_path / "a.jsonl").open("w") as file:
        for number in range(2_100):
            fields = {"options": {"A": "x", "B": "y"}, "solution": "A"} if number % 7 == 0 else {}
            record = line(kinds[number % 7], f"{number + 1}") | fields
            file.write(json.dumps(record) + "\n")
    start = time.process_time()
    assert len(read_made(tmp_path, "a.jsonl").samples) == 2_100
    assert time.process_time() - start < 3
