"""Dynamic sampling: a step samples on until enough groups have a signal."""

import shutil
from pathlib import Path

import pytest
import torch.distributed as dist
from bad_numbers import everything, inject, unchanged
from made_rewards import SIGNALS
from records import lines
from small_runs import one_step, small_recipe, small_trainer, updated, whole_and_resumed

from nemo_care.data.stream import TooManySkipped
from nemo_care.groups.files import read_groups
from nemo_care.ranks.process_groups import Layout, Ranks
from nemo_care.training.step import Step

# Places in the stream of the groups with a signal; with shuffle=false sample 13 is at place 13.
WITH_SIGNAL = [place for place in range(48) if str(place)[-1] in SIGNALS]


def rollouts(run: Path, step: int) -> list[dict]:
    return lines(run / "rollouts" / f"step_{step:06d}.jsonl")


def places(rows: list[dict], *, used: bool) -> list[int]:
    return sorted({row["prompt_index"] for row in rows if row["used"] is used})


@pytest.fixture
def recipe(checkpoint, world):
    """Samples in their order, told apart by a made reward alone: there is no reference."""
    made = small_recipe(checkpoint, world)
    made.data.train.shuffle = False
    made.algorithm.rewards = ["made_rewards.told_apart"]
    made.algorithm.consistency.bonus_coefficient = 0.0
    made.rollout.dynamic_sampling.enabled = True
    return made


def watched(trainer) -> list[list[int]]:
    """Fills with what the policy is trained on in each step."""
    trained: list[list[int]] = []
    update = trainer.policy.update

    def observed(step, **keywords):
        trained.append([group.prompt.index for group in step.trained])
        update(step, **keywords)

    trainer.policy.update = observed
    return trained


def test_a_step_samples_on_until_enough_groups_have_a_signal(recipe, ranks, tmp_path):
    recipe.trainer.max_steps = 2
    trainer = small_trainer(recipe, ranks, tmp_path, saves=False)
    trained = watched(trainer)
    trainer.fit()
    # 0 to 3 and 4 to 7 hold three, 8 to 11 none, 12 to 15 one more. The next step begins there:
    # 16 to 19 hold two, 20 to 23 one, and 24 to 27 two, of which the last is not needed.
    assert trained == [[3, 6, 7, 13], [16, 17, 23, 26]]
    assert trainer.prompts.position == 28
    metrics = lines(tmp_path / "metrics.jsonl")
    assert [line["rollout/rounds"] for line in metrics] == [4, 3]
    assert [line["rollout/groups_sampled"] for line in metrics] == [16, 12]
    assert [line["rollout/groups_set_aside"] for line in metrics] == [12, 8]
    # These describe all that was sampled.
    assert [line["rollout/groups_without_signal"] for line in metrics] == [12, 7]
    for step, sampled in ((1, range(16)), (2, range(16, 28))):
        rows = rollouts(tmp_path, step)
        assert len(rows) == 4 * len(sampled)
        assert places(rows, used=True) == trained[step - 1]
        assert places(rows, used=False) == sorted(set(sampled) - set(trained[step - 1]))
        mean = sum(row["reward"] for row in rows) / len(rows)
        assert metrics[step - 1]["reward/total"] == pytest.approx(mean)


def test_groups_without_a_signal_fill_the_step_up_at_the_bound(recipe, ranks, tmp_path):
    recipe.trainer.max_steps = 1
    recipe.rollout.dynamic_sampling.max_rounds = 2
    trainer = small_trainer(recipe, ranks, tmp_path, saves=False)
    trained = watched(trainer)
    trainer.fit()
    # The first without one fills up.
    assert trained == [[0, 3, 6, 7]]
    (metrics,) = lines(tmp_path / "metrics.jsonl")
    assert metrics["rollout/rounds"] == 2
    assert metrics["rollout/groups_set_aside"] == 4
    assert metrics["train/grad_norm"] > 0


def test_without_any_signal_a_step_is_as_large_as_ever(recipe, ranks, tmp_path):
    recipe.trainer.max_steps = 1
    recipe.algorithm.rewards = ["made_rewards.all_equal"]
    recipe.rollout.dynamic_sampling.max_rounds = 3
    trainer = small_trainer(recipe, ranks, tmp_path, saves=False)
    trained = watched(trainer)
    trainer.fit()
    assert trained == [[0, 1, 2, 3]]
    (metrics,) = lines(tmp_path / "metrics.jsonl")
    assert metrics["rollout/rounds"] == 3
    assert metrics["train/grad_norm"] == 0
    assert metrics["train/bad_step"] == 0


def test_the_step_is_that_of_the_chosen_groups_alone(recipe, ranks, tmp_path):
    recipe.trainer.max_steps = 1
    trainer = small_trainer(recipe, ranks, tmp_path / "dynamic", saves=False)
    trainer.fit()
    (metrics,) = lines(tmp_path / "dynamic" / "metrics.jsonl")
    recipe.rollout.dynamic_sampling.enabled = False
    plain = small_trainer(recipe, ranks, tmp_path / "plain", saves=False)
    groups = [group for _ in range(4) for group in plain.next_rollouts(Step(1))]
    plain.rewards(groups)
    plain.credit(groups)
    wanted = updated(plain.policy, [g for g in groups if g.prompt.index in (3, 6, 7, 13)])
    for key in ("train/loss", "train/grad_norm", "rollout/logprob_difference"):
        assert metrics[key] == pytest.approx(wanted[key], abs=1e-7)


def test_right_answers_that_the_bonus_tells_apart_are_a_signal(recipe, ranks, tmp_path):
    """The base rewards are all equal, the advantages behind the scoring pass are not."""
    recipe.trainer.max_steps = 1
    recipe.algorithm.rewards = ["accuracy", "made_rewards.all_equal"]
    recipe.algorithm.reward_weights = [0.0, 1.0]
    recipe.algorithm.consistency.kind = "dense"
    recipe.algorithm.consistency.bonus_coefficient = 0.5
    recipe.algorithm.consistency.likelihood_clip = 1.0
    small_trainer(recipe, ranks, tmp_path, saves=False).fit()
    (metrics,) = lines(tmp_path / "metrics.jsonl")
    assert metrics["rollout/rounds"] == 1
    assert metrics["rollout/groups_set_aside"] == 0
    assert all(row["used"] for row in rollouts(tmp_path, 1))
    for row in rollouts(tmp_path, 1):
        assert row["reward"] - row["bonus"] == pytest.approx(1)


def test_resumed_run_equals_the_uninterrupted_one(recipe, ranks, tmp_path, world):
    root = tmp_path / "damaged"
    shutil.copytree(world, root)
    # In the second rounds of the first and the second step.
    for place in (5, 22):
        (root / lines(root / "train.jsonl")[place]["videos"][0]).write_bytes(b"no video")
    recipe.data.train.root = str(root)
    recipe.checkpoint.save_interval = 1
    # Killed after the record of the second step, whose checkpoint is gone.
    whole, resumed = whole_and_resumed(recipe, ranks, tmp_path, lost=2)
    skipped = lines(tmp_path / "whole" / "skipped.jsonl")
    assert lines(tmp_path / "parts" / "skipped.jsonl") == skipped
    assert [(item["step"], item["index"]) for item in skipped] == [(1, 5), (2, 22)]
    assert resumed.prompts.position == whole.prompts.position
    assert unchanged(everything(whole), everything(resumed))


def test_what_earlier_rounds_skipped_is_listed_when_a_later_one_ends_the_run(
    recipe, ranks, tmp_path, world
):
    root = tmp_path / "damaged"
    shutil.copytree(world, root)
    for place in (1, 5):
        (root / lines(root / "train.jsonl")[place]["videos"][0]).write_bytes(b"no video")
    recipe.data.train.root = str(root)
    recipe.data.max_skipped_fraction = 1.5 / 48
    with pytest.raises(TooManySkipped, match="2 of 48"):
        small_trainer(recipe, ranks, tmp_path / "run").fit()
    skipped = lines(tmp_path / "run" / "skipped.jsonl")
    assert [(item["step"], item["index"]) for item in skipped] == [(1, 1), (1, 5)]


def test_a_group_that_is_not_finite_is_never_set_aside(recipe, ranks, tmp_path):
    """Its completions are empty and so without a signal: the update has to hear of it."""
    recipe.trainer.max_steps = 1
    trainer = small_trainer(recipe, ranks, tmp_path, saves=False)
    sample, rounds = trainer.next_rollouts, []

    def bad_in_the_second_round(step):
        rounds.append(1)
        undo = inject(trainer, "rollout") if len(rounds) == 2 else lambda: None
        groups = sample(step)
        undo()
        return groups

    trainer.next_rollouts = bad_in_the_second_round
    trained = watched(trainer)
    trainer.fit()
    assert trained == [[4, 5, 6, 7]]
    (metrics,) = lines(tmp_path / "metrics.jsonl")
    assert (metrics["train/bad_step"], metrics["rollout/rounds"]) == (1, 2)
    about, groups = read_groups(tmp_path / "bad_steps" / "step_000001.json")
    assert "rollout" in [item["what"] for item in about["not_finite"]]
    assert [group.prompt_index for group in groups] == [4, 5, 6, 7]
    assert trainer.policy.optimizer_steps == 0


def test_what_is_set_aside_holds_no_media(recipe, ranks, tmp_path):
    trainer = small_trainer(recipe, ranks, tmp_path)
    groups = one_step(trainer).groups
    assert len(groups) == 16
    assert all((group.prompt.frame_bytes > 0) == group.used for group in groups)


def test_switched_off_it_leaves_no_trace(recipe, ranks, tmp_path):
    recipe.trainer.max_steps = 1
    recipe.rollout.dynamic_sampling.enabled = False
    trainer = small_trainer(recipe, ranks, tmp_path, saves=False)
    trained = watched(trainer)
    trainer.fit()
    assert trained == [[0, 1, 2, 3]]
    (metrics,) = lines(tmp_path / "metrics.jsonl")
    traces = {"rollout/rounds", "rollout/groups_sampled", "rollout/groups_set_aside"}
    assert not traces & set(metrics)
    assert all("used" not in row for row in rollouts(tmp_path, 1))


def two_steps(ranks: Ranks, job: tuple) -> dict:
    """What each replica trained on."""
    folder, checkpoint, world = job
    recipe = small_recipe(checkpoint, world)
    recipe.trainer.max_steps = 2
    recipe.data.train.shuffle = False
    # The KL term needs the reference's log-probabilities of the groups that move.
    recipe.algorithm.kl_coefficient = 0.04
    recipe.algorithm.consistency.bonus_coefficient = 0.0
    recipe.algorithm.rewards = ["made_rewards.told_apart"]
    recipe.rollout.dynamic_sampling.enabled = True
    trainer = small_trainer(recipe, ranks, folder, saves=False)
    trained: list[list[int]] = []
    update = trainer.policy.update

    def observed(step, **keywords):
        groups = step.trained
        assert all(group.used for group in groups)
        # The frames of groups that have moved to another replica have come with them.
        held = ranks.is_model_leader
        assert all((group.prompt.frame_bytes > 0) == held for group in groups)
        trained.append([group.prompt.index for group in groups])
        update(step, **keywords)

    send = dist.send_object_list

    def sent(objects, **keywords):
        # Frames are not pickled.
        assert all(f.is_meta for group in objects for f in group.prompt.frames)
        send(objects, **keywords)

    dist.send_object_list = sent
    trainer.policy.update = observed
    trainer.fit()
    return {"trained": ranks.gather_from_replicas(trained), "position": trainer.prompts.position}


@pytest.fixture(scope="module")
def one_process(on_ranks, checkpoint, world, tmp_path_factory):
    """The run of one process and what it found."""
    run = tmp_path_factory.mktemp("dynamic")
    return run, on_ranks(Layout(), two_steps, (run, checkpoint, world))[0]


@pytest.mark.parametrize(
    ("layout", "replicas"),
    [
        (Layout(), 2),
        (Layout(pipeline=2), 1),
        pytest.param(Layout(pipeline=2), 2, marks=pytest.mark.slow),
    ],
)
def test_every_layout_trains_on_the_same_groups(
    on_ranks, one_process, layout, replicas, checkpoint, world, tmp_path
):
    """Also where one replica has sampled more of them than its share."""
    run, base = one_process
    job = (tmp_path, checkpoint, world)
    found = on_ranks(layout, two_steps, job, replicas=replicas)[0]
    assert found["position"] == base["position"] == 28
    assert all(len(indices) == 4 // replicas for of in found["trained"] for indices in of)
    for step, wanted in enumerate(base["trained"][0]):
        mine = [index for of_replica in found["trained"] for index in of_replica[step]]
        assert sorted(mine) == wanted
        first, second = (rollouts(folder, step + 1) for folder in (tmp_path, run))
        for ours, theirs in zip(first, second, strict=True):
            for key in ("prompt_index", "completion", "used"):
                assert ours[key] == theirs[key]
    for ours, theirs in zip(
        *(lines(folder / "metrics.jsonl") for folder in (tmp_path, run)), strict=True
    ):
        assert ours["train/kl"] == pytest.approx(theirs["train/kl"], abs=1e-5, rel=5e-3)
        for key in ("train/loss", "train/grad_norm", "reward/total", "rollout/groups_set_aside"):
            assert ours[key] == pytest.approx(theirs[key], abs=1e-4, rel=5e-3), key
