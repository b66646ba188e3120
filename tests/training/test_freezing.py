"""Runs with frozen parts: whole checkpoints, one tower run per prompt, and what is refused."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from small_runs import one_step, small_recipe, small_trainer, weights, whole_and_resumed

from nemo_care.errors import InputError
from nemo_care.models.ema import WeightAverage
from nemo_care.recipe.schema import check_recipe
from nemo_care.training.build import build_model
from nemo_care.training.model_source import ModelSource


@pytest.fixture
def recipe(checkpoint, world):
    return small_recipe(checkpoint, world)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (["tower"], "model.freeze has tower: choose among vision, merger, language"),
        (
            ["merger", "vision", "language"],
            "model.freeze=[merger, vision, language] leaves nothing to train: omit one of them",
        ),
    ],
)
def test_parts_that_can_t_be_frozen_are_refused(recipe, parts, message):
    recipe.model.freeze = parts
    with pytest.raises(InputError) as raised:
        check_recipe(recipe)
    assert str(raised.value) == message


def test_a_resumed_run_equals_the_uninterrupted_one_and_is_a_whole_model(
    recipe, ranks, tmp_path, checkpoint
):
    """With a reference in CPU memory, which shares the frozen parts all the same."""
    recipe.model.freeze = ["vision", "merger"]
    recipe.model.precision.dtype = "bf16"
    recipe.rollout.max_logprob_difference = 1.0
    recipe.algorithm.reference.offload = True
    recipe.checkpoint.export = True
    # Far enough for every parameter to change in bf16.
    recipe.optimizer.lr = 5e-3
    whole, resumed = whole_and_resumed(recipe, ranks, tmp_path)
    wanted = weights(whole)

    start, end = load_file(checkpoint / "model.safetensors"), {}
    for file in (tmp_path / "parts" / "export").glob("*.safetensors"):
        end |= load_file(file)
    assert start.keys() == end.keys()
    for name, tensor in start.items():
        assert torch.equal(end[name], tensor.bfloat16()) == name.startswith("visual."), name

    # The average of a checkpoint, read by an evaluation, has the frozen parts too.
    recipe.model.freeze = []
    model = build_model(recipe, ranks)
    source = ModelSource.find("evaluation.reference", str(tmp_path / "parts"), is_reference=True)
    source.load(model)
    average = resumed.reference.average
    for name, parameter in model.named_parameters():
        expected = average.state[name].bfloat16() if name in average.state else wanted[name]
        assert torch.equal(parameter, expected), name


def test_the_frozen_tower_s_output_is_that_of_this_step(recipe, ranks, tmp_path):
    """Two steps see different prompts; each has the metrics of a run that computes every pass."""
    recipe.model.freeze = ["vision"]
    kept = small_trainer(recipe, ranks, tmp_path / "kept")
    again = small_trainer(recipe, ranks, tmp_path / "again")
    again.policy.model.keeps_vision = again.reference.average.model.keeps_vision = False
    for number in (1, 2):
        steps = [one_step(trainer, number) for trainer in (kept, again)]
        groups = [step.groups for step in steps]
        assert all(group.prompt.vision_states is not None for group in groups[0])
        assert all(group.prompt.vision_states is None for group in groups[1])
        known = ({k: v for k, v in step.metrics.items() if v is not None} for step in steps)
        ours, wanted = known
        assert ours == pytest.approx(wanted, abs=1e-6, rel=1e-4)


def test_prompts_without_the_prefix_shared_see_the_tower_once_too(recipe, ranks, tmp_path):
    recipe.algorithm.shared_prompt = False
    recipe.model.freeze = ["vision"]
    trainer = small_trainer(recipe, ranks, tmp_path)
    seen = []
    for model in (trainer.policy.model, trainer.reference.average.model):
        model.visual.register_forward_pre_hook(lambda _, arguments: seen.append(len(arguments[0])))
    step = one_step(trainer)
    assert sum(seen) == sum(4 * int(group.prompt.is_vision.sum()) for group in step.groups)


@pytest.mark.usefixtures("ranks")
def test_an_average_leaves_frozen_parameters_alone():
    policy = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    twin = copy.deepcopy(policy)
    twin[0].weight.data = policy[0].weight.data
    average = WeightAverage(twin, 0.5, offload=True, frozen={"0.weight"})
    assert "0.weight" not in average.state
    with torch.no_grad():
        policy[1].weight += 2
    average.update(policy)
    assert twin[0].weight.data_ptr() == policy[0].weight.data_ptr()
    with average.in_place():
        torch.testing.assert_close(twin[1].weight, policy[1].weight - 1)
        assert torch.equal(twin[0].weight, policy[0].weight)
    distance, size = average.squared_distance(policy).sum(0).tolist()
    assert distance == pytest.approx(16.0)
    assert size == pytest.approx(sum(float(p.double().square().sum()) for p in policy.parameters()))
