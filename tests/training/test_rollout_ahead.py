"""Asynchronous rollouts: the next step's prompts are sampled while a step is trained."""

import shutil
import signal
from itertools import pairwise
from pathlib import Path

import pytest
from bad_numbers import inject_at
from made_background import asynchronous, stand_in_for_vllm
from records import lines
from small_runs import small_recipe, small_trainer

from nemo_care.data.stream import TooManySkipped
from nemo_care.errors import InputError, RunFailed, RunStopped
from nemo_care.ranks.process_groups import Layout, Ranks
from nemo_care.recipe.schema import check_recipe, check_training


def metrics_of(run: Path, key: str) -> list:
    return [line[key] for line in lines(run / "metrics.jsonl")]


def completions(run: Path, step: int) -> list[tuple]:
    rows = lines(run / "rollouts" / f"step_{step:06d}.jsonl")
    return [(row["prompt_index"], row["completion_index"], row["completion"]) for row in rows]


def places(run: Path, step: int) -> list[int]:
    return sorted({place for place, _, _ in completions(run, step)})


@pytest.fixture
def recipe(checkpoint, world, ranks, monkeypatch):
    stand_in_for_vllm(monkeypatch, ranks)
    made = asynchronous(small_recipe(checkpoint, world))
    made.trainer.max_steps = 3
    made.data.train.shuffle = False
    # Far enough for other completions, and for a difference that would be told.
    made.optimizer.lr = 3e-3
    made.optimizer.clip_grad = 1.0
    return made


def watched(trainer) -> list[tuple]:
    """The generator's events, with rewards, updates and validations between them."""
    events = trainer.generator.events
    rewards, update, validate = trainer.rewards, trainer.policy.update, trainer.validator.run

    def reward(groups):
        events.append(("reward",))
        return rewards(groups)

    def updated(step, **keywords):
        events.append(("update", [group.prompt.index for group in step.trained]))
        update(step, **keywords)

    def validated(**keywords):
        events.append(("validation",))
        return validate(**keywords)

    trainer.rewards, trainer.policy.update, trainer.validator.run = reward, updated, validated
    return events


FIRST, SECOND, THIRD = [0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]


def test_engines_begin_the_next_step_before_a_step_is_trained(recipe, ranks, tmp_path):
    trainer = small_trainer(recipe, ranks, tmp_path, saves=False)
    events = watched(trainer)
    trainer.fit()
    assert events == [
        ("submit", FIRST, 0),
        ("collect", FIRST, 0),
        ("submit", SECOND, 0),
        ("reward",),
        ("update", FIRST),
        ("collect", SECOND, 0),
        ("submit", THIRD, 1),
        ("reward",),
        ("update", SECOND),
        ("collect", THIRD, 1),
        # Nothing is sampled beyond the last step.
        ("reward",),
        ("update", THIRD),
    ]
    assert trainer.prompts.position == 12
    assert metrics_of(tmp_path, "rollout/staleness") == [0, 1, 1]


def test_staleness_counts_optimizer_steps(recipe, ranks, tmp_path):
    recipe.algorithm.updates_per_rollout = 2
    recipe.trainer.max_steps = 2
    small_trainer(recipe, ranks, tmp_path, saves=False).fit()
    assert metrics_of(tmp_path, "rollout/staleness") == [0, 2]


def test_prompts_are_those_of_a_run_without_the_switch(recipe, ranks, tmp_path, capsys):
    recipe.data.train.shuffle = True
    recipe.trainer.max_steps = 2
    small_trainer(recipe, ranks, tmp_path / "ahead", saves=False).fit()
    untouched = small_trainer(recipe, ranks, tmp_path / "untouched")
    recipe.rollout.asynchronous = False
    capsys.readouterr()
    in_turns = small_trainer(recipe, ranks, tmp_path / "in_turns", saves=False)
    in_turns.fit()
    # Switched off, it leaves no trace.
    assert [event[0] for event in in_turns.generator.events] == ["submit", "collect"] * 2
    assert "rollout/staleness" not in lines(tmp_path / "in_turns" / "metrics.jsonl")[0]
    assert "asynchronous" not in capsys.readouterr().out
    for step in (1, 2):
        assert places(tmp_path / "ahead", step) == places(tmp_path / "in_turns", step)
    first, second = (completions(tmp_path / "ahead", step) for step in (1, 2))
    assert first == completions(tmp_path / "in_turns", 1)
    assert second != completions(tmp_path / "in_turns", 2)
    # The second step's completions are those of the weights from before the first update.
    groups = [untouched.rollouts.generate(untouched.prompts.next_step()[0]) for _ in range(2)][1]
    assert sorted(second) == sorted(
        (group.prompt.index, number, completion.text)
        for group in groups
        for number, completion in enumerate(group.completions)
    )


# ------------------------------------------------------------------ older weights


def test_older_weights_may_differ_by_more(recipe, ranks, tmp_path, capsys):
    recipe.rollout.max_logprob_difference = 0.03
    recipe.trainer.max_steps = 2
    small_trainer(recipe, ranks, tmp_path, saves=False).fit()
    first, second = metrics_of(tmp_path, "rollout/logprob_difference")
    assert first < 1e-4
    # One optimizer step older: up to twice the bound.
    assert 0.03 < second < 0.06
    printed = " ".join(capsys.readouterr().out.split())
    assert "log-probabilities of rollout and training" not in printed
    assert printed.count("nothing corrects for it; rollout.importance_sampling.enabled=true") == 1


def test_a_sampler_that_goes_wrong_later_is_reported(recipe, ranks, tmp_path, capsys):
    recipe.rollout.max_logprob_difference = 1e-3
    recipe.rollout.max_staleness = 2
    small_trainer(recipe, ranks, tmp_path, saves=False).fit()
    records = lines(tmp_path / "metrics.jsonl")
    for record, staleness in zip(records, (0, 1, 2), strict=True):
        by_staleness = {key: record[key] for key in record if "_stale_" in key}
        # All groups of a step without dynamic sampling have one staleness.
        whole = pytest.approx(record["rollout/logprob_difference"], rel=1e-5)
        assert by_staleness == {f"rollout/logprob_difference_stale_{staleness}": whole}
    printed = " ".join(capsys.readouterr().out.split())
    wanted = "more than {}, {} times rollout.max_logprob_difference=0.001, for weights that are {}"
    assert printed.count(wanted.format("0.002", 2, 1)) == 1
    assert printed.count(wanted.format("0.003", 3, 2)) == 1


# ------------------------------------------------------------------ further ahead


FOURTH, FIFTH = [12, 13, 14, 15], [16, 17, 18, 19]


@pytest.fixture
def two_ahead(recipe):
    recipe.rollout.max_staleness = 2
    recipe.trainer.max_steps = 5
    return recipe


def test_two_steps_are_sampled_together_and_trained_in_order(two_ahead, ranks, tmp_path):
    trainer = small_trainer(two_ahead, ranks, tmp_path, saves=False)
    events = watched(trainer)
    trainer.fit()
    assert [event for event in events if event != ("reward",)] == [
        ("submit", FIRST, 0),
        ("collect", FIRST, 0),
        ("submit", SECOND, 0),
        ("submit", THIRD, 0),
        ("update", FIRST),
        ("collect", SECOND, 0),
        ("update", SECOND),
        ("collect", THIRD, 0),
        # Nothing is in flight, so the engines get the weights of two updates.
        ("submit", FOURTH, 2),
        ("submit", FIFTH, 2),
        ("update", THIRD),
        ("collect", FOURTH, 2),
        ("update", FOURTH),
        ("collect", FIFTH, 2),
        # Nothing is sampled beyond the last step.
        ("update", FIFTH),
    ]
    assert metrics_of(tmp_path, "rollout/staleness") == [0, 1, 2, 1, 2]


def test_no_more_is_sampled_ahead_than_there_are_steps(two_ahead, ranks, tmp_path):
    two_ahead.trainer.max_steps = 2
    trainer = small_trainer(two_ahead, ranks, tmp_path, saves=False)
    trainer.fit()
    assert [e[1] for e in trainer.generator.events if e[0] == "submit"] == [FIRST, SECOND]
    assert trainer.prompts.position == 8


def test_seeds_do_not_depend_on_when_a_step_is_sampled(two_ahead, ranks, tmp_path):
    """With weights that stay as they are, completions are those of a run in turns."""
    two_ahead.data.train.shuffle = True
    two_ahead.optimizer.lr = 1e-12
    two_ahead.trainer.max_steps = 4
    ahead, in_turns = tmp_path / "ahead", tmp_path / "in_turns"
    small_trainer(two_ahead, ranks, ahead).fit()
    # Killed after step 2, with step 3 in flight.
    shutil.rmtree(ahead / "checkpoints" / "step_000004")
    resumed = small_trainer(two_ahead, ranks, ahead)
    resumed.fit()
    assert resumed.rollouts.position == resumed.prompts.position == 16
    assert metrics_of(ahead, "rollout/staleness") == [0, 1, 0, 1]
    two_ahead.rollout.asynchronous = False
    small_trainer(two_ahead, ranks, in_turns).fit()
    for step in range(1, 5):
        assert completions(ahead, step) == completions(in_turns, step)


def test_importance_weights_see_what_is_older(recipe, ranks, tmp_path, capsys):
    recipe.rollout.importance_sampling.enabled = True
    recipe.trainer.max_steps = 2
    small_trainer(recipe, ranks, tmp_path, saves=False).fit()
    largest = metrics_of(tmp_path, "rollout/importance_max")
    assert largest[0] == pytest.approx(1, abs=1e-3)
    assert min(largest[1:]) > 1.01
    assert "nothing corrects" not in capsys.readouterr().out


def test_after_a_step_that_was_left_out_nothing_is_older(recipe, ranks, tmp_path):
    trainer = small_trainer(recipe, ranks, tmp_path, saves=False)
    inject_at(trainer, {1: "loss"})
    trainer.fit()
    assert metrics_of(tmp_path, "train/bad_step") == [1, 0, 0]
    assert metrics_of(tmp_path, "rollout/staleness") == [0, 0, 1]


# ------------------------------------------------------------------ validation


def test_validation_asks_the_newest_weights(two_ahead, ranks, tmp_path):
    two_ahead.trainer.max_steps = 3
    two_ahead.data.validation.annotations = {"L1": "validation_L1.jsonl"}
    two_ahead.trainer.validation_interval = 1
    two_ahead.evaluation.samples_per_batch = 8
    trainer = small_trainer(two_ahead, ranks, tmp_path, saves=False)
    events = watched(trainer)
    trainer.fit()
    # The stand-in takes no new weights while something is in flight, as engines do.
    asked = [event[2] for before, event in pairwise(events) if before == ("validation",)]
    assert asked == [0, 1, 2, 3]
    # All that was in flight is collected before, and trained on in its turn.
    at = events.index(("update", FIRST))
    assert events[at + 1 : at + 4] == [
        ("collect", SECOND, 0),
        ("collect", THIRD, 0),
        ("validation",),
    ]
    assert [event[1] for event in events if event[0] == "update"] == [FIRST, SECOND, THIRD]
    assert metrics_of(tmp_path, "rollout/staleness") == [0, 1, 2]
    assert [record["step"] for record in lines(tmp_path / "validation.jsonl")] == [0, 1, 2, 3]


# ------------------------------------------------------------------ ends


class _StopAfter:
    """Asks to stop after so many steps."""

    def __init__(self, steps):
        self.steps = steps

    def agreed(self):
        self.steps -= 1
        return signal.SIGTERM if self.steps == 0 else None


def with_broken_videos(recipe, world, root, *broken):
    shutil.copytree(world, root)
    for place in broken:
        (root / lines(root / "train.jsonl")[place]["videos"][0]).write_bytes(b"no video")
    recipe.data.train.root = str(root)


def test_a_stopped_run_samples_anew_what_was_in_flight(recipe, ranks, tmp_path, world):
    with_broken_videos(recipe, world, tmp_path / "damaged", 5)
    run = tmp_path / "run"
    trainer = small_trainer(recipe, ranks, run)
    trainer.stop = _StopAfter(1)
    with pytest.raises(RunStopped, match="after step 1"):
        trainer.fit()
    # Drawn, but not trained: a broken video among it is told with its step.
    assert trainer.prompts.position == 9
    assert trainer.rollouts.position == 4
    assert lines(run / "skipped.jsonl") == []
    resumed = small_trainer(recipe, ranks, run)
    events = watched(resumed)
    summary = resumed.fit()
    # With the checkpoint's weights.
    assert events[0] == ("submit", [4, 6, 7, 8], 1)
    assert events[3:4] == [("reward",)]
    assert metrics_of(run, "rollout/staleness") == [0, 0, 1]
    assert [places(run, step) for step in (1, 2, 3)] == [FIRST, [4, 6, 7, 8], [9, 10, 11, 12]]
    assert [(item["step"], item["index"]) for item in lines(run / "skipped.jsonl")] == [(2, 5)]
    assert summary["skipped"] == 1


def test_too_many_skipped_ends_the_run_when_their_step_comes(recipe, ranks, tmp_path, world):
    with_broken_videos(recipe, world, tmp_path / "damaged", 5)
    recipe.data.max_skipped_fraction = 0.0
    recipe.checkpoint.save_interval = 1
    run = tmp_path / "run"
    trainer = small_trainer(recipe, ranks, run)
    with pytest.raises(TooManySkipped, match="1 of 48"):
        trainer.fit()
    assert trainer.step == 2
    # The first step is trained, recorded and saved.
    assert metrics_of(run, "rollout/staleness") == [0]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_000001"]
    assert [(item["step"], item["index"]) for item in lines(run / "skipped.jsonl")] == [(2, 5)]


# ------------------------------------------------------------------ dynamic sampling


def test_later_rounds_take_what_is_in_flight(recipe, ranks, tmp_path):
    """The order of the data, and so what is trained on, is that of test_dynamic_sampling."""
    recipe.trainer.max_steps = 2
    recipe.algorithm.rewards = ["made_rewards.told_apart"]
    recipe.algorithm.consistency.bonus_coefficient = 0.0
    recipe.rollout.dynamic_sampling.enabled = True
    trainer = small_trainer(recipe, ranks, tmp_path, saves=False)
    events = watched(trainer)
    trainer.fit()
    assert [e[1] for e in events if e[0] == "update"] == [[3, 6, 7, 13], [16, 17, 23, 26]]
    sampled = [(e[1][0], e[2]) for e in events if e[0] == "submit"]
    # The first round of the second step is older; in the last step none is begun ahead.
    assert sampled == [(0, 0), (4, 0), (8, 0), (12, 0), (16, 0), (20, 1), (24, 1)]
    assert metrics_of(tmp_path, "rollout/staleness") == [0, 1]
    assert metrics_of(tmp_path, "rollout/rounds") == [4, 3]
    assert trainer.prompts.position == 28


# ------------------------------------------------------------------ recipes


@pytest.mark.parametrize("backend", ["megatron", "vllm"])
def test_sampling_beside_training_needs_gpus_of_its_own(recipe, backend):
    recipe.rollout.backend = backend
    recipe.rollout.vllm.placement = "colocated"
    recipe.rollout.vllm.gpus = None
    # An evaluation with this recipe is none of its business.
    check_recipe(recipe)
    wanted = rf"rollout\.asynchronous=true.*backend={backend}.*set rollout\.backend=vllm and "
    with pytest.raises(InputError, match=wanted):
        check_training(recipe)


def test_separate_engines_may_sample_beside_training(recipe):
    check_recipe(recipe)
    check_training(recipe)


# ------------------------------------------------------------------ replicas


def disagree(groups: object) -> None:
    raise RunFailed("rank 1 disagrees")


def three_steps(ranks: Ranks, job: tuple) -> dict:
    """A run of two replicas; in "fails" the engine of rank 1 dies in the second step, in
    "disagrees" its validation finds other log-probabilities than the model's own."""
    name, folder, checkpoint, world = job
    recipe = asynchronous(small_recipe(checkpoint, world))
    recipe.trainer.max_steps = 3
    recipe.data.train.shuffle = False
    recipe.checkpoint.save_interval = 1
    if name == "disagrees":
        recipe.data.validation.annotations = {"L1": "validation_L1.jsonl"}
    with pytest.MonkeyPatch.context() as monkeypatch:
        stand_in_for_vllm(monkeypatch, ranks)
        trainer = small_trainer(recipe, ranks, folder)
    if name == "fails" and ranks.rank == 1:
        trainer.generator.failing = {6}
    if name == "disagrees" and ranks.rank == 1:
        trainer.validator.evaluator.check = disagree
    end = None
    try:
        trainer.fit()
    except RunFailed as error:
        end = str(error)
    return {
        "events": ranks.gather_from_replicas(trainer.generator.events),
        "ends": ranks.gather_from_replicas(end),
    }


@pytest.fixture
def replicas(on_ranks, checkpoint, world, tmp_path):
    return lambda name: on_ranks(
        Layout(), three_steps, (name, tmp_path, checkpoint, world), replicas=2
    )[0]


def test_an_engine_of_one_replica_ends_the_run_on_all_ranks(replicas, tmp_path):
    """While a save is under way, which all ranks have to complete."""
    found = replicas("fails")
    for rank, events in enumerate(found["events"]):
        first, second = [2 * rank, 2 * rank + 1], [2 * rank + 4, 2 * rank + 5]
        assert events == [("submit", first, 0), ("collect", first, 0), ("submit", second, 0)]
    assert found["ends"] == ["the engine of rank 1 has died"] * 2
    assert metrics_of(tmp_path, "step") == [1]
    assert (tmp_path / "checkpoints" / "step_000001").is_dir()


def test_a_validation_that_one_replica_refuses_ends_on_all_ranks(replicas, tmp_path):
    found = replicas("disagrees")
    assert found["ends"] == ["rank 1 disagrees"] * 2
