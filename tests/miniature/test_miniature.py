import functools
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from made_data import read_made
from records import lines
from small_runs import small_recipe
from transformers import AutoModelForImageTextToText, AutoTokenizer

import make_checkpoint
from batched import (
    completion_logits,
    prompt_positions,
    prompt_token_ids,
)
from gate import Gate, GateNotPassed, measure_gate
from make_checkpoint import GATE_FILE, build
from nemo_care.data.prompts import PromptBuilder
from nemo_care.data.tokenizer import load_tokenizer
from nemo_care.errors import InputError
from nemo_care.miniature import CHECKPOINT
from nemo_care.miniature.files import ensure_world, write_world
from nemo_care.miniature.vocabulary import DIRECTIONS, LETTERS, OPPOSITE, SHAPES, WORDS, encode
from nemo_care.miniature.world import (
    FRAMES,
    GRID,
    SIDE,
    TEMPLATES,
    Question,
    draw_level,
    draw_scenes,
)
from nemo_care.models.families import FAMILIES, read_family
from tiny_model import (
    CHECKPOINTS,
    MODEL_TYPES,
    build_model,
    load_checkpoint,
    save_checkpoint,
    tiny_config,
    with_experts,
)
from warm_start import STAGES, draw_batch, draw_completion


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # more make these tensors slower
    yield
    torch.set_num_threads(before)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("miniature") / "world"
    write_world(root, train=40, validation=12, seed=5)
    return root


# Drawing and asking


def test_the_shape_moves_in_its_direction_at_its_speed():
    scenes = draw_scenes(64, generator())
    # The median is the background: the shape covers less than half of a frame.
    pixels = scenes.frames.float()
    background = pixels.flatten(2, 3).median(dim=2).values[:, :, None, None]
    weight = ((pixels - background).abs().amax(-1) > 100).float()
    axis = torch.arange(SIDE).float()
    row = (weight.sum(3) * axis).sum(2) / weight.sum((2, 3))
    column = (weight.sum(2) * axis).sum(2) / weight.sum((2, 3))
    expected = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
    for i in range(64):
        down, right = expected[DIRECTIONS[scenes.direction[i]]]
        path = scenes.speed[i].item() * (FRAMES - 1)
        assert row[i, -1] - row[i, 0] == pytest.approx(down * path, abs=1)
        assert column[i, -1] - column[i, 0] == pytest.approx(right * path, abs=1)


def test_the_levels_differ_in_colours_and_in_the_question():
    (first, asked), (second, asked_2), (third, asked_3) = (
        draw_level(level, 32, generator()) for level in ("L1", "L2", "L3")
    )
    assert torch.equal(first.direction, second.direction)
    assert not torch.equal(first.frames, second.frames)
    assert torch.equal(second.frames, third.frames)
    assert asked == asked_2
    assert not any(question.reverse for question in asked)
    assert all(question.reverse for question in asked_3)
    for forward, reverse in zip(asked_2, asked_3, strict=True):
        assert reverse.options[reverse.solution] == OPPOSITE[forward.options[forward.solution]]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("template", range(TEMPLATES))
@pytest.mark.parametrize("claimed", DIRECTIONS)
def test_the_last_direction_of_a_reasoning_is_the_answer_it_implies(reverse, template, claimed):
    question = Question("disc", "up", ("left", "up", "right", "down"), reverse)
    words = question.reasoning(claimed, template).split()
    last = [word for word in words if word in DIRECTIONS][-1]
    assert question.options[question.implied_letter(claimed)] == last
    assert not set(words) & set(LETTERS)
    assert encode(" ".join(words))


def test_an_unknown_level_is_refused():
    with pytest.raises(ValueError, match="L4"):
        draw_level("L4", 1, generator())


# Files


def test_the_world_s_files_hold_questions_with_one_right_letter(world):
    train = lines(world / "train.jsonl")
    assert len(train) == 40
    for record in train:
        assert (world / record["videos"][0]).stat().st_size > 0
        assert record["problem_type"] == "multiple choice"
        assert sorted(record["options"].values()) == sorted(DIRECTIONS)
        assert record["solution"] in record["options"]
        assert "come from" not in record["question"]
        assert "forced_reasoning" not in record


@pytest.mark.parametrize("level", ["L1", "L2", "L3"])
def test_validation_forces_a_wrong_reasoning(world, level):
    records = lines(world / f"validation_{level}.jsonl")
    assert len(records) == 12
    for record in records:
        implied = record["options"][record["forced_answer"]]
        assert record["forced_answer"] != record["solution"]
        assert record["forced_reasoning"].split()[-1] == implied
        assert ("came from" in record["forced_reasoning"]) == (level == "L3")


def test_the_same_seed_writes_the_same_bytes(world, tmp_path):
    again = tmp_path / "again"
    write_world(again, train=40, validation=12, seed=5)
    names = sorted(path.relative_to(world) for path in world.rglob("*") if path.is_file())
    assert len(names) == 40 + 3 * 12 + 5
    for name in names:
        assert (again / name).read_bytes() == (world / name).read_bytes(), name
    write_world(tmp_path / "other", train=2, validation=2, seed=6)
    other = (tmp_path / "other" / "train.jsonl").read_text()
    assert other not in (world / "train.jsonl").read_text()


def test_a_world_that_is_there_already_is_kept(world):
    before = (world / "world.json").stat().st_mtime_ns
    ensure_world(world, train=40, validation=12, seed=5)
    assert (world / "world.json").stat().st_mtime_ns == before


def test_another_world_or_other_files_in_its_place_are_refused(world, tmp_path):
    with pytest.raises(InputError, match="another world"):
        ensure_world(world, train=40, validation=12, seed=6)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="no world of the miniature"):
        ensure_world(tmp_path, train=2, validation=2)
    with pytest.raises(InputError, match="exists already"):
        write_world(tmp_path, train=2, validation=2)


def test_an_interrupted_world_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("nemo_care.miniature.files.write_video", fail)
    with pytest.raises(OSError, match="disk full"):
        ensure_world(tmp_path / "world", train=2, validation=2)
    assert list(tmp_path.iterdir()) == []


# Tokenizer


def test_the_tokenizer_gives_each_word_its_place_in_the_vocabulary(tokenizer):
    assert len(tokenizer) == len(WORDS) == 51
    assert tokenizer.convert_tokens_to_ids(list(WORDS)) == list(range(len(WORDS)))
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    for letter in LETTERS:
        assert len(tokenizer.encode(letter)) == 1


def test_a_completion_survives_the_tokenizer(tokenizer):
    text = "<think> i see the disc . it moves up </think> <answer> B </answer>"
    token_ids = tokenizer.encode(text)
    assert token_ids == encode(text)
    assert tokenizer.decode([*token_ids, tokenizer.eos_token_id], skip_special_tokens=True) == text
    assert tokenizer.encode("<think>up</think><answer>B</answer>") == encode(
        "<think> up </think> <answer> B </answer>"
    )


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("file", ["train.jsonl", "validation_L3.jsonl"])
def test_a_run_s_prompts_are_those_of_the_warm_start(world, model_type, file):
    checkpoint = CHECKPOINTS[model_type]
    family = read_family(checkpoint)
    tokenizer = load_tokenizer(checkpoint, family.prompt)
    builder = PromptBuilder(small_recipe(checkpoint, world).data, family.prompt, tokenizer)
    sample = read_made(world, file).samples[0]
    prompt = builder.build(0, sample)
    token_ids = prompt_token_ids(model_type, sample.question)
    assert tokenizer.base.unk_token_id not in token_ids
    assert prompt.token_ids.tolist() == token_ids
    assert torch.equal(prompt.position_ids, prompt_positions(model_type, len(token_ids)))
    assert prompt.grid_thw.tolist() == [list(GRID)]


# Model and warm start


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_batched_logits_equal_hugging_face_s_at_the_same_positions(model_type):
    model = load_checkpoint(CHECKPOINTS[model_type])
    batch = draw_batch(model_type, STAGES[-1], 5, generator())
    completion_tokens = batch.weights.shape[1]
    positions = prompt_positions(model_type, batch.token_ids.shape[1])
    with torch.no_grad():
        ours = completion_logits(model, batch.pixel_values, batch.token_ids, completion_tokens)
        model.model.visual.config._attn_implementation = "sdpa"
        theirs = model(
            input_ids=batch.token_ids,
            position_ids=positions[:, None].expand(3, *batch.token_ids.shape),
            pixel_values_videos=batch.pixel_values.flatten(0, 1),
            video_grid_thw=torch.tensor([GRID] * 5),
            use_cache=False,
        ).logits[:, -completion_tokens - 1 : -1]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_the_same_seed_gives_the_same_weights_and_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    first = build_model(1)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(1), drawn)
    for name, weight in build_model(1).state_dict().items():
        assert torch.equal(weight, first.state_dict()[name]), name


def test_the_last_stage_plants_wrong_reasonings_and_a_short_cut():
    draw = random.Random(0)
    counts = {"right": 0, "opposite": 0, "follows": 0, "wrong": 0}
    question = Question(SHAPES[0], "up", DIRECTIONS)
    for _ in range(4000):
        chances = [draw.random() for _ in range(6)]
        words = draw_completion(STAGES[-1], question, 1, chances).split()
        claimed = words[words.index("</think>") - 1]
        letter = words[-3]
        counts["right"] += claimed == "up"
        counts["opposite"] += claimed == "down"
        if claimed != "up":
            counts["wrong"] += 1
            counts["follows"] += letter == question.implied_letter(claimed)
            assert letter in (question.implied_letter(claimed), question.solution)
    assert counts["right"] / 4000 == pytest.approx(0.55, abs=0.03)
    assert counts["opposite"] / counts["wrong"] == pytest.approx(0.6, abs=0.04)
    assert counts["follows"] / counts["wrong"] == pytest.approx(0.75, abs=0.04)


@pytest.fixture
def quick_gate(monkeypatch):
    """The gate, measured with few prompts; `build` does so too."""
    gate = functools.partial(measure_gate, prompts=16)
    monkeypatch.setattr(make_checkpoint, "measure_gate", gate)
    monkeypatch.setattr("warm_start.PROMPTS_BETWEEN_STAGES", 16)
    return gate


def test_a_short_build_fails_the_gate_and_is_set_aside(tmp_path, capsys, quick_gate):
    with pytest.raises(GateNotPassed, match="truth_without_reasoning is 0"):
        build(tmp_path / "tiny", seed=0, scale=0.0005)
    (made,) = tmp_path.iterdir()
    assert made.name == "tiny.rejected"
    model = load_checkpoint(made)
    assert model.config.text_config.num_key_value_heads == 2
    assert model.generation_config.eos_token_id == AutoTokenizer.from_pretrained(made).eos_token_id
    report = json.loads((made / GATE_FILE).read_text())
    assert report["passed"] is False
    assert report["gate"] == {name: round(v, 4) for name, v in vars(quick_gate(model)).items()}
    assert "stage 4 mostly follow: 1 steps" in capsys.readouterr().out
    with pytest.raises(InputError, match="exists already"):
        build(made, seed=0)


def test_a_model_with_experts_begins_with_the_outputs_of_the_one_without():
    dense = load_checkpoint(CHECKPOINTS["qwen3_vl"])
    batch = draw_batch("qwen3_vl", STAGES[-1], 4, generator())
    with torch.no_grad():
        wanted, found = (
            completion_logits(model.eval(), batch.pixel_values, batch.token_ids, 12)
            for model in (dense, with_experts(dense))
        )
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_stages_are_repeated_from_a_checkpoint_of_the_family(tmp_path, quick_gate):
    settings = {"seed": 0, "scale": 0.005, "require_gate": False, "stages": STAGES[-1:]}
    start = CHECKPOINTS["qwen3_vl"]
    build(tmp_path / "out", model_type="qwen3_vl_moe", start_from=start, **settings)
    begun, made = (load_checkpoint(path).state_dict() for path in (start, tmp_path / "out"))
    name = "model.visual.patch_embed.proj.weight"
    # One step: far from random weights.
    assert 0 < (made[name] - begun[name]).abs().max() < 0.01
    with pytest.raises(InputError, match="--model-type qwen3_vl"):
        build(tmp_path / "other", model_type="qwen2_5_vl", start_from=start, **settings)


def test_the_command_runs_from_any_folder_and_keeps_what_is_there(tmp_path):
    script = make_checkpoint.__file__
    (tmp_path / "notes.txt").write_text("mine")
    done = subprocess.run(
        [sys.executable, script, "."], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "exists already; remove it or choose another directory" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("numbers", "failing"),
    [
        ((0.98, 0.7, 0.25), []),
        ((0.90, 0.7, 0.25), ["truth_without_reasoning"]),
        ((0.98, 0.9, 0.08), ["implied_letter", "true_letter"]),
        ((0.98, 0.4, 0.55), ["implied_letter", "true_letter"]),
    ],
)
def test_the_gate_names_what_is_off(numbers, failing):
    gate = Gate(*numbers)
    assert [failure.split()[0] for failure in gate.failures()] == failing
    assert gate.passes() == (not failing)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_committed_checkpoint_passes_the_gate_as_recorded(model_type):
    checkpoint = CHECKPOINTS[model_type]
    gate = measure_gate(load_checkpoint(checkpoint))
    assert gate.failures() == []
    recorded = json.loads((checkpoint / GATE_FILE).read_text())
    assert recorded["passed"]
    assert vars(gate) == pytest.approx(recorded["gate"], abs=1e-3)


def test_the_scripts_page_lists_the_gate_of_every_checkpoint():
    text = Path(make_checkpoint.__file__).with_name("README.md").read_text()
    for model_type, checkpoint in CHECKPOINTS.items():
        made = json.loads((checkpoint / GATE_FILE).read_text())
        cells = [f"`{model_type}`", str(made["seed"]), *(f"{v:.4f}" for v in made["gate"].values())]
        assert f"| {' | '.join(cells)} |" in text


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_committed_checkpoint_is_a_whole_model_of_its_family(model_type):
    checkpoint = CHECKPOINTS[model_type]
    model, info = AutoModelForImageTextToText.from_pretrained(checkpoint, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.dtype == torch.float32
    family = read_family(checkpoint)
    assert family.model_type == model_type
    made = FAMILIES[model_type].read(checkpoint, tiny_config(model_type).to_dict(), key="made")
    assert family.signature() == made.signature()
    assert sum(file.stat().st_size for file in checkpoint.iterdir()) < 3.1e6


@pytest.mark.parametrize("umask", [0o077, 0o002])
def test_files_have_the_mode_that_the_umask_gives(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_world(tmp_path / "world", train=1, validation=1)
        (tmp_path / "model").mkdir()
        save_checkpoint(build_model(0), tmp_path / "model")
    finally:
        os.umask(before)
    for path in tmp_path.rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask, path
