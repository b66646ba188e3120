"""The rows of a micro-batch become a model's inputs: when, where and how often patches are cut."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from made_groups import make_groups, make_prompts
from small_runs import one_step, small_recipe, small_trainer, updated

from nemo_care.groups.packed import packed_groups
from nemo_care.groups.separate import separate_sequences
from nemo_care.models.frames import patches_on_device


@pytest.fixture
def groups(checkpoint, world, tmp_path):
    return make_groups(make_prompts(checkpoint, world, tmp_path), checkpoint)


@pytest.fixture(scope="module")
def trainer(checkpoint, world, ranks, tmp_path_factory):
    return small_trainer(small_recipe(checkpoint, world), ranks, tmp_path_factory.mktemp("run"))


def test_patches_are_cut_on_the_first_stage_only_and_once_per_prompt(groups, trainer):
    model = trainer.policy.model
    prompts = [group.prompt for group in groups]
    cut = [model.patching.patches(frames) for prompt in prompts for frames in prompt.frames]
    rows = packed_groups(groups, pad_id=0, multiple=16).rows
    assert torch.equal(rows.inputs(model).pixel_values, torch.cat(cut))
    mixed = groups[2]
    separate = separate_sequences([mixed], pad_id=0, multiple=1).rows
    own = torch.cat([model.patching.patches(frames) for frames in mixed.prompt.frames])
    assert torch.equal(separate.inputs(model).pixel_values, own.repeat(mixed.size, 1))
    later = rows.inputs(SimpleNamespace(pre_process=False))
    assert later.pixel_values is later.grid_thw is later.vision_places is None


def test_a_prompt_whose_frames_were_not_decoded_is_refused(groups, trainer):
    rows = packed_groups(groups[:1], pad_id=0, multiple=16).rows
    groups[0].prompt.frames = ()
    with pytest.raises(ValueError, match="frames of prompt 0 were not decoded"):
        rows.inputs(trainer.policy.model)


def test_patches_of_one_micro_batch_at_a_time_are_in_memory(groups, trainer, monkeypatch):
    made = []

    def watched(prompts, patching):
        gc.collect()
        assert all(reference() is None for reference in made)
        patches = patches_on_device(prompts, patching)
        made.extend(weakref.ref(part) for part in patches)
        return patches

    monkeypatch.setattr("nemo_care.groups.batch.patches_on_device", watched)
    trainer.reference.score_answers(groups)
    for group in groups:
        group.advantage = torch.ones(group.size)
    count = sum(group.prompt.grid_thw is not None for group in groups)
    assert len(made) == count > 1
    updated(trainer.policy, groups)
    assert len(made) == 2 * count


def test_frames_in_memory_do_not_depend_on_the_group_size(checkpoint, world, ranks, tmp_path):
    found = []
    for size in (2, 6):
        recipe = small_recipe(checkpoint, world)
        recipe.algorithm.group_size = size
        trainer = small_trainer(recipe, ranks, tmp_path / str(size))
        found.append(trainer.frames_gib(one_step(trainer)) * 2**30)
    assert found == [4 * 8 * 28 * 28 * 3] * 2
