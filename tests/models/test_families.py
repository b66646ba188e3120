"""The seam of model families: one more needs a class and an entry in the table, no more."""

import json

import pytest
import torch
from made_family import TIME_WORDS, VIDEO_PAD, ToyFamily, write_toy
from small_runs import one_step, small_recipe, small_trainer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from nemo_care.checks.recipe import check_training_inputs
from nemo_care.data.media import Media
from nemo_care.data.patches import PixelBounds
from nemo_care.errors import InputError
from nemo_care.groups.batch import Rows
from nemo_care.miniature.vocabulary import encode
from nemo_care.models.families import FAMILIES, read_family
from nemo_care.models.weights import iterate_hf_weights
from nemo_care.planning.shapes import lengths_of
from nemo_care.planning.work import group_flops, layer_flops
from nemo_care.ranks.process_groups import Layout
from tiny_model import CHECKPOINTS


@pytest.fixture
def toy(tmp_path, checkpoint, monkeypatch):
    """A folder with a checkpoint of a family that is registered here, and its weights."""
    monkeypatch.setitem(FAMILIES, "toy", ToyFamily)
    return tmp_path / "toy", write_toy(tmp_path / "toy", checkpoint)


def test_an_unknown_family_is_refused_with_those_that_there_are(tmp_path):
    for said in ('"toy"', "null", "[1]", "7"):
        (tmp_path / "config.json").write_text(f'{{"model_type": {said}}}')
        with pytest.raises(
            InputError, match=r"model_type .* supported: qwen2_5_vl, qwen3_vl, qwen3_vl_moe$"
        ):
            read_family(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"layers": 2}))
    with pytest.raises(InputError, match=r"^evaluation\.reference=.*: model_type .*supported: "):
        read_family(tmp_path, key="evaluation.reference")


def test_a_family_is_added_without_touching_the_package(toy, checkpoint, world, ranks, tmp_path):
    """A whole step of a model whose prompts, patches, tower and names on disk are its own."""
    folder, weights = toy
    recipe = small_recipe(folder, world)
    check_training_inputs(recipe)
    trainer = small_trainer(recipe, ranks, tmp_path / "run")
    model = trainer.policy.model
    stored = dict(iterate_hf_weights(model))
    assert stored.keys() == weights.keys()
    assert all(torch.equal(stored[name], weights[name]) for name in weights)

    def rewards(groups):
        for group in groups:
            for completion in group.completions:
                completion.answer_span = (0, 1)
            group.base_reward = (torch.arange(group.size) % 2).float()
            group.rewards = {"accuracy": group.base_reward}

    trainer.rewards = rewards
    before = {name: tensor.clone() for name, tensor in stored.items()}
    step = one_step(trainer)
    assert not step.skipped
    for group in step.groups:
        prompt = group.prompt
        grid = [tuple(row) for row in prompt.grid_thw.tolist()]
        assert grid == [(4, 1, 1)]
        (frames,) = prompt.frames
        assert frames.shape == (8, 4, 4, 3)
        words = encode(TIME_WORDS)
        ids = prompt.token_ids.tolist()
        start = ids.index(words[0])
        assert ids[start : start + 16] == [*words, VIDEO_PAD] * 4
        assert prompt.is_vision.sum() == 4
    # What the policy sampled is what it scores, and every weight learns, the tower's among them.
    assert step.metrics["rollout/logprob_difference_max"] < 1e-4
    assert all(not torch.equal(t, before[name]) for name, t in iterate_hf_weights(model))


def test_vision_features_take_the_places_of_the_vision_tokens(toy, world, ranks, tmp_path):
    folder, weights = toy
    trainer = small_trainer(small_recipe(folder, world), ranks, tmp_path / "run")
    prompts, _ = trainer.prompts.next_step()
    prompt, model = prompts[0], trainer.policy.model
    row = prompt.token_ids[None], prompt.position_ids[:, None], prompt.is_vision[None]
    embeddings, deep = model._embed(Rows([prompt], *row).inputs(model))
    assert deep is None
    embedded = embeddings[:, 0]
    seen = model.patching.patches(*prompt.frames) @ weights["eye.weight"].T
    torch.testing.assert_close(embedded[prompt.is_vision], seen)
    words = weights["words"][prompt.token_ids]
    torch.testing.assert_close(embedded[~prompt.is_vision], words[~prompt.is_vision])


def test_the_plan_counts_with_the_family_s_sizes(toy, world):
    folder, _ = toy
    family, recipe = read_family(folder), small_recipe(folder, world)
    recipe.data.max_prompt_tokens = 200
    lengths = lengths_of(recipe, family, 100, 10)
    assert lengths.grids[0] == (4, 1, 1)
    assert lengths.vision == 50
    # Queries and keys are wider than hidden / heads.
    per_token = 2 * 32 * (64 + 2 * 32) + 2 * 64 * 32 + 6 * 32 * 64
    assert layer_flops(family.architecture, 3) == 2 * 3 * per_token
    shared = group_flops(family, lengths, 4, shared=True, rows=0)
    separate = group_flops(family, lengths, 4, shared=False, rows=0)
    assert separate - shared > 3 * family.vision_flops(lengths.grids) == 3 * 2 * 50 * 48 * 32


def test_a_layout_is_held_against_the_family_s_sizes(toy, world):
    recipe = small_recipe(toy[0], world)
    recipe.trainer.devices = recipe.model.tensor_model_parallel_size = 2
    with pytest.raises(InputError, match="2 attention heads and 1 key-value heads: use 1"):
        check_training_inputs(recipe)
    recipe.trainer.devices = 3
    recipe.model.tensor_model_parallel_size, recipe.model.pipeline_model_parallel_size = 1, 3
    assert Layout.of(recipe).pipeline == 3
    with pytest.raises(InputError, match="2 layers: use 1, 2"):
        check_training_inputs(recipe)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_hugging_face_s_processor_cuts_as_we_do_with_the_files_that_vllm_gets(name):
    """vLLM reads these files with transformers' classes: frames are cut alike, and not resized."""
    family = read_family(CHECKPOINTS[name])
    files = family.processor_files(56 * 84)
    generator = torch.Generator().manual_seed(0)
    frame = torch.randint(0, 256, (56, 84, 3), generator=generator, dtype=torch.uint8)
    patching, bounds = family.prompt.patching, PixelBounds(784, 56 * 84)
    ours = patching.patches(patching.resize(frame, bounds)[None])
    grid = patching.grid(1, 56, 84, bounds)
    for content in files.values():
        theirs = Qwen2VLImageProcessorPil(**content)(
            frame.numpy(), return_tensors="pt", input_data_format="channels_last"
        )
        assert theirs["image_grid_thw"].tolist() == [list(grid)]
        torch.testing.assert_close(theirs["pixel_values"], ours, atol=1e-5, rtol=0)


def test_a_prompt_s_placeholders_come_back_from_its_tokens(checkpoint):
    """What vLLM is sent, for a prompt with a video, an image and text between and after them."""
    form = read_family(checkpoint).prompt
    media = Media([(4, 2, 2), (1, 4, 4)], [1.0, 0.0])
    chat = [1, 7, 4, 6, 9, 10]
    ids = form.expanded(chat, media, encode=None)
    assert ids == [1, 7, 7, 7, 7, 4, 6, 6, 6, 6, 9, 10]
    assert form.collapsed(ids, media.grids) == chat
