"""SEED-Bench-R1 and Video-R1: what a good record becomes."""

from collections import Counter

import pytest
from made_data import read_made, seed_bench_r1_record, video_r1_record, write_lines

from nemo_care.data.samples import Sample

FILE = "annotations/training_6k.jsonl"


def read(root, records, *, seed=1) -> list[Sample]:
    write_lines(root / FILE, records)
    annotations = read_made(root, FILE, seed=seed, kind="seed_bench_r1")
    assert annotations.bad == []
    return annotations.samples


def training(count: int):
    return [seed_bench_r1_record(number, training=True) for number in range(count)]


def test_seed_bench_r1_sample_has_video_image_and_four_options(tmp_path):
    (sample,) = read(tmp_path, training(1))
    assert sample.sample_id == "0"
    assert sample.question == "which way does the square move ?"
    assert sample.problem_type == "multiple choice"
    assert sample.videos == (tmp_path / "videos/EpicKitchens/P01_00_0.mp4",)
    assert sample.images == (tmp_path / "images/EpicKitchens/P01_00_0.png",)
    assert list(sample.options) == ["A", "B", "C", "D"]
    assert sample.options[sample.solution] == "right 0"
    others = {text for letter, text in sample.options.items() if letter != sample.solution}
    assert len(others) == 3
    assert others < {"left", "up", "down", "in", "from"}


def test_seed_bench_r1_without_progress_has_no_video(tmp_path):
    record = {**training(4)[3], "video_basename": None}
    assert record["task_progress_metadata"] == []
    (sample,) = read(tmp_path, [record])
    assert sample.videos == ()
    assert sample.images == (tmp_path / "images/Ego4D/P01_03_3.png",)


def test_exactly_three_negatives_are_all_used(tmp_path):
    (sample,) = read(tmp_path, [{**training(1)[0], "negative_answers": ["left", "up", "down"]}])
    assert sorted(sample.options.values()) == ["down", "left", "right 0", "up"]


def test_validation_options_keep_their_order_for_every_seed(tmp_path):
    records = [seed_bench_r1_record(number, training=False) for number in range(20)]
    for seed in (1, 2):
        for number, sample in enumerate(read(tmp_path, records, seed=seed)):
            texts = ["left", f"right {number}", "up", "in"]
            assert sample.options == dict(zip("ABCD", texts, strict=True))
            assert sample.solution == "B"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, "Hobbies"),
        ({"domain": None}, ""),
        ({"task_type": "planning"}, "planning"),
    ],
)
def test_task_type_is_carried_where_there_is_one(tmp_path, fields, expected):
    (sample,) = read(tmp_path, [{**seed_bench_r1_record(0, training=False), **fields}])
    assert sample.task_type == expected


def test_options_depend_on_seed_and_sample_id_alone(tmp_path):
    records = training(40)
    first = {sample.sample_id: sample for sample in read(tmp_path, records)}
    # The other way round, some lines gone and a bad one before them.
    again = {sample.sample_id: sample for sample in read(tmp_path, records[::-2])}
    assert all(first[name].options == sample.options for name, sample in again.items())
    assert all(first[name].solution == sample.solution for name, sample in again.items())
    other = read(tmp_path, records, seed=2)
    assert any(first[sample.sample_id].options != sample.options for sample in other)
    assert len({sample.solution for sample in first.values()}) == 4


def test_options_of_a_seed_never_change(tmp_path):
    """A resumed run, and one on another machine, must see the same question."""
    samples = read(tmp_path, training(3), seed=1234)
    assert [sample.solution for sample in samples] == ["D", "C", "C"]
    assert dict(samples[0].options) == {"A": "in", "B": "down", "C": "left", "D": "right 0"}


def test_letters_and_negatives_are_drawn_without_bias(tmp_path):
    count = 1200
    samples = read(tmp_path, training(count))
    letters = Counter(sample.solution for sample in samples)
    # Five standard deviations of a binomial.
    for letter in "ABCD":
        assert abs(letters[letter] - count / 4) < 5 * (count * 3 / 16) ** 0.5
    texts = Counter(text for sample in samples for text in sample.options.values())
    for negative in ("left", "up", "down", "in", "from"):
        assert abs(texts[negative] - count * 3 / 5) < 5 * (count * 6 / 25) ** 0.5
    at_a = Counter(sample.options["A"] for sample in samples if sample.solution != "A")
    assert max(at_a.values()) < 2 * min(at_a.values())


def test_video_r1_carries_every_answer_kind_and_medium(tmp_path):
    records = [video_r1_record(number) for number in range(10)]
    write_lines(tmp_path / "a.jsonl", records)
    annotations = read_made(tmp_path, "a.jsonl", kind="video_r1")
    assert annotations.bad == []
    choice = annotations.samples[0]
    assert choice == Sample(
        sample_id="0",
        question="which way does the disc move ?",
        solution="B",
        problem_type="multiple choice",
        videos=(tmp_path / "videos/0.mp4",),
        options={"A": "left", "B": "right"},
    )
    assert [sample.problem_type for sample in annotations.samples[:5]] == [
        *("multiple choice", "numerical", "OCR", "free-form", "regression"),
    ]
    assert [sample.solution for sample in annotations.samples[:5]] == [
        *("B", "3.14", "left up", "the square goes left", "42"),
    ]
    assert annotations.samples[1].images == (tmp_path / "images/1.jpg",)
    assert annotations.samples[1].videos == ()
    assert annotations.samples[1].options == {}


def test_video_r1_takes_lenient_spellings(tmp_path):
    record = {
        **video_r1_record(0),
        "problem_id": "mmvu_7",
        "path": "videos/0.mp4",
        "options": ["(A) a cup", "B: a knife\nand a fork", "C.", "D. 1.5"],
        "solution": " <answer> B </answer> ",
    }
    write_lines(tmp_path / "a.jsonl", [record, {**record, "options": None}])
    first, second = read_made(tmp_path, "a.jsonl", kind="video_r1").samples
    assert first.sample_id == "mmvu_7"
    assert first.videos == (tmp_path / "videos/0.mp4",)
    assert first.options == {"A": "a cup", "B": "a knife\nand a fork", "C": "", "D": "1.5"}
    assert first.solution == "B"
    assert second.options == {}
