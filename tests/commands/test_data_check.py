"""`nemo-care data check`: everything that a run could not use is found, counted and listed."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from made_data import (
    seed_bench_r1_record,
    write_lines,
    write_noise,
    write_seed_bench_r1,
    write_video_r1,
)
from made_media import DAMAGES, damaged_video, load_or_misbehave, picture
from PIL import Image
from small_runs import small_recipe

from nemo_care.checks.data import data_files, read_file
from nemo_care.cli import main
from nemo_care.commands import data_check
from nemo_care.commands.data_check import check_data
from nemo_care.data.prompts import PromptBuilder
from nemo_care.data.tokenizer import load_tokenizer
from nemo_care.errors import InputError
from nemo_care.miniature import files as miniature_files
from nemo_care.models.families import read_family
from nemo_care.recipe.data import SourceConfig

LEVELS = {f"L{number}": f"annotations/validation_L{number}.jsonl" for number in (1, 2, 3)}
FILES = Path(__file__).parents[1] / "files/media"
TRAINING = "annotations/training_6k.jsonl"


@pytest.fixture
def check(capfd, tmp_path):
    """Run the command in this process; gives its status, stdout, stderr and report."""

    def run(*arguments):
        out = tmp_path / "report.json"
        command = ["--config-name", "tiny_cpu", "--workers", "0", "--out", out, *arguments]
        status = main(["data", "check", *map(str, command)])
        printed = capfd.readouterr()
        return status, printed.out, printed.err, json.loads(out.read_text())

    return run


@pytest.fixture
def recipe(checkpoint, tmp_path):
    recipe = small_recipe(checkpoint, tmp_path)
    recipe.data.image.min_pixels = recipe.data.image.max_pixels = 784
    recipe.data.max_prompt_tokens = 200
    return recipe


def builder_of(recipe) -> PromptBuilder:
    form = read_family(recipe.model.hf_path).prompt
    return PromptBuilder(recipe.data, form, load_tokenizer(recipe.model.hf_path, form))


def seed_bench_overrides(root: Path, levels=LEVELS) -> list[str]:
    return [
        "data.train.kind=seed_bench_r1",
        f"data.train.root={root}",
        f"data.train.annotations={TRAINING}",
        "data.validation.kind=seed_bench_r1",
        f"data.validation.root={root}",
        "data.validation.annotations={" + ",".join(f"{k}:{v}" for k, v in levels.items()) + "}",
    ]


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """Samples that can't be used for every reason there is, and two that can."""
    root = tmp_path_factory.mktemp("damaged")
    for number, name in enumerate(("good.mp4", "good.png")):
        write_noise(root / name, number)
    for damage in DAMAGES:
        damaged_video(root / f"{damage}.mp4", damage)
    (root / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    Image.fromarray(picture(4, 1000)).save(root / "narrow.png")
    Image.fromarray(picture(60, 60)).save(root / "torn.jpg")
    (root / "torn.jpg").write_bytes((root / "torn.jpg").read_bytes()[:-500])
    records = [
        {"id": "good", "question": "left ?", "solution": "A", "videos": ["good.mp4"]},
        *(
            {"id": damage, "question": "left ?", "solution": "A", "videos": [f"{damage}.mp4"]}
            for damage in DAMAGES
        ),
        "{",
        *(
            {"id": name, "question": "up ?", "solution": "A", "images": [f"{name}.png"]}
            for name in ("good", "lost", "broken", "narrow")
        ),
        {"id": "torn", "question": "up ?", "solution": "A", "images": ["torn.jpg"]},
        {"id": "long", "question": "left " * 300, "solution": "A", "images": ["good.png"]},
        {"id": "token", "question": "<|video_pad|>", "solution": "A"},
        {"id": "text", "question": "up ?", "solution": "A", "problem_type": "OCR"},
    ]
    write_lines(root / "train.jsonl", records)
    return root


CAUSES = {
    **dict.fromkeys(DAMAGES, "unreadable"),
    **{"missing": "missing", "train.jsonl:12": "bad line"},
    **{"lost": "missing", "broken": "unreadable", "narrow": "other", "torn": "unreadable"},
    **{"long": "too long", "token": "other"},
}
"""What is wrong with the samples of `damaged` that can't be used."""


def damaged_recipe(recipe, damaged):
    recipe.data.train.root = str(damaged)
    recipe.data.validation.annotations = None
    return recipe


def test_data_that_can_all_be_used_ends_with_status_0_and_counts(check, tmp_path):
    root = write_seed_bench_r1(tmp_path / "data", train=8, validation=4)
    status, out, err, report = check(*seed_bench_overrides(root))
    assert status == 0
    assert report["usable"]
    assert report["problems"] == []
    train, *levels = report["files"]
    assert [file["name"] for file in levels] == [f"validation {level}" for level in LEVELS]
    for file, count in ((train, 8), *((level, 4) for level in levels)):
        assert file["lines"] == file["samples"] == file["checked"] == file["usable"] == count
        # Every fourth question of the made files has no video.
        assert file["media"] == {"videos": 3 * count // 4, "images": count, "text only": 0}
        assert file["problem_types"] == {"multiple choice": count}
        assert file["unusable_fraction"] == 0
        assert not file["stops_a_run"]
    assert re.search(r"train +8 +8 +8 +0\.0% +continues", out)
    assert "20/20" in err
    assert not list(tmp_path.glob("*.partial"))


def test_videos_that_pyav_decodes_are_counted(check, tmp_path):
    for name in ("animation.gif", "av1.mp4", "upright_16x16.mp4"):
        shutil.copy(FILES / name, tmp_path)
    write_noise(tmp_path / "plain.mp4", 0)
    videos = [[file.name] for file in sorted(tmp_path.iterdir())]
    sample = {"question": "left ?", "solution": "A", "problem_type": "OCR"}
    records = [{"id": str(n), "videos": v, **sample} for n, v in enumerate(videos)]
    write_lines(tmp_path / "train.jsonl", records)
    overrides = [
        *("data.train.kind=jsonl", f"data.train.root={tmp_path}"),
        *("data.train.annotations=train.jsonl", "data.validation.annotations=null"),
    ]
    for options in ([], ["--sizes-only"]):
        status, out, _, report = check(*overrides, *options)
        assert status == 0
        assert report["files"][0]["videos_by_pyav"] == 3
        assert "3 videos decoded by PyAV: decord can't open them" in out


def test_whatever_can_t_be_used_is_listed_with_its_cause_and_reason(check, damaged):
    overrides = [
        *("data.train.kind=jsonl", f"data.train.root={damaged}"),
        "data.validation.annotations=null",
    ]
    status, out, err, report = check(*overrides)
    assert status == 2
    message = [line for line in err.splitlines() if line.startswith("nemo-care: ")]
    assert len(message) == 1
    assert f"{len(CAUSES)} lines and samples" in message[0]
    assert "data.max_skipped_fraction=0.05" in message[0]
    assert {p["sample_id"]: p["cause"] for p in report["problems"]} == CAUSES
    reasons = {problem["sample_id"]: problem["reason"] for problem in report["problems"]}
    for damage, expected in DAMAGES.items():
        assert f"{damaged}/{damage}.mp4: video not readable" in reasons[damage]
        assert expected in reasons[damage]
    assert "train.jsonl:12: not valid JSON" in reasons["train.jsonl:12"]
    assert reasons["narrow"].startswith(
        f"{damaged}/narrow.png: frames of 1000x4 pixels: too narrow"
    )
    assert all(reason in out for reason in reasons.values())
    (file,) = report["files"]
    assert (file["lines"], file["checked"], file["usable"]) == (20, 19, 3)
    assert file["missing_files"] == [f"{damaged}/lost.png", f"{damaged}/missing.mp4"]
    assert file["stops_a_run"]


def test_solutions_are_counted_where_they_are_normalised_or_set_aside(check, tmp_path):
    options = {"A": "left", "B": "right"}
    records = [
        {"question": "up ?", "solution": "(B)", "options": options},
        {"question": "up ?", "solution": "right", "options": options},
        {"question": "up ?", "solution": "B", "options": options},
        {"question": "up ?", "solution": "yes", "problem_type": "free-form"},
        {"question": "up ?", "solution": "12 cm", "problem_type": "numerical"},
        {"question": "up ?", "solution": "0", "problem_type": "regression"},
    ]
    write_lines(tmp_path / "a.jsonl", records)
    overrides = [
        *("data.train.kind=jsonl", f"data.train.root={tmp_path}", "data.train.annotations=a.jsonl"),
        *("data.validation.kind=jsonl", f"data.validation.root={tmp_path}"),
        "data.validation.annotations={L1:a.jsonl,L2:a.jsonl,L3:a.jsonl}",
    ]
    status, out, _, report = check(*overrides)
    assert status == 2
    train, *levels = report["files"]
    expected = [
        {"where": "a.jsonl:1", "given": "(B)", "solution": "B"},
        {"where": "a.jsonl:2", "given": "right", "solution": "B"},
    ]
    assert all(file["normalised"] == expected for file in (train, *levels))
    assert "normalised: 2; the first: a.jsonl:1: '(B)' -> 'B'" in out
    assert train["one_word_solutions"] == 1
    assert "free-form solutions of one word" in out
    bad = [(problem["file"], problem["sample_id"]) for problem in report["problems"]]
    # A regression towards 0 can be evaluated, and never be rewarded.
    assert bad == [
        *(("train", "a.jsonl:5"), ("train", "a.jsonl:6")),
        *((f"validation {level}", "a.jsonl:5") for level in LEVELS),
    ]


def test_the_check_finds_what_building_the_prompts_would(recipe, damaged):
    builder = builder_of(damaged_recipe(recipe, damaged))
    reasons, tokens = {}, {}
    samples, _ = read_file(data_files(recipe.data)[0], seed=0, limit=None)
    for place, sample in enumerate(samples.checked):
        try:
            prompt = builder.build(place, sample)
            tokens[place] = prompt.length, int(prompt.is_vision.sum())
        except InputError as error:
            reasons[place] = str(error)
    (report,) = check_data(recipe, workers=0)
    assert {p.place: p.reason for p in report.problems if p.place is not None} == reasons
    usable = [length for length in report.lengths if length.vision_tokens is not None]
    assert {length.place: (length.tokens, length.vision_tokens) for length in usable} == tokens
    (too_long,) = [length for length in report.lengths if length.vision_tokens is None]
    assert f"has {too_long.tokens} tokens" in reasons[too_long.place]


def test_the_report_does_not_depend_on_the_number_of_processes(recipe, damaged):
    damaged_recipe(recipe, damaged)
    alone = check_data(recipe, workers=0)
    assert check_data(recipe, workers=1) == alone
    assert check_data(recipe, workers=3) == alone


def test_files_that_hang_or_crash_the_decoder_cost_their_sample_alone(recipe, tmp_path):
    names = ["a", "hang", "b", "crash", "c", "d"]
    for name in names:
        write_noise(tmp_path / f"{name}.mp4", 0)
    records = [
        {"id": name, "question": "up ?", "solution": "A", "videos": [f"{name}.mp4"]}
        for name in names
    ]
    write_lines(tmp_path / "train.jsonl", records)
    recipe.data.seconds_per_sample = 2
    (report,) = check_data(recipe, workers=2, load=load_or_misbehave)
    assert {p.sample_id: p.cause for p in report.problems} == {
        "hang": "too slow",
        "crash": "crashes decoder",
    }
    assert "data.seconds_per_sample=2" in report.problems[0].reason
    assert [length.place for length in report.lengths] == [0, 2, 4, 5]


def test_lengths_are_known_without_decoding(recipe, damaged):
    damaged_recipe(recipe, damaged)
    (whole,) = check_data(recipe, workers=0)
    (sizes,) = check_data(recipe, workers=0, sizes_only=True)
    found = {problem.sample_id for problem in sizes.problems}
    assert "torn" not in found
    # decord decodes ahead in threads, and may or may not meet what is wrong there.
    assert CAUSES.keys() - found <= {"torn", "cut at the end", "overwritten"}
    lengths = {length.place: length for length in sizes.lengths}
    assert all(lengths[length.place] == length for length in whole.lengths)
    assert lengths.keys() - {length.place for length in whole.lengths}


def test_a_first_look_is_spread_over_the_file_and_estimates_the_rest(check, tmp_path):
    records = [
        {"id": str(number), "question": "up ?", "solution": "A", "videos": ["none.mp4"]}
        for number in range(40)
    ]
    write_lines(tmp_path / "train.jsonl", [*records, "{"])
    overrides = ["data.train.kind=jsonl", f"data.train.root={tmp_path}"]
    overrides += ["data.validation.annotations=null", "data.max_skipped_fraction=1"]
    status, out, _, report = check("--limit", "8", *overrides)
    assert status == 2
    (file,) = report["files"]
    assert (file["lines"], file["samples"], file["checked"]) == (41, 40, 8)
    assert file["unusable_fraction"] == 1
    places = [problem["place"] for problem in report["problems"][1:]]
    assert [place // 5 for place in places] == list(range(8))
    assert report["limit"] == 8
    assert "a complete check can find more" in out
    assert check("--limit", "8", *overrides)[3] == report
    assert check("--limit", "8", "trainer.seed=9", *overrides)[3]["problems"] != report["problems"]


def test_sources_and_levels_are_checked_whatever_is_wrong_with_the_others(recipe, tmp_path):
    seed_root = write_seed_bench_r1(tmp_path / "seed", train=4, validation=3)
    video_root = write_video_r1(tmp_path / "video", count=5)
    recipe.data.train.sources = [
        SourceConfig("seed_bench_r1", str(seed_root), TRAINING),
        SourceConfig("video_r1", str(video_root), "Video-R1-260k.json"),
        SourceConfig("jsonl", str(tmp_path), "nowhere.jsonl"),
    ]
    validation = recipe.data.validation
    validation.kind, validation.root = "seed_bench_r1", str(seed_root)
    validation.annotations = LEVELS
    validation.samples_per_level = 2
    write_lines(seed_root / LEVELS["L2"], ["{", "}"])
    last = seed_bench_r1_record(4 + 2, training=False)
    (seed_root / "images" / last["video_source"] / last["current_observation_basename"]).unlink()

    reports = {report.file.name: report for report in check_data(recipe, workers=0)}

    assert list(reports) == [
        *("train[0]", "train[1]", "train[2]"),
        *("validation L1", "validation L2", "validation L3"),
    ]
    assert "nowhere.jsonl: no such annotations file" in reports["train[2]"].error
    assert "2 of 2 samples" in reports["validation L2"].error
    types = {sample.problem_type for sample in reports["train[1]"].checked}
    assert len(types) == 5
    for name in ("train[0]", "train[1]", "validation L1", "validation L3"):
        assert reports[name].error is None
        # The third sample of level 1, which lacks its image, is none of those that a run uses.
        assert reports[name].problems == []
        assert len(reports[name].lengths) == reports[name].usable > 0
    assert len(reports["validation L1"].checked) == 2


def test_validation_is_measured_with_its_own_number_of_frames(recipe, world):
    recipe.data.train.root = None
    recipe.data.validation.root = str(world)
    recipe.data.validation.annotations = {"L1": "validation_L1.jsonl"}
    (as_training,) = check_data(recipe, workers=0)
    recipe.data.validation.max_frames = 4
    (own,) = check_data(recipe, workers=0)
    tokens = [[length.vision_tokens for length in report.lengths] for report in (as_training, own)]
    assert tokens == [[4] * 8, [2] * 8]


def test_a_terminal_gets_the_first_problems_and_the_file_all(check, tmp_path):
    records = [
        {"id": str(number), "question": "up ?", "solution": "A", "videos": ["none.mp4"]}
        for number in range(60)
    ]
    write_lines(tmp_path / "train.jsonl", [*records, *["{"] * 3])
    overrides = ["data.train.kind=jsonl", f"data.train.root={tmp_path}"]
    _, out, _, report = check(*overrides, "data.validation.annotations=null")
    assert len(report["problems"]) == 63
    assert out.count("not readable") == 17
    assert out.count("not valid JSON") == 3
    assert "... and 43 more" in out
    assert str(tmp_path / "report.json") in out


def test_files_of_the_miniature_are_written_where_missing(check, tmp_path, monkeypatch):
    root = tmp_path / "world"

    def write_small(folder):
        if not Path(folder).exists():
            miniature_files.write_world(folder, train=4, validation=2)

    monkeypatch.setattr(miniature_files, "ensure_world", write_small)
    status, _, _, report = check(f"data.train.root={root}", f"data.validation.root={root}")
    assert status == 0
    assert [file["usable"] for file in report["files"]] == [4, 2, 2, 2]


def test_an_interrupted_check_leaves_the_last_report_alone(capfd, tmp_path, monkeypatch, world):
    out = tmp_path / "report.json"
    out.write_text("the last one")

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(data_check, "check_data", interrupted)
    status = main(["data", "check", "--config-name", "tiny_cpu", "--workers", "0", f"--out={out}"])
    assert status == 130
    assert "nemo-care: interrupted" in capfd.readouterr().err
    assert out.read_text() == "the last one"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--limit", "0"], ["--limit 0", "1 or more"]),
        (["--workers", "-1"], ["--workers -1", "0 or more"]),
        (["--out", "/no/such/folder/report.json"], ["--out /no/such/folder/report.json"]),
        (["--out", "/"], ["--out /: is a folder"]),
        (["data.max_prompt_tokns=3"], ["did you mean data.max_prompt_tokens"]),
        (["data.train.root=null"], ["data.train.root and data.validation.annotations"]),
        (["model.hf_path=/no/such"], ["model.hf_path=/no/such", "config.json"]),
        (
            ["data.train.sources=[{root:ROOT,weight:1},{root:ROOT,weight:1e-9}]"],
            ["data.train.sources[1].weight=1e-09 is too small"],
        ),
    ],
)
def test_an_unusable_command_is_refused_in_one_line(capfd, tmp_path, world, arguments, parts):
    command = ["data", "check", "--config-name", "tiny_cpu", "--workers", "0"]
    command += ["--out", str(tmp_path / "report.json"), "data.validation.annotations=null"]
    arguments = [argument.replace("ROOT", str(world)) for argument in arguments]
    assert main([*command, f"data.train.root={world}", "data.train.kind=jsonl", *arguments]) == 2
    messages = [line for line in capfd.readouterr().err.splitlines() if "nemo-care: " in line]
    assert len(messages) == 1
    assert all(part in messages[0] for part in parts)
    assert not (tmp_path / "report.json").exists()


_PROGRAM = """
import sys
from nemo_care.cli import main

if __name__ == "__main__":
    status = main(sys.argv[1:])
    heavy = {name for name in sys.modules if name in ("nemo", "megatron", "lightning")}
    print(f"imported: {heavy}")
    sys.exit(status)
"""


def test_the_command_needs_neither_nemo_nor_megatron_nor_weights(tmp_path, checkpoint):
    """In a process of its own, on processes that decode, as a person types it."""
    root = write_seed_bench_r1(tmp_path / "data")
    video = root / "videos/EpicKitchens/P01_00_0.mp4"
    video.write_bytes(b"<html>404</html>")
    weightless = tmp_path / "checkpoint"
    weightless.mkdir()
    for file in checkpoint.iterdir():
        if file.suffix != ".safetensors":
            (weightless / file.name).symlink_to(file)
    (tmp_path / "program.py").write_text(_PROGRAM)
    done = subprocess.run(
        [
            *(sys.executable, str(tmp_path / "program.py"), "data", "check"),
            *("--config-name", "tiny_cpu", "--workers", "2", f"model.hf_path={weightless}"),
            *seed_bench_overrides(root),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "imported: set()" in done.stdout
    report = json.loads((tmp_path / "data_check.json").read_text())
    assert [problem["cause"] for problem in report["problems"]] == ["unreadable"]
    assert f"{video}: video not readable: it can't be opened" in done.stdout
    # What ffmpeg has to say of it would tear the progress bar.
    assert "video_reader.cc" not in done.stderr
