"""A run in one process: resuming, what it writes, what it refuses, the GRPO baseline."""

import json
import math

import pytest
import torch
from records import lines
from small_runs import small_recipe, small_trainer, updated, whole_and_resumed

from nemo_care.errors import InputError, RunFailed

KEYS = {
    "step",
    "reward/accuracy",
    "reward/format",
    "reward/total",
    "care/answer_likelihood",
    "care/bonus_rate",
    "care/clipped_rate",
    "care/missing_answer_rate",
    "care/ema_distance",
    "rollout/completion_tokens",
    "rollout/groups_all_right",
    "rollout/groups_all_wrong",
    "train/loss",
    "train/grad_norm",
    "train/lr",
    "timing/rollout",
    "timing/reward",
    "timing/scoring",
    "timing/update",
    "memory/process_gib",
    "memory/gpu_gib",
    "timing/checkpoint",
    "timing/step",
}


@pytest.fixture
def recipe(checkpoint, world):
    return small_recipe(checkpoint, world)


# test_dynamic_sampling.py and test_stopping.py resume runs in float32.
@pytest.mark.parametrize("dtype", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
def test_resumed_run_equals_the_uninterrupted_one(recipe, ranks, tmp_path, dtype):
    recipe.model.precision.dtype = dtype
    recipe.rollout.max_logprob_difference = 1.0
    # A schedule that moves at every step, the same for both lengths of run.
    recipe.optimizer.schedule = "cosine"
    recipe.optimizer.warmup_steps = 1
    recipe.optimizer.decay_steps = 5
    recipe.algorithm.reference.ema_update_every = 3
    # Decoding batches of different sizes.
    recipe.rollout.groups_per_batch = 3
    whole, resumed = whole_and_resumed(recipe, ranks, tmp_path)
    averages = whole.reference.average.state, resumed.reference.average.state
    assert all(torch.equal(tensor, averages[1][name]) for name, tensor in averages[0].items())
    assert len({line["train/lr"] for line in lines(tmp_path / "whole" / "metrics.jsonl")}) == 3


def adamw_state(trainer) -> list[dict]:
    """Of each shard: settings of its group, master weight and averages, as they are now."""
    (part,) = trainer.policy.optimizer.chained_optimizers
    return [
        {
            **{name: value for name, value in group.items() if name != "params"},
            "weight": shard.detach().clone(),
            **{name: tensor.clone() for name, tensor in part.optimizer.state[shard].items()},
        }
        for group in part.optimizer.param_groups
        for shard in group["params"]
    ]


@pytest.mark.parametrize(
    ("dtype", "offload"),
    [
        ("fp32", False),
        pytest.param("fp32", True, marks=pytest.mark.slow),
        pytest.param("bf16", False, marks=pytest.mark.slow),
        ("bf16", True),
    ],
)
def test_the_optimizer_of_a_resumed_run_is_the_recipes(recipe, ranks, tmp_path, dtype, offload):
    """Its rate, betas, eps and weight decay make the update, and not the checkpoint's."""
    recipe.model.precision.dtype = dtype
    recipe.optimizer.offload = offload
    recipe.rollout.max_logprob_difference = 1.0
    recipe.trainer.max_steps = 1
    small_trainer(recipe, ranks, tmp_path).fit()
    recipe.trainer.max_steps = 3
    optimizer = recipe.optimizer
    optimizer.lr, optimizer.min_lr, optimizer.weight_decay = 3e-3, 1e-3, 0.3
    optimizer.beta1, optimizer.beta2, optimizer.eps = 0.7, 0.8, 1e-3
    optimizer.schedule, optimizer.decay_steps = "cosine", 3
    trainer = small_trainer(recipe, ranks, tmp_path, saves=False)
    trainer.resume()
    before = adamw_state(trainer)
    trainer.recipe.trainer.max_steps = 2
    trainer.fit()
    rate = 1e-3 + (3e-3 - 1e-3) * 0.5 * (1 + math.cos(math.pi * 2 / 3))
    record = lines(tmp_path / "metrics.jsonl")[-1]
    assert (record["step"], record["train/lr"]) == (2, pytest.approx(rate))
    moved = 0
    for old, new in zip(before, adamw_state(trainer), strict=True):
        decay = 0.3 * new["wd_mult"]
        assert new["lr"] == pytest.approx(rate)
        assert new["weight_decay"] == pytest.approx(decay)
        assert (float(old["step"]), float(new["step"])) == (1, 2)
        gradient = (new["exp_avg"] - 0.7 * old["exp_avg"]) / (1 - 0.7)
        squares = 0.8 * old["exp_avg_sq"] + (1 - 0.8) * gradient.square()
        torch.testing.assert_close(new["exp_avg_sq"], squares, rtol=1e-3, atol=1e-12)
        mean, square = new["exp_avg"] / (1 - 0.7**2), new["exp_avg_sq"] / (1 - 0.8**2)
        wanted = old["weight"] * (1 - rate * decay) - rate * mean / (square.sqrt() + 1e-3)
        torch.testing.assert_close(new["weight"], wanted, rtol=1e-5, atol=1e-7)
        moved += int((new["weight"] != old["weight"]).sum())
    assert moved > 1000


def test_killed_run_repeats_the_steps_after_its_checkpoint_once(recipe, ranks, tmp_path):
    recipe.trainer.max_steps = 3
    trainer = small_trainer(recipe, ranks, tmp_path)
    trainer.save = lambda: None if trainer.step == 3 else type(trainer).save(trainer)
    trainer.fit()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "torn')
    small_trainer(recipe, ranks, tmp_path).fit()
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_run_directory_holds_what_scripts_depend_on(recipe, ranks, tmp_path, world):
    recipe.trainer.max_steps = 1
    recipe.checkpoint.export = True
    recipe.data.validation.annotations = {"L1": "validation_L1.jsonl"}
    recipe.evaluation.forced_reasoning_probe = True
    summary = small_trainer(recipe, ranks, tmp_path).fit()
    (metrics,) = lines(tmp_path / "metrics.jsonl")
    assert set(metrics) >= KEYS
    rows = lines(tmp_path / "rollouts" / "step_000001.jsonl")
    assert len(rows) == 16
    for key in ("prompt_id", "completion", "accuracy", "format", "answer_likelihood", "bonus"):
        assert key in rows[0]
    for row in rows:
        assert row["reward"] == pytest.approx(row["accuracy"] + row["format"] + row["bonus"])
    assert (tmp_path / "checkpoints" / "step_000001").is_dir()
    assert (tmp_path / "skipped.jsonl").read_text() == ""
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    for when in ("start", "end"):
        assert summary[when]["L1"]["count"] == 8
        assert 0 <= summary[when]["L1"]["probe_implied"] <= 1
    assert (tmp_path / "export" / "model.safetensors").is_file()


def test_grpo_baseline_pays_no_bonus_and_leaves_its_reference_alone(recipe, ranks, tmp_path):
    recipe.algorithm.consistency.bonus_coefficient = 0.0
    recipe.algorithm.kl_coefficient = 0.04
    recipe.algorithm.reference.ema_update_every = 0
    recipe.trainer.max_steps = 2
    trainer = small_trainer(recipe, ranks, tmp_path, saves=False)
    before = {n: p.clone() for n, p in trainer.reference.average.model.named_parameters()}
    trainer.fit()
    metrics = lines(tmp_path / "metrics.jsonl")
    assert all(line["care/bonus_rate"] == 0 for line in metrics)
    # Equal models first, then the policy moves away.
    assert metrics[0]["train/kl"] == pytest.approx(0, abs=1e-9)
    assert metrics[-1]["train/kl"] > 1e-6
    after = dict(trainer.reference.average.model.named_parameters())
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_several_updates_per_rollout_start_from_the_same_old_policy(recipe, ranks, tmp_path):
    recipe.trainer.max_steps = 1
    recipe.algorithm.updates_per_rollout = 3
    recipe.optimizer.lr = 5e-3
    recipe.algorithm.clip_low = recipe.algorithm.clip_high = 0.01
    trainer = small_trainer(recipe, ranks, tmp_path, saves=False)
    trainer.fit()
    (metrics,) = lines(tmp_path / "metrics.jsonl")
    assert metrics["train/clipped_fraction"] > 0
    # Measured before the first of the three updates.
    assert metrics["rollout/logprob_difference_max"] < 1e-4


def test_micro_batches_of_any_size_give_the_same_step(recipe, ranks, tmp_path):
    recipe.trainer.max_steps = 1
    results = []
    for size in (1, 4):
        recipe.algorithm.groups_per_micro_batch = size
        trainer = small_trainer(recipe, ranks, tmp_path / str(size), saves=False)
        trainer.fit()
        results.append(lines(tmp_path / str(size) / "metrics.jsonl")[0])
    for key in ("train/loss", "train/grad_norm", "care/answer_likelihood"):
        assert results[0][key] == pytest.approx(results[1][key], abs=1e-6, rel=1e-5)


def recipe_with_kl(checkpoint, world):
    recipe = small_recipe(checkpoint, world)
    recipe.trainer.max_steps = 2
    recipe.algorithm.kl_coefficient = 0.02
    return recipe


@pytest.fixture(scope="module")
def run_without_switches(checkpoint, world, ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    small_trainer(recipe_with_kl(checkpoint, world), ranks, folder, saves=False).fit()
    return lines(folder / "metrics.jsonl")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("algorithm.shared_prompt", False),
        ("algorithm.reference.offload", True),
        ("model.recompute_granularity", "selective"),
        ("model.recompute_granularity", "full"),
    ],
)
def test_switches_of_speed_and_memory_leave_the_run_as_it_is(
    checkpoint, world, ranks, tmp_path, run_without_switches, key, value
):
    recipe = recipe_with_kl(checkpoint, world)
    owner = recipe
    *path, last = key.split(".")
    for part in path:
        owner = getattr(owner, part)
    setattr(owner, last, value)
    small_trainer(recipe, ranks, tmp_path, saves=False).fit()
    switched_lines = lines(tmp_path / "metrics.jsonl")
    for plain, switched in zip(run_without_switches, switched_lines, strict=True):
        for metric, wanted in plain.items():
            if metric.startswith(("timing/", "memory/")):
                continue
            if wanted is None:
                assert switched[metric] is None
            else:
                assert switched[metric] == pytest.approx(wanted, abs=2e-4, rel=2e-3), metric


@pytest.mark.parametrize(("granularity", "times"), [("none", 1), ("selective", 2), ("full", 2)])
def test_recomputation_computes_attention_again(recipe, ranks, tmp_path, granularity, times):
    recipe.model.recompute_granularity = granularity
    trainer = small_trainer(recipe, ranks, tmp_path)
    prompts, _ = trainer.prompts.next_step()
    groups = trainer.rollouts.generate(prompts)
    for group in groups:
        group.advantage = torch.linspace(-1, 1, group.size)
    calls = []
    layers = trainer.policy.model.language_model.decoder.layers
    for layer in layers:
        layer.self_attention.core_attention.register_forward_hook(lambda *_: calls.append(1))
    updated(trainer.policy, groups)
    assert len(calls) == times * len(layers) * len(groups)


def test_switch_of_the_shared_prompt_reaches_every_phase(recipe, ranks, tmp_path):
    for shared in (True, False):
        recipe.algorithm.shared_prompt = shared
        trainer = small_trainer(recipe, ranks, tmp_path / str(shared))
        parts = (trainer.generator, trainer.reference.scorer.layout, trainer.policy.layout)
        assert [part.shared_prompt for part in parts] == [shared] * 3


def test_reference_in_cpu_memory_equals_one_in_place_and_resumes(recipe, ranks, tmp_path):
    recipe.trainer.max_steps = 2
    recipe.model.precision.dtype = "bf16"
    states = []
    for offload in (False, True):
        recipe.algorithm.reference.offload = offload
        trainer = small_trainer(recipe, ranks, tmp_path / str(offload))
        trainer.fit()
        resumed = small_trainer(recipe, ranks, tmp_path / str(offload))
        resumed.resume()
        for average in (trainer.reference.average, resumed.reference.average):
            with average.in_place():
                weights = {n: p.clone() for n, p in average.model.named_parameters()}
            states.append((average.state, weights))
    for state, weights in states[1:]:
        for name, wanted in states[0][0].items():
            assert torch.equal(state[name], wanted)
            assert torch.equal(weights[name], states[0][1][name])


def test_reference_in_cpu_memory_holds_no_weights_between_passes(recipe, ranks, tmp_path):
    recipe.algorithm.reference.offload = True
    model = small_trainer(recipe, ranks, tmp_path).reference.average.model
    assert {p.untyped_storage().nbytes() for p in model.parameters()} == {4}


def test_rollout_that_disagrees_with_training_stops_the_first_step(recipe, ranks, tmp_path):
    recipe.rollout.max_logprob_difference = 0.0
    with pytest.raises(RuntimeError, match="max_logprob_difference"):
        small_trainer(recipe, ranks, tmp_path).fit()


def test_resume_never_refuses_a_used_run_directory(recipe, ranks, tmp_path):
    recipe.trainer.max_steps = 1
    small_trainer(recipe, ranks, tmp_path).fit()
    recipe.trainer.resume = "never"
    with pytest.raises(InputError, match=r"trainer\.resume"):
        small_trainer(recipe, ranks, tmp_path).fit()


@pytest.mark.parametrize(
    ("method", "what"), [("rewind", "the records up to"), ("append_validation", "the validation")]
)
def test_a_full_disk_around_the_steps_is_told_in_one_sentence(
    recipe, ranks, tmp_path, monkeypatch, method, what
):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    recipe.data.validation.annotations = {"L1": "validation_L1.jsonl"}
    trainer = small_trainer(recipe, ranks, tmp_path)
    monkeypatch.setattr(trainer.files, method, full)
    with pytest.raises(RunFailed, match=f"{what} .*step 0 .*No space left on device; make room"):
        trainer.fit()


@pytest.fixture
def damaged_world(world, tmp_path):
    """The miniature with one broken video, which the first step would take."""
    import shutil

    root = tmp_path / "damaged"
    shutil.copytree(world, root)
    first = json.loads((root / "train.jsonl").read_text().splitlines()[0])
    (root / first["videos"][0]).write_bytes(b"no video")
    return root, first["id"]


def test_unreadable_video_is_skipped_counted_and_listed(recipe, ranks, tmp_path, damaged_world):
    root, broken = damaged_world
    recipe.data.train.root = str(root)
    recipe.data.train.shuffle = False
    recipe.trainer.max_steps = 1
    summary = small_trainer(recipe, ranks, tmp_path / "run", saves=False).fit()
    (skipped,) = lines(tmp_path / "run" / "skipped.jsonl")
    assert skipped["sample_id"] == broken
    assert "video not readable" in skipped["reason"]
    assert summary["skipped"] == 1
    # The next sample took its place: the step is as large as ever.
    assert len(lines(tmp_path / "run" / "rollouts" / "step_000001.jsonl")) == 16


def test_too_many_unusable_samples_stop_the_run(recipe, ranks, tmp_path, damaged_world):
    root, broken = damaged_world
    recipe.data.train.root = str(root)
    recipe.data.train.shuffle = False
    recipe.data.max_skipped_fraction = 0.0
    with pytest.raises(InputError, match=f"{broken}.*not readable"):
        small_trainer(recipe, ranks, tmp_path / "run").fit()


def test_prompt_longer_than_allowed_is_skipped_not_cut(recipe, ranks, tmp_path):
    recipe.data.max_prompt_tokens = 5
    with pytest.raises(InputError, match="max_prompt_tokens"):
        small_trainer(recipe, ranks, tmp_path).fit()


def test_sampled_vision_tokens_are_ordinary_tokens(recipe, ranks, tmp_path):
    """A policy may sample <|video_pad|>; only the prompt's vision tokens carry features."""
    from nemo_care.groups.group import Completion, Group

    trainer = small_trainer(recipe, ranks, tmp_path)
    prompts, _ = trainer.prompts.next_step()
    video_pad = trainer.policy.model.family.prompt.placeholders["video"]
    groups = [
        Group(
            prompt,
            [Completion(torch.tensor([8, video_pad, 2]), torch.zeros(3), "", True, None)] * 2,
        )
        for prompt in prompts
    ]
    tables = trainer.reference.scorer.score(
        groups,
        lambda batch, log_probs: list(log_probs.sum(1)[None].split(2, dim=1)),
        rows=1,
        all_tokens=True,
    )
    assert all(torch.isfinite(table).all() for table in tables)


def test_reference_and_schedule_count_optimizer_steps(recipe, ranks, tmp_path):
    recipe.trainer.max_steps = 2
    recipe.algorithm.updates_per_rollout = 2
    recipe.algorithm.reference.ema_update_every = 3
    recipe.optimizer.schedule = "cosine"
    trainer = small_trainer(recipe, ranks, tmp_path, saves=False)
    updates = []
    update = trainer.reference.average.update
    trainer.reference.average.update = lambda policy: (
        updates.append(trainer.policy.optimizer_steps),
        update(policy),
    )
    trainer.fit()
    assert updates == [3]
    rates = [line["train/lr"] for line in lines(tmp_path / "metrics.jsonl")]
    # The last of two updates: at half of the cosine, and at its end.
    assert rates == [pytest.approx(recipe.optimizer.lr / 2), pytest.approx(0.0, abs=1e-12)]


def test_validation_that_a_kill_prevented_is_made_up(recipe, ranks, tmp_path):
    recipe.trainer.max_steps = 1
    # The kill comes behind the checkpoint.
    recipe.checkpoint.asynchronous = False
    recipe.data.validation.annotations = {"L1": "validation_L1.jsonl"}
    trainer = small_trainer(recipe, ranks, tmp_path)
    run_validation = trainer.run_validation

    def killed_after_the_first():
        if trainer.step:
            raise KeyboardInterrupt
        run_validation()

    trainer.run_validation = killed_after_the_first
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    summary = small_trainer(recipe, ranks, tmp_path).fit()
    assert summary["start"]["L1"]["count"] == summary["end"]["L1"]["count"] == 8


def test_data_set_without_any_usable_sample_ends(recipe, ranks, tmp_path):
    recipe.data.max_prompt_tokens = 5
    recipe.data.max_skipped_fraction = 1.0
    with pytest.raises(InputError, match="48 of 48"):
        small_trainer(recipe, ranks, tmp_path).fit()
