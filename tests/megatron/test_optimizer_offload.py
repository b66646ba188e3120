"""The optimizer's state in CPU memory: where it is when, and that no result changes.

Here both places are the same memory; the state moves from one piece of it to another and back.
"""

import pytest
import torch
from bad_numbers import inject
from records import lines, without_timing
from small_runs import small_recipe, small_trainer, weights

from nemo_care.megatron import host_memory
from nemo_care.megatron.optimizer import optimizer_parts
from nemo_care.ranks.process_groups import Layout


@pytest.fixture
def recipe(checkpoint, world):
    """In bf16, where the state has master weights too."""
    recipe = small_recipe(checkpoint, world)
    recipe.model.precision.dtype = "bf16"
    recipe.rollout.max_logprob_difference = 1.0
    recipe.trainer.max_steps = 2
    return recipe


@pytest.fixture
def given_out(monkeypatch) -> list[torch.Tensor]:
    """The CPU memory that is asked for, in order."""
    made = []
    real = host_memory.host_empty

    def host_empty(shape, dtype):
        made.append(real(shape, dtype))
        return made[-1]

    monkeypatch.setattr(host_memory, "host_empty", host_empty)
    return made


def state_of(trainer) -> dict[str, torch.Tensor]:
    """Master weights and AdamW's averages and counts, by name and number."""
    (part,) = trainer.policy.optimizer.chained_optimizers
    found = {}
    for index, parameter in enumerate(p for g in part.optimizer.param_groups for p in g["params"]):
        found[f"master {index}"] = parameter
        for name, tensor in part.optimizer.state[parameter].items():
            found[f"{name} {index}"] = tensor
    return found


def kinds_in(memory: list[torch.Tensor], trainer) -> set[str]:
    """Kinds of state of which every tensor lies in this memory; none may lie there in part."""
    places = {tensor.untyped_storage().data_ptr() for tensor in memory}
    inside: dict[str, set[bool]] = {}
    for name, tensor in state_of(trainer).items():
        lies_there = tensor.untyped_storage().data_ptr() in places
        inside.setdefault(name.split()[0], set()).add(lies_there)
    assert all(len(found) == 1 for found in inside.values()), inside
    return {kind for kind, found in inside.items() if found == {True}}


def movable(recipe) -> set[str]:
    """In float32 the model's weights are the master weights."""
    averages = {"exp_avg", "exp_avg_sq"}
    return averages | {"master"} if recipe.model.precision.dtype == "bf16" else averages


def assert_equal_states(ours, wanted) -> None:
    assert ours.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("dtype", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
def test_run_and_its_resumption_equal_those_with_the_state_on_the_gpu(
    recipe, ranks, tmp_path, dtype
):
    recipe.model.precision.dtype = dtype
    recipe.algorithm.updates_per_rollout = 2
    # The run saves on its way, too.
    recipe.checkpoint.save_interval = 1
    trainers = []
    for offload in (False, True):
        recipe.optimizer.offload = offload
        folder = tmp_path / str(offload)
        trainer = small_trainer(recipe, ranks, folder)
        trainer.fit()
        trainers.append(trainer)
    recipe.trainer.max_steps = 1
    small_trainer(recipe, ranks, tmp_path / "parts").fit()
    recipe.trainer.max_steps = 2
    resumed = small_trainer(recipe, ranks, tmp_path / "parts")
    resumed.fit()
    plain, *others = (
        without_timing(lines(tmp_path / name / "metrics.jsonl"))
        for name in ("False", "True", "parts")
    )
    assert others == [plain, plain]
    for trainer in (trainers[1], resumed):
        assert_equal_states(weights(trainer), weights(trainers[0]))
        assert_equal_states(state_of(trainer), state_of(trainers[0]))


def test_state_is_in_cpu_memory_except_in_the_optimizers_step(recipe, ranks, tmp_path, given_out):
    recipe.optimizer.offload = True
    recipe.checkpoint.save_interval = 1
    recipe.data.validation.annotations = {"L1": "validation_L1.jsonl"}
    trainer = small_trainer(recipe, ranks, tmp_path)
    seen: dict[str, list[set[str]]] = {}

    def watch(owner, name: str) -> None:
        function = getattr(owner, name)

        def watched(*arguments, **keywords):
            seen.setdefault(name, []).append(kinds_in(given_out, trainer))
            return function(*arguments, **keywords)

        setattr(owner, name, watched)

    watch(trainer.generator, "generate")
    watch(trainer.reference.scorer, "score")
    watch(trainer.policy, "forward_backward")
    (part,) = optimizer_parts(trainer.policy.optimizer)
    watch(part, "sharded_state_dict")
    watch(trainer.policy.optimizer, "step_with_ready_grads")
    watch(trainer, "run_validation")
    trainer.fit()
    # The first step makes the averages.
    masters = movable(recipe) & {"master"}
    assert seen.pop("step_with_ready_grads") == [set(), set()]
    for name in ("score", "forward_backward"):
        assert seen.pop(name) == [masters, movable(recipe)], name
    assert seen.pop("sharded_state_dict") == [movable(recipe)] * 2
    assert seen["generate"][-1] == seen["run_validation"][-1] == movable(recipe)
    # The model's own weights are no part of it.
    places = {tensor.untyped_storage().data_ptr() for tensor in given_out}
    for parameter in trainer.policy.model.parameters():
        assert parameter.untyped_storage().data_ptr() not in places


def test_cpu_memory_is_taken_once_and_used_again(recipe, ranks, tmp_path, given_out):
    recipe.optimizer.offload = True
    recipe.trainer.max_steps = 3
    trainer = small_trainer(recipe, ranks, tmp_path)
    trainer.fit()
    # One piece for the masters, one for what the first step made.
    assert len(given_out) == len({"master"} & movable(recipe)) + 1
    sizes = [
        t.numel() for name, t in state_of(trainer).items() if name.split()[0] in movable(recipe)
    ]
    assert sum(tensor.numel() for tensor in given_out) == sum(sizes)
    given_out.clear()
    resumed = small_trainer(recipe, ranks, tmp_path)
    resumed.resume()
    assert kinds_in(given_out, resumed) == movable(recipe)
    assert sum(tensor.numel() for tensor in given_out) == sum(sizes)


@pytest.mark.parametrize("kind", [pytest.param("rollout", marks=pytest.mark.slow), "gradient"])
def test_a_step_that_is_left_out_moves_nothing(recipe, ranks, tmp_path, kind, monkeypatch):
    recipe.optimizer.offload = True
    trainer = small_trainer(recipe, ranks, tmp_path)
    trainer.fit()
    before = {name: tensor.clone() for name, tensor in state_of(trainer).items()}
    recipe.trainer.max_steps = 3
    inject(trainer, kind)
    monkeypatch.setattr(trainer.policy.optimizer_state, "_fetch", lambda: pytest.fail("moved"))
    trainer.fit()
    assert lines(tmp_path / "metrics.jsonl")[-1]["train/bad_step"] == 1
    assert_equal_states(state_of(trainer), before)


def test_a_step_that_fails_leaves_the_state_in_cpu_memory(recipe, ranks, tmp_path, given_out):
    recipe.optimizer.offload = True
    trainer = small_trainer(recipe, ranks, tmp_path)
    trainer.policy.optimizer_state.initialise()
    found = []

    def fail():
        found.append(kinds_in(given_out, trainer))
        raise RuntimeError("out of memory")

    trainer.policy.optimizer.step = fail
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.policy.step_optimizer()
    assert found == [set()]
    assert kinds_in(given_out, trainer) == movable(recipe)


def saved_and_resumed(ranks, job) -> dict:
    """This rank's states of runs with the state in CPU memory and without, and of their heirs."""
    folder, recipe = job
    states = {}

    def keep(name: str, trainer) -> None:
        states[name] = {key: tensor.detach().clone() for key, tensor in state_of(trainer).items()}

    for offload in (False, True):
        recipe.optimizer.offload = offload
        recipe.trainer.max_steps = 1
        trainer = small_trainer(recipe, ranks, folder / str(offload))
        trainer.fit()
        keep(f"run {offload}", trainer)
        # What this run saved, another one takes with the state in the other place.
        recipe.optimizer.offload = not offload
        recipe.trainer.max_steps = 2
        resumed = small_trainer(recipe, ranks, folder / str(offload))
        resumed.resume()
        keep(f"loaded {offload}", resumed)
        resumed.fit()
        keep(f"resumed {offload}", resumed)
    return states


def test_two_replicas_train_load_and_resume_alike(on_ranks, recipe, tmp_path):
    for found in on_ranks(Layout(), saved_and_resumed, (tmp_path, recipe), replicas=2):
        assert any(name.startswith("exp_avg_sq") for name in found["run True"])
        for name in ("run True", "loaded False", "loaded True"):
            assert_equal_states(found[name], found["run False"])
        assert_equal_states(found["resumed True"], found["resumed False"])
        assert not torch.equal(found["resumed True"]["master 0"], found["run True"]["master 0"])
