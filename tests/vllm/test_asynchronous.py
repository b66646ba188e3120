"""Asynchronous rollouts with a real engine."""

import pytest
from records import lines

pytestmark = pytest.mark.vllm


@pytest.fixture
def make(checkpoint, world, ranks, tmp_path):
    """Makes trainers whose engine is ahead of them, and ends the engines."""
    from small_runs import small_recipe, small_trainer

    recipe = small_recipe(checkpoint, world)
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

    def make(steps=3, max_staleness=1):
        recipe.trainer.max_steps = steps
        recipe.rollout.max_staleness = max_staleness
        made.append(small_trainer(recipe, ranks, tmp_path))
        return made[-1]

    yield make
    for trainer in made:
        trainer.generator.close()


def texts_of_steps(trainer, *numbers):
    """By step, its prompts' completions from the present weights."""
    steps = [trainer.prompts.next_step()[0] for _ in range(max(numbers))]
    found = {
        number: sorted(
            (group.prompt.index, place, completion.text)
            for group in trainer.rollouts.generate(steps[number - 1])
            for place, completion in enumerate(group.completions)
        )
        for number in numbers
    }
    trainer.prompts.position = 0
    return found


def written_texts(folder, number):
    rows = lines(folder / "rollouts" / f"step_{number:06d}.jsonl")
    return sorted((row["prompt_index"], row["completion_index"], row["completion"]) for row in rows)


def test_steps_are_trained_while_the_next_one_is_sampled(make, tmp_path):
    trainer = make()
    wanted = texts_of_steps(trainer, 2)
    trainer.fit()
    metrics = lines(tmp_path / "metrics.jsonl")
    assert [line["rollout/staleness"] for line in metrics] == [0, 1, 1]
    differences = [line["rollout/logprob_difference"] for line in metrics]
    print(f"differences of log-probabilities: {differences}")
    assert differences[0] < 1e-4
    # The others tell of an update; and the second step's completions are from before the first.
    assert min(differences[1:]) > 10 * differences[0]
    assert written_texts(tmp_path, 2) == wanted[2]
    # In between it has validated with newer weights.
    assert [record["step"] for record in lines(tmp_path / "validation.jsonl")] == [0, 2, 3]


def test_an_engine_that_is_two_steps_ahead_samples_both_with_the_same_weights(make, tmp_path):
    trainer = make(steps=4, max_staleness=2)
    initial = texts_of_steps(trainer, 2, 3, 4)
    trainer.fit()
    metrics = lines(tmp_path / "metrics.jsonl")
    assert [line["rollout/staleness"] for line in metrics] == [0, 1, 2, 1]
    differences = [
        line[f"rollout/logprob_difference_stale_{staleness}"]
        for line, staleness in zip(metrics, (0, 1, 2, 1), strict=True)
    ]
    print(f"differences of log-probabilities: {differences}")
    assert differences[0] < 1e-4
    assert min(differences[1:]) > 10 * differences[0]
    # Two updates move the policy further than one.
    assert differences[2] > differences[1]
    for step in (2, 3):
        assert written_texts(tmp_path, step) == initial[step]
    # Before the fourth step the engine received the weights of two updates.
    assert written_texts(tmp_path, 4) != initial[4]


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
