"""Short training runs on the layouts that users have, with bad lines and missing files."""

import json
import shutil
from contextlib import closing
from pathlib import Path

import pytest
from made_data import (
    seed_bench_r1_record,
    write_lines,
    write_seed_bench_r1,
    write_video_r1,
)
from records import lines
from small_runs import small_recipe, small_trainer

from nemo_care.data.prompts import PromptBuilder
from nemo_care.errors import InputError
from nemo_care.recipe.data import SourceConfig

FILES = Path(__file__).parents[1] / "files/media"
TRAINING = "annotations/training_6k.jsonl"


@pytest.fixture
def recipe(checkpoint, tmp_path):
    """Two steps of four prompts; up to a third of the data may be unusable."""
    recipe = small_recipe(checkpoint, tmp_path / "data")
    recipe.trainer.max_steps = 2
    recipe.data.image.min_pixels = recipe.data.image.max_pixels = 784
    recipe.data.prompt_template = "{question} {options}"
    recipe.data.max_skipped_fraction = 0.34
    return recipe


def test_seed_bench_r1_trains_and_validates_by_level(recipe, ranks, tmp_path):
    root = write_seed_bench_r1(tmp_path / "data", train=9)
    recipe.data.train.kind = recipe.data.validation.kind = "seed_bench_r1"
    recipe.data.train.annotations = TRAINING
    # Two steps are one epoch, and meet the broken sample once.
    recipe.data.train.shuffle = False
    recipe.data.validation.annotations = {
        f"L{n}": f"annotations/validation_L{n}.jsonl" for n in (1, 2, 3)
    }
    (root / "images/EpicKitchens/P01_02_2.png").unlink()
    good = [json.loads(line) for line in (root / TRAINING).read_text().splitlines()]
    write_lines(root / TRAINING, [good[0], "{", *good[1:]])
    l2 = root / "annotations/validation_L2.jsonl"
    bad = {**seed_bench_r1_record(50, training=False), "golden_choice_idx": "E"}
    write_lines(l2, [*lines(l2), bad])

    trainer = small_trainer(recipe, ranks, tmp_path / "run", saves=False)
    summary = trainer.fit()

    assert [line["step"] for line in lines(tmp_path / "run/metrics.jsonl")] == [1, 2]
    assert {level: result["count"] for level, result in summary["end"].items()} == {
        "L1": 2,
        "L2": 2,
        "L3": 2,
    }
    skipped = lines(tmp_path / "run/skipped.jsonl")
    assert [record["sample_id"] for record in skipped] == [
        "training_6k.jsonl:2",
        "validation_L2.jsonl:3",
        "2",
    ]
    assert [record["step"] for record in skipped[:2]] == [0, 0]
    assert skipped[0]["index"] is None
    assert f"{root}/{TRAINING}:2: not valid JSON" in skipped[0]["reason"]
    assert "P01_02_2.png: image not readable: there is no such file" in skipped[2]["reason"]
    assert summary["skipped"] == 3
    rows = lines(tmp_path / "run/rollouts/step_000001.jsonl")
    assert len(rows) == 4 * recipe.algorithm.group_size


def test_video_r1_trains_on_every_answer_kind(recipe, ranks, tmp_path):
    root = write_video_r1(tmp_path / "data", count=8)
    # The content decides what a file is; decord opens no GIF.
    shutil.copy(FILES / "animation.gif", root / "videos/2.mp4")
    recipe.data.train.kind = "video_r1"
    recipe.data.train.annotations = "Video-R1-260k.json"
    summary = small_trainer(recipe, ranks, tmp_path / "run", saves=False).fit()
    assert summary["steps"] == 2
    assert summary["skipped"] == 0
    rows = [
        row for step in (1, 2) for row in lines(tmp_path / f"run/rollouts/step_{step:06d}.jsonl")
    ]
    assert {row["prompt_id"] for row in rows} == {str(number) for number in range(8)}
    metrics = lines(tmp_path / "run/metrics.jsonl")
    assert sorted(line["data/videos_by_pyav"] for line in metrics) == [0, 1]


def test_mixture_goes_on_where_it_stopped_and_lists_bad_lines_once(recipe, ranks, tmp_path):
    seed_root = write_seed_bench_r1(tmp_path / "seed", train=6)
    write_lines(seed_root / TRAINING, [*lines(seed_root / TRAINING), "torn"])
    video_root = write_video_r1(tmp_path / "video", count=6)
    (video_root / "videos/2.mp4").write_bytes(b"no video")
    recipe.data.train.sources = [
        SourceConfig("seed_bench_r1", str(seed_root), TRAINING, weight=2.0),
        SourceConfig("video_r1", str(video_root), "Video-R1-260k.json", weight=1.0),
    ]
    recipe.trainer.max_steps = 3
    # Decoded ahead or not: what comes out is the same.
    recipe.data.workers = 2
    whole = small_trainer(recipe, ranks, tmp_path / "whole", saves=False)
    with closing(whole.prompts.loader.workers):
        whole.fit()
    assert lines(tmp_path / "whole/metrics.jsonl")[-1]["data/worker_memory_gib"] > 0

    recipe.data.workers = 0
    recipe.trainer.max_steps = 1
    small_trainer(recipe, ranks, tmp_path / "parts").fit()
    listed = lines(tmp_path / "parts/skipped.jsonl")
    assert [r["sample_id"] for r in listed].count("training_6k.jsonl:7") == 1
    recipe.trainer.max_steps = 3
    summary = small_trainer(recipe, ranks, tmp_path / "parts").fit()

    for file in ("skipped.jsonl", *(f"rollouts/step_{step:06d}.jsonl" for step in (1, 2, 3))):
        assert (tmp_path / "parts" / file).read_text() == (tmp_path / "whole" / file).read_text()
    assert summary["skipped"] == len(lines(tmp_path / "parts/skipped.jsonl"))
    metrics = lines(tmp_path / "parts/metrics.jsonl")
    assert [line["data/worker_memory_gib"] for line in metrics] == [None] * 3


def test_samples_skipped_before_a_restart_count_after_it(recipe, ranks, tmp_path):
    root = write_video_r1(tmp_path / "data", count=4)
    (root / "videos/2.mp4").write_bytes(b"no video")
    recipe.data.train.kind = "video_r1"
    recipe.data.train.annotations = "Video-R1-260k.json"
    recipe.trainer.max_steps = 1
    small_trainer(recipe, ranks, tmp_path / "run").fit()
    recipe.trainer.max_steps = 2
    recipe.data.max_skipped_fraction = 0.2
    with pytest.raises(InputError, match=r"1 of 4 training samples .* the first is 2: "):
        small_trainer(recipe, ranks, tmp_path / "run").fit()
    assert len(lines(tmp_path / "run/metrics.jsonl")) == 1


def test_samples_of_the_step_that_ends_the_run_are_listed(recipe, ranks, tmp_path):
    root = write_video_r1(tmp_path / "data", count=8)
    for number in (2, 4, 6):
        (root / f"videos/{number}.mp4").write_bytes(b"")
    recipe.data.train.kind = "video_r1"
    recipe.data.train.annotations = "Video-R1-260k.json"
    recipe.data.train.shuffle = False
    recipe.data.max_skipped_fraction = 0.1
    # The second time it meets them again, and lists them once.
    for _ in range(2):
        with pytest.raises(InputError, match=r"1 of 8 training samples .* the first is 2: "):
            small_trainer(recipe, ranks, tmp_path / "run").fit()
        listed = lines(tmp_path / "run/skipped.jsonl")
        assert [(item["step"], item["sample_id"]) for item in listed] == [(1, "2")]
        assert "2.mp4: video not readable: the file is empty" in listed[0]["reason"]
    recipe.data.max_skipped_fraction = 0.3
    with pytest.raises(InputError, match="3 of 8 training samples"):
        small_trainer(recipe, ranks, tmp_path / "run").fit()
    listed = lines(tmp_path / "run/skipped.jsonl")
    assert [item["sample_id"] for item in listed] == ["2", "4", "6"]


def test_line_that_became_bad_before_a_restart_is_listed_too(recipe, ranks, tmp_path):
    root = write_seed_bench_r1(tmp_path / "data")
    recipe.data.train.kind = "seed_bench_r1"
    recipe.data.train.annotations = TRAINING
    good = lines(root / TRAINING)
    write_lines(root / TRAINING, [*good, "torn"])
    recipe.trainer.max_steps = 1
    small_trainer(recipe, ranks, tmp_path / "run").fit()
    write_lines(root / TRAINING, [*good, "torn", "{"])
    recipe.trainer.max_steps = 2
    summary = small_trainer(recipe, ranks, tmp_path / "run").fit()
    listed = lines(tmp_path / "run/skipped.jsonl")
    assert [(r["step"], r["sample_id"]) for r in listed] == [
        (0, "training_6k.jsonl:9"),
        (1, "training_6k.jsonl:10"),
    ]
    assert summary["skipped"] == 2


@pytest.mark.parametrize("level", [None, "L1"])
def test_more_bad_lines_than_allowed_are_refused_before_the_run(recipe, ranks, tmp_path, level):
    root = write_seed_bench_r1(tmp_path / "data")
    recipe.data.train.kind = recipe.data.validation.kind = "seed_bench_r1"
    recipe.data.train.annotations = TRAINING
    recipe.data.validation.annotations = {"L1": "annotations/validation_L1.jsonl"}
    name = "validation_L1" if level else "training_6k"
    file = root / f"annotations/{name}.jsonl"
    good = lines(file)
    write_lines(file, [*good, *["{"] * len(good)])
    recipe.data.max_skipped_fraction = 0.4
    count = len(good)
    with pytest.raises(
        InputError,
        match=rf"{count} of {2 * count} .*max_skipped_fraction=0\.4.*{name}\.jsonl:{count + 1}",
    ):
        small_trainer(recipe, ranks, tmp_path / "run")


def test_validation_may_see_other_numbers_of_frames(
    checkpoint, world, ranks, tmp_path, monkeypatch
):
    recipe = small_recipe(checkpoint, world)
    recipe.data.validation.annotations = {"L1": "validation_L1.jsonl"}
    recipe.data.validation.samples_per_level = 2
    recipe.data.validation.max_frames = 4
    frames = []
    finish = PromptBuilder.finish

    def watched(self, draft, media):
        frames.extend(2 * grid[0] for grid in media.grids)
        return finish(self, draft, media)

    monkeypatch.setattr(PromptBuilder, "finish", watched)
    trainer = small_trainer(recipe, ranks, tmp_path / "run")
    trainer.run_validation()
    assert frames == [4, 4]
    frames.clear()
    trainer.prompts.next_step()
    assert frames == [8, 8, 8, 8]
