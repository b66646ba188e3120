"""Asynchronous rollouts with a real engine."""

import pytest
from records import lines

pytestmark = pytest.mark.vllm


@pytest.fixture
def make(checkpoint, world, ranks, tmp_path):
    """Makes trainers whose engine is ahead of them, and ends the engines."""
    from small_runs import small_recipe, small_trainer

    recipe = small_recipe(checkpoint, world)
    recipe.trainer.max_steps = 3
    recipe.trainer.validation_interval = 2
    recipe.data.validation.annotations = {"L1": "validation_L1.jsonl"}
    recipe.rollout.backend = "vllm"
    recipe.rollout.asynchronous = True
    recipe.rollout.vllm.placement = "separate"
    # Without GPUs the number says only how many engines there are.
    recipe.rollout.vllm.gpus = [1]
    recipe.rollout.vllm.kv_cache_gib = 0.25
    recipe.rollout.vllm.enforce_eager = True
    recipe.rollout.vllm.timeout_seconds = 600
    made = []

    def make():
        made.append(small_trainer(recipe, ranks, tmp_path))
        return made[-1]

    yield make
    for trainer in made:
        trainer.generator.close()


def test_steps_are_trained_while_the_next_one_is_sampled(make, tmp_path):
    trainer = make()
    second = [trainer.prompts.next_step()[0] for _ in range(2)][1]
    wanted = sorted(
        (group.prompt.index, number, completion.text)
        for group in trainer.rollouts.generate(second)
        for number, completion in enumerate(group.completions)
    )
    trainer.prompts.position = 0
    trainer.fit()
    metrics = lines(tmp_path / "metrics.jsonl")
    assert [line["rollout/staleness"] for line in metrics] == [0, 1, 1]
    differences = [line["rollout/logprob_difference"] for line in metrics]
    print(f"differences of log-probabilities: {differences}")
    assert differences[0] < 1e-4
    # The others tell of an update; and the second step's completions are from before the first.
    assert min(differences[1:]) > 10 * differences[0]
    rows = lines(tmp_path / "rollouts" / "step_000002.jsonl")
    assert wanted == sorted(
        (row["prompt_index"], row["completion_index"], row["completion"]) for row in rows
    )
    # In between it has validated with newer weights.
    assert [record["step"] for record in lines(tmp_path / "validation.jsonl")] == [0, 2, 3]


def test_a_run_goes_on_when_an_engine_is_killed_while_it_is_ahead(make, tmp_path):
    trainer = make()
    submit, rounds = trainer.generator.submit, []

    def killed(prompts, sampling):
        begun = submit(prompts, sampling)
        if sampling is trainer.rollouts.sampling:
            rounds.append(begun)
            if len(rounds) != 2:
                return begun
            # The engine samples the second step's prompts.
            assert not begun.parts[0].answer.done()
            begun.parts[0].engine.actor.process.process.kill()
        return begun

    trainer.generator.submit = killed
    trainer.fit()
    metrics = lines(tmp_path / "metrics.jsonl")
    assert [line["rollout/engine_restarts"] for line in metrics] == [0, 1, 0]
    # Sampled again with the newest weights, and so like in a run that does not sample ahead.
    assert max(line["rollout/logprob_difference"] for line in metrics[:2]) < 1e-4
