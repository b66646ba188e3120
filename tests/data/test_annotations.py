"""Annotations of every layout: bad lines are set aside with file, line and reason."""

import hashlib
import json
import pickle
from functools import partial

import pytest
from made_data import read_made, seed_bench_r1_record, video_r1_record, write_lines

from nemo_care.data.samples import Sample
from nemo_care.errors import InputError
from nemo_care.recipe.data import DATA_KINDS

JSONL = {"id": "x", "question": "which way ?", "solution": "A", "videos": ["videos/x.mp4"]}
LAYOUTS = {
    "jsonl": (JSONL, read_made),
    "training": (
        seed_bench_r1_record(0, training=True),
        partial(read_made, kind="seed_bench_r1"),
    ),
    "validation": (
        seed_bench_r1_record(0, training=False),
        partial(read_made, kind="seed_bench_r1"),
    ),
    "video_r1": (video_r1_record(0), partial(read_made, kind="video_r1")),
}


def without(record, key):
    return {name: value for name, value in record.items() if name != key}


def reason_of(tmp_path, layout, bad) -> str:
    """Why the second of three lines can't be used; the others must be samples."""
    good, read = LAYOUTS[layout]
    write_lines(tmp_path / "a.jsonl", [good, bad, good])
    annotations = read(tmp_path, "a.jsonl")
    assert len(annotations.samples) == 2
    assert annotations.total == 3
    (skipped,) = annotations.bad
    assert skipped.index is None
    assert skipped.sample_id == "a.jsonl:2"
    assert skipped.reason.startswith(f"{tmp_path}/a.jsonl:2: ")
    assert "\n" not in skipped.reason
    return skipped.reason


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("line", "part"),
    [
        ('{"question": "torn', "not valid JSON"),
        ("[1, 2]", "must be a JSON object"),
        ('"text"', "must be a JSON object"),
        ("[" * 100_000, "not valid JSON"),
        ("9" * 5000, "not valid JSON"),
    ],
)
def test_malformed_line_is_set_aside_and_named(tmp_path, layout, line, part):
    assert part in reason_of(tmp_path, layout, line)


@pytest.mark.parametrize(
    ("layout", "keys"),
    [
        ("jsonl", ["question", "solution"]),
        (
            "training",
            [
                *("sample_id", "video_source", "video_basename", "task_progress_metadata"),
                *("current_observation_basename", "question", "answer", "negative_answers"),
            ],
        ),
        (
            "validation",
            ["choice_a", "choice_b", "choice_c", "choice_d", "golden_choice_idx", "question"],
        ),
        (
            "video_r1",
            ["problem_id", "problem", "data_type", "problem_type", "solution", "path"],
        ),
    ],
)
def test_missing_and_mistyped_fields_are_named(tmp_path, layout, keys):
    for key in keys:
        record = LAYOUTS[layout][0]
        assert f'"{key}"' in reason_of(tmp_path, layout, without(record, key))
        assert f'"{key}"' in reason_of(tmp_path, layout, {**record, key: None})
        assert f'"{key}"' in reason_of(tmp_path, layout, {**record, key: {"a": 1}})


@pytest.mark.parametrize(
    ("layout", "fields", "parts"),
    [
        ("jsonl", {"problem_type": "free form"}, ["unknown", "problem_type", "free-form"]),
        ("jsonl", {"colour": "red"}, ["unknown field 'colour'"]),
        ("jsonl", {"options": {"A": 3}}, ['"options"', "text"]),
        ("jsonl", {"options": ["A. up"]}, ['"options"']),
        ("jsonl", {"videos": "x.mp4"}, ['"videos" must be a list']),
        ("jsonl", {"videos": ["../x.mp4"]}, ["../x.mp4", "leaves the data root"]),
        ("jsonl", {"images": ["a/../../x.png"]}, ["leaves the data root"]),
        ("jsonl", {"images": ["/etc/x.png"]}, ["leaves the data root"]),
        ("jsonl", {"videos": ["x\0.mp4"]}, ["not a path"]),
        ("jsonl", {"videos": ["frame.JPG"]}, ["frame.JPG", "image", "video"]),
        ("jsonl", {"question": "half \ud800"}, ['"question"', "surrogate"]),
        ("training", {"negative_answers": ["left", "up"]}, ["negative_answers", "2 different"]),
        (
            "training",
            {"answer": "up", "negative_answers": ["left", "up", "left", "down"]},
            ["negative_answers", "2 different"],
        ),
        ("training", {"negative_answers": "left"}, ["negative_answers", "list"]),
        ("training", {"negative_answers": ["a", "b", 3]}, ["negative_answers", "text"]),
        ("training", {"video_basename": "../../../x.mp4"}, ["leaves the data root"]),
        ("training", {"video_basename": "x.png"}, ["x.png", "image", "video"]),
        ("training", {"current_observation_basename": "../../../x.png"}, ["leaves the data root"]),
        ("training", {"current_observation_basename": "x.mp4"}, ["x.mp4", "video", "image"]),
        ("training", {"task_progress_metadata": "none"}, ["task_progress_metadata", "list"]),
        ("training", {"sample_id": True}, ['"sample_id"']),
        ("validation", {"golden_choice_idx": "E"}, ["golden_choice_idx", "'E'", "A, B, C, D"]),
        ("validation", {"golden_choice_idx": 1}, ["golden_choice_idx"]),
        ("video_r1", {"problem_type": "essay"}, ["problem_type", "'essay'", "regression"]),
        ("video_r1", {"data_type": "audio"}, ["data_type", "'audio'", "video, image"]),
        ("video_r1", {"path": "./images/1.jpg"}, ["1.jpg", "image", "video"]),
        ("video_r1", {"path": "./../x.mp4"}, ["leaves the data root"]),
        ("video_r1", {"data_type": "image"}, ["mp4", "video", "image"]),
        ("video_r1", {"solution": "B"}, ["solution", "<answer>"]),
        ("video_r1", {"solution": "<answer> </answer>"}, ["solution", "<answer>"]),
        ("video_r1", {"solution": "<answer>C</answer>"}, ["solution", "A, B", "'C'"]),
        ("video_r1", {"options": ["left", "right"]}, ["options", "A. ..."]),
        ("video_r1", {"options": ["A. left", "A. right"]}, ["options"]),
        ("video_r1", {"options": "A. left"}, ["options", "list"]),
    ],
)
def test_unusable_record_is_set_aside_with_its_reason(tmp_path, layout, fields, parts):
    reason = reason_of(tmp_path, layout, {**LAYOUTS[layout][0], **fields})
    for part in parts:
        assert part in reason


@pytest.mark.parametrize("layout", LAYOUTS)
def test_missing_empty_and_wholly_unusable_files_are_refused(tmp_path, layout):
    read = LAYOUTS[layout][1]
    with pytest.raises(InputError, match=r"none\.jsonl: no such annotations file"):
        read(tmp_path, "none.jsonl")
    write_lines(tmp_path / "empty.jsonl", ["", " "])
    with pytest.raises(InputError, match=r"empty\.jsonl: holds no samples"):
        read(tmp_path, "empty.jsonl")
    write_lines(tmp_path / "all.jsonl", [{"a": 1}, "{"])
    with pytest.raises(InputError, match=r"2 of 2 samples.*all\.jsonl:1"):
        read(tmp_path, "all.jsonl")


def test_line_that_is_not_utf8_is_set_aside_and_a_byte_order_mark_is_not(tmp_path):
    good = json.dumps(JSONL).encode()
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + good + b"\r\n" + b'{"id": "\xff"}\r\n\r\n')
    annotations = read_made(tmp_path, "a.jsonl")
    assert len(annotations.samples) == 1
    assert "a.jsonl:2: not valid JSON (not UTF-8)" in annotations.bad[0].reason


def test_line_separators_inside_a_text_do_not_end_the_line(tmp_path):
    question = "which\u2028way\u0085?"
    line = json.dumps({**JSONL, "question": question}, ensure_ascii=False)
    write_lines(tmp_path / "a.jsonl", [line])
    (sample,) = read_made(tmp_path, "a.jsonl").samples
    assert sample.question == question


def test_media_may_lie_behind_a_symbolic_link(tmp_path):
    (tmp_path / "disk").mkdir()
    root = tmp_path / "root"
    root.mkdir()
    (root / "videos").symlink_to(tmp_path / "disk")
    write_lines(root / "a.jsonl", [JSONL])
    assert read_made(root, "a.jsonl").samples[0].videos == (root / "videos" / "x.mp4",)
    # Through the link, the file system's own reading of this path would leave the root.
    write_lines(root / "a.jsonl", [{**JSONL, "videos": ["videos/../x.mp4"]}])
    assert read_made(root, "a.jsonl").samples[0].videos == (root / "x.mp4",)


def array(tmp_path, text: str):
    (tmp_path / "a.json").write_text(text)
    return read_made(tmp_path, "a.json", kind="video_r1")


def test_array_names_the_line_on_which_a_bad_entry_begins(tmp_path):
    good = video_r1_record(0)
    entries = [good, {**good, "data_type": "audio"}, good]
    annotations = array(tmp_path, json.dumps(entries, indent=2))
    assert len(annotations.samples) == 2
    lines = (tmp_path / "a.json").read_text().splitlines()
    number = [place for place, line in enumerate(lines, start=1) if line == "  {"][1]
    assert annotations.bad[0].sample_id == f"a.json:{number}"
    assert array(tmp_path, json.dumps(entries)).bad[0].sample_id == "a.json:1"


@pytest.mark.parametrize(("end", "line"), [(",\n{", 3), (";\n{}]", 2), (",\n{}", 3), ("", 2)])
def test_torn_array_is_refused_at_its_line(tmp_path, end, line):
    with pytest.raises(InputError, match=rf"a\.json:{line}: not valid JSON"):
        array(tmp_path, "[\n" + json.dumps(video_r1_record(0)) + end)


def test_lines_and_array_give_the_same_samples(tmp_path):
    records = [video_r1_record(number) for number in range(10)]
    write_lines(tmp_path / "lines.jsonl", records)
    write_lines(tmp_path / "lines.json", records)
    expected = array(tmp_path, json.dumps(records)).samples
    assert read_made(tmp_path, "lines.jsonl", kind="video_r1").samples == expected
    assert read_made(tmp_path, "lines.json", kind="video_r1").samples == expected


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
@pytest.mark.parametrize("end", ["", "\n", "\n\n"])
def test_fingerprint_is_that_of_all_the_file_s_bytes(tmp_path, name, end):
    records = [video_r1_record(number) for number in range(3)]
    text = json.dumps(records, indent=1)
    if name == "a.jsonl":
        text = "\n\n" + "\r\n".join(json.dumps(record) for record in records)
    content = (text + end).encode()
    (tmp_path / name).write_bytes(content)
    seen = read_made(tmp_path, name, kind="video_r1").fingerprint
    assert seen is not None
    assert seen.sha256 == hashlib.sha256(content).hexdigest()
    assert seen.lines == len(content.splitlines())
    assert seen.file == str(tmp_path / name)


def test_ranks_that_decode_nothing_count_the_samples_and_have_none(tmp_path):
    write_lines(tmp_path / "a.jsonl", [*(video_r1_record(n) for n in range(3)), {"problem_id": 4}])
    whole = read_made(tmp_path, "a.jsonl", kind="video_r1")
    outline = pickle.loads(pickle.dumps(whole.without_samples()))
    assert (len(outline.samples), outline.total) == (3, 4)
    assert (outline.bad, outline.fingerprint) == (whole.bad, whole.fingerprint)
    with pytest.raises(LookupError, match="only the leaders"):
        outline.samples[0]


def parse(record, seed):
    """A layout of this test: see the next function."""
    return Sample(record.text("name"), f"{seed} ?", record.text("letter"))


def test_a_new_layout_is_a_module_and_an_entry(tmp_path, monkeypatch):
    monkeypatch.setitem(DATA_KINDS, "mine", __name__)
    write_lines(tmp_path / "a.jsonl", [{"name": "x", "letter": "B"}, {"name": "y"}])
    read = read_made(tmp_path, "a.jsonl", kind="mine", seed=5)
    assert read.samples == [Sample("x", "5 ?", "B")]
    assert '"letter" is missing' in read.bad[0].reason
