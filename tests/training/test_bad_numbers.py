"""NaN and infinity: the step is left out everywhere, counted, stored; too many stop the run."""

import json
import math
import signal
import time
from pathlib import Path

import pytest
import torch
from bad_numbers import broken, everything, inject, inject_at, unchanged
from layouts import LAYOUTS
from records import lines
from small_runs import one_step, small_recipe, small_trainer

from nemo_care.checkpoints.writer import _StateWriter
from nemo_care.errors import RunFailed, RunStopped
from nemo_care.groups.files import read_groups
from nemo_care.training import step_watch

STEPS = [None, "gradient", None, "rollout", "reference", None, "loss", None]


def checkpoints(run: Path) -> list[int]:
    return sorted(int(path.name[-6:]) for path in (run / "checkpoints").iterdir())


@pytest.fixture
def recipe(checkpoint, world):
    return small_recipe(checkpoint, world)


@pytest.mark.parametrize("kind", ["gradient", "rollout", "reference", "loss"])
def test_a_step_that_is_not_finite_changes_nothing_and_the_next_one_trains(
    recipe, ranks, tmp_path, capsys, kind
):
    recipe.trainer.max_steps = 3
    trainer = small_trainer(recipe, ranks, tmp_path, saves=False)
    states = []
    inject_at(trainer, {2: kind})
    run = trainer.run_training_step

    def observed(step):
        before = everything(trainer)
        run(step)
        states.append(unchanged(before, everything(trainer)))

    trainer.run_training_step = observed
    summary = trainer.fit()
    assert states == [False, True, False]
    assert trainer.policy.optimizer_steps == 2
    metrics = lines(tmp_path / "metrics.jsonl")
    assert [line["train/bad_step"] for line in metrics] == [0, 1, 0]
    assert [line["train/bad_steps"] for line in metrics] == [0, 1, 1]
    assert summary["bad_steps"] == 1
    # JSON knows no NaN.
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert metrics[1]["train/grad_norm"] is None
    assert all(line["train/grad_norm"] > 0 for line in (metrics[0], metrics[2]))
    about, groups = read_groups(tmp_path / "bad_steps" / "step_000002.json")
    assert kind in [item["what"] for item in about["not_finite"]]
    assert (about["step"], about["optimizer_steps"], len(groups)) == (2, 1, 4)
    told = [line for line in capsys.readouterr().out.splitlines() if "step 2 is left out" in line]
    assert len(told) == 1
    assert "first on rank 0" in told[0]
    assert "step_000002.json" in told[0]


def test_what_was_stored_names_completions_and_parameters(recipe, ranks, tmp_path):
    recipe.trainer.max_steps = 3
    trainer = small_trainer(recipe, ranks, tmp_path, saves=False)
    inject_at(trainer, {1: "gradient", 2: "rollout", 3: "reference"})
    trainer.fit()
    rows = lines(tmp_path / "rollouts" / "step_000001.jsonl")
    about, groups = read_groups(tmp_path / "bad_steps" / "step_000001.json")
    (gradient,) = about["gradients"]
    (parameter,) = gradient["parameters"]
    assert parameter.endswith("layers.0.mlp.linear_fc2.weight")
    texts = [c["text"] for group in groups for c in group.record["completions"]]
    assert texts == [row["completion"] for row in rows]
    for group in groups:
        count = len(group.record["completions"])
        assert {len(group.tensors[key]) for key in ("reward", "advantage", "base_reward")} == {
            count
        }
        for number, completion in enumerate(group.record["completions"]):
            assert completion["not_finite"] == []
            names = ("token_ids", "log_probs", "reference_log_probs", "policy_log_probs")
            sizes = {len(group.tensors[f"completions.{number}.{name}"]) for name in names}
            assert len(sizes) == 1
    for step, kind in ((2, "rollout"), (3, "reference")):
        _, groups = read_groups(tmp_path / "bad_steps" / f"step_{step:06d}.json")
        marks = [c["not_finite"] for group in groups for c in group.record["completions"]]
        assert [kind] in marks
        assert all(mark in ([], [kind]) for mark in marks)


def test_no_likelihood_is_not_a_bad_number(recipe, ranks, tmp_path):
    """A completion without an answer has the likelihood NaN; a broken pass must not look alike."""
    recipe.trainer.max_steps = 1
    recipe.rollout.max_completion_tokens = 3
    trainer = small_trainer(recipe, ranks, tmp_path, saves=False)
    trainer.fit()
    (metrics,) = lines(tmp_path / "metrics.jsonl")
    assert metrics["care/missing_answer_rate"] == 1
    assert metrics["train/bad_step"] == 0


def test_a_gradient_whose_norm_overflows_is_left_out(recipe, ranks, tmp_path):
    trainer = small_trainer(recipe, ranks, tmp_path)
    one_step(trainer)
    before = everything(trainer)
    # Finite itself, but not its square.
    undo = inject(trainer, "gradient", value=1e30)
    step = one_step(trainer, 2)
    undo()
    assert step.metrics["train/bad_step"] == 1
    assert step.not_finite.first == {"gradient": None}
    assert unchanged(before, everything(trainer))
    about = json.loads((tmp_path / "bad_steps" / "step_000002.json").read_text())
    assert about["not_finite"] == [{"what": "gradient", "first_rank": None, "replica": None}]


def test_infinity_counts_like_nan_in_bf16_too(recipe, ranks, tmp_path):
    recipe.model.precision.dtype = "bf16"
    trainer = small_trainer(recipe, ranks, tmp_path)
    before = everything(trainer)
    inject(trainer, "gradient", value=-math.inf)
    step = one_step(trainer)
    assert unchanged(before, everything(trainer))
    assert step.not_finite.first == {"gradient": 0}
    assert step.metrics["train/bad_step"] == 1


def test_a_bad_update_ends_the_updates_of_its_rollouts(recipe, ranks, tmp_path):
    recipe.trainer.max_steps = 2
    recipe.algorithm.updates_per_rollout = 3
    trainer = small_trainer(recipe, ranks, tmp_path, saves=False)
    tracked = []
    track = trainer.track_policy
    trainer.track_policy = lambda step: (tracked.append(step.number), track(step))
    compute = trainer.policy.forward_backward
    calls = []

    def second_is_bad(*arguments):
        calls.append(trainer.step)
        if len(calls) != 2:
            return compute(*arguments)
        undo = inject(trainer, "gradient")
        try:
            return compute(*arguments)
        finally:
            undo()

    trainer.policy.forward_backward = second_is_bad
    trainer.fit()
    assert calls == [1, 1, 2, 2, 2]
    assert tracked == [1, 2, 2, 2]
    assert trainer.policy.optimizer_steps == 4
    about = json.loads((tmp_path / "bad_steps" / "step_000001.json").read_text())
    assert (about["update"], about["optimizer_steps"]) == (1, 1)


def test_too_many_in_a_row_stop_the_run_and_leave_no_checkpoint(recipe, ranks, tmp_path):
    recipe.trainer.max_steps = 6
    recipe.trainer.max_bad_steps = 2
    recipe.checkpoint.save_interval = 1
    recipe.checkpoint.keep_last = 1
    recipe.checkpoint.asynchronous = False
    trainer = small_trainer(recipe, ranks, tmp_path)
    inject_at(trainer, dict.fromkeys((2, 4, 5, 6), "gradient"))
    with pytest.raises(RuntimeError, match=r"steps 4 to 6 .*trainer\.max_bad_steps=2") as error:
        trainer.fit()
    assert str(tmp_path / "bad_steps") in str(error.value)
    assert "optimizer.lr" in str(error.value)
    assert checkpoints(tmp_path) == [3]
    metrics = lines(tmp_path / "metrics.jsonl")
    assert [line["train/bad_steps"] for line in metrics] == [0, 1, 1, 2, 3, 4]
    # Whatever it was has gone: the run goes on, and the evidence stays.
    summary = small_trainer(recipe, ranks, tmp_path).fit()
    assert summary["bad_steps"] == 1
    assert len(list((tmp_path / "bad_steps").glob("*.json"))) == 4


def test_a_save_under_way_is_completed_when_bad_steps_end_the_run(
    recipe, ranks, tmp_path, monkeypatch
):
    recipe.trainer.max_bad_steps = 0
    recipe.checkpoint.save_interval = 1
    recipe.checkpoint.keep_last = 1
    trainer = small_trainer(recipe, ranks, tmp_path)
    inject_at(trainer, {3: "gradient"})
    write = _StateWriter.write

    def slow(writer):
        while writer.folder.name.startswith("step_000002") and not trainer.watch.bad_steps.in_a_row:
            time.sleep(0.01)
        return write(writer)

    monkeypatch.setattr(_StateWriter, "write", slow)
    with pytest.raises(RunFailed, match="step 3 had to be left out"):
        trainer.fit()
    # The weights of step 2 may be at fault: the checkpoint before it stays.
    assert checkpoints(tmp_path) == [1, 2]


def test_a_full_disk_under_a_bad_step_is_told_in_one_sentence(recipe, ranks, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(step_watch, "write_groups", full)
    trainer = small_trainer(recipe, ranks, tmp_path)
    inject_at(trainer, {1: "loss"})
    with pytest.raises(RunFailed, match=r"inputs of step 1, .*No space left on device; make room"):
        trainer.fit()


def test_a_missed_checkpoint_is_made_up_by_the_next_good_step(recipe, ranks, tmp_path):
    recipe.trainer.max_steps = 4
    recipe.checkpoint.save_interval = 2
    recipe.checkpoint.keep_last = 0
    trainer = small_trainer(recipe, ranks, tmp_path)
    inject_at(trainer, {2: "loss"})
    trainer.fit()
    assert checkpoints(tmp_path) == [3, 4]


def test_counters_and_weights_survive_a_stop_amid_bad_steps(recipe, ranks, tmp_path):
    recipe.trainer.max_steps = 5
    recipe.trainer.max_bad_steps = 1
    recipe.checkpoint.save_interval = 1
    recipe.checkpoint.keep_last = 1
    trainer = small_trainer(recipe, ranks, tmp_path)
    inject_at(trainer, {2: "gradient"})
    asked = iter([None, signal.SIGTERM])
    trainer.stop.agreed = lambda: next(asked)
    with pytest.raises(RunStopped):
        trainer.fit()
    # Weights that make bad steps may be bad: the checkpoint before them is not removed for them.
    assert checkpoints(tmp_path) == [1, 2]
    resumed = small_trainer(recipe, ranks, tmp_path)
    resumed.resume()
    assert resumed.watch.bad_steps.in_a_row == [2]
    assert unchanged(everything(trainer), everything(resumed))
    inject_at(resumed, {3: "gradient"})
    with pytest.raises(RuntimeError, match="steps 2 to 3"):
        resumed.fit()


def test_first_good_step_compares_rollout_and_training(recipe, ranks, tmp_path):
    recipe.rollout.max_logprob_difference = 0.0
    trainer = small_trainer(recipe, ranks, tmp_path)
    inject_at(trainer, {1: "reference"})
    with pytest.raises(RuntimeError, match=r"rollout\.max_logprob_difference"):
        trainer.fit()
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1]


def test_later_differences_are_told_not_raised(recipe, ranks, tmp_path, capsys):
    recipe.trainer.max_steps = 3
    trainer = small_trainer(recipe, ranks, tmp_path, saves=False)
    check = trainer.watch.check_differences

    def lower_bound_later(step):
        recipe.rollout.max_logprob_difference = 0.0 if step.optimizer_steps else 0.05
        check(step)

    trainer.watch.check_differences = lower_bound_later
    trainer.fit()
    told = [line for line in capsys.readouterr().out.splitlines() if "rollout and training" in line]
    assert len(told) == 1
    assert "step 2" in told[0]
    assert len(lines(tmp_path / "metrics.jsonl")) == 3


def test_logits_of_one_row_spoil_that_completion_only(recipe, ranks, tmp_path, monkeypatch):
    trainer = small_trainer(recipe, ranks, tmp_path)
    prompts, _ = trainer.prompts.next_step()
    model = trainer.policy.model
    logits_of, calls = model.next_token_logits, []

    def spoiled(hidden, places):
        logits = logits_of(hidden, places)
        calls.append(1)
        if len(calls) == 3:
            logits[1] = math.nan
        return logits

    good = trainer.rollouts.generate(prompts[:1])[0]
    monkeypatch.setattr(model, "next_token_logits", spoiled)
    bad = trainer.rollouts.generate(prompts[:1])[0]
    ended = [c.log_probs.isnan().any().item() for c in bad.completions]
    assert ended == [False, True, False, False]
    assert bad.completions[1].length == 3
    assert bad.completions[1].ended
    for number in (0, 2, 3):
        assert torch.equal(bad.completions[number].token_ids, good.completions[number].token_ids)


def test_a_model_without_numbers_is_not_evaluated(recipe, ranks, tmp_path):
    recipe.data.validation.annotations = {"L1": "validation_L1.jsonl"}
    trainer = small_trainer(recipe, ranks, tmp_path)
    with (
        broken(trainer.policy.model),
        pytest.raises(RuntimeError, match="probabilities are not numbers for sample"),
    ):
        trainer.run_validation()


def steps_with_bad_numbers(ranks, job) -> list[dict]:
    """What this rank decided of each step; the second one's numbers are bad."""
    folder, recipe = job
    recipe.trainer.max_steps = len(STEPS)
    trainer = small_trainer(recipe, ranks, folder)
    decided = []
    for number, kind in enumerate(STEPS, start=1):
        before = everything(trainer)
        undo = inject(trainer, kind) if kind and ranks.rank == 1 else lambda: None
        step = one_step(trainer, number)
        undo()
        trainer.record(step)
        bad = step.not_finite
        decided.append(
            {
                "kind": kind,
                "first": dict(bad.first) if bad else None,
                "bad_step": step.metrics["train/bad_step"],
                "unchanged": unchanged(before, everything(trainer)),
            }
        )
    return decided


@pytest.mark.parametrize("name", ["dp2", "pp2", pytest.param("tp2", marks=pytest.mark.slow)])
def test_one_rank_s_bad_numbers_are_left_out_on_all(on_ranks, name, recipe, tmp_path):
    layout, replicas = LAYOUTS[name]
    everyone = on_ranks(layout, steps_with_bad_numbers, (tmp_path, recipe), replicas=replicas)
    assert len(everyone) == 2
    for decided in zip(*everyone, strict=True):
        first = decided[0]["first"]
        assert [one["first"] for one in decided] == [first] * 2
        for one in decided:
            assert one["bad_step"] == one["unchanged"] == (one["kind"] is not None)
        if decided[0]["kind"] is not None:
            assert decided[0]["kind"] in first
    if name == "dp2":
        assert everyone[0][STEPS.index("gradient")]["first"] == {"gradient": 1}
    about, groups = read_groups(tmp_path / "bad_steps" / "step_000002.json")
    assert [item["what"] for item in about["not_finite"]] == ["gradient"]
    assert [of_rank["rank"] for of_rank in about["gradients"]] == [1]
    assert len(groups) == 4
