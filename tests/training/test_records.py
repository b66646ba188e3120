"""Records of completions: what the model was asked and saw, and what each completion is worth."""

import json
import math

import pytest
import torch
from made_groups import make_groups, make_prompts
from small_runs import small_recipe, small_trainer

from nemo_care.data.tokenizer import load_tokenizer
from nemo_care.models.families import read_family
from nemo_care.training.records import completion_rows


@pytest.fixture(scope="module")
def groups(checkpoint, world, tmp_path_factory):
    made = make_groups(
        make_prompts(checkpoint, world, tmp_path_factory.mktemp("images")), checkpoint
    )
    for group in made:
        group.answer_likelihood = torch.tensor([0.25, 0.5, 0.75, math.nan])
        group.consistency_bonus = torch.zeros(4)
        group.reward = group.base_reward
        group.advantage = torch.tensor([1.0, 0.5, -0.5, -1.0])
    return made


def test_a_record_holds_the_question_and_what_the_model_saw(groups):
    rows = completion_rows(groups, "rule")
    first, mixed, text = rows[0], rows[8], rows[12]
    sample = groups[0].prompt.sample
    assert first["question"] == sample.question
    assert first["options"] == dict(sample.options)
    assert first["solution"] == sample.solution
    assert first["problem_type"] == "multiple choice"
    assert first["videos"] == [str(sample.videos[0])]
    # The miniature's videos have 8 frames at 2 per second, and the model sees all of them.
    assert first["frame_times"] == [[0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5]]
    assert len(rows[4]["frame_times"]) == len(rows[4]["videos"]) == 2
    assert mixed["images"] == [str(groups[2].prompt.sample.images[0])]
    assert text["videos"] == text["images"] == text["frame_times"] == []
    assert (first["answer_likelihood"], first["advantage"]) == (0.25, 1.0)
    assert "token_texts" not in first
    assert "pair_likelihood" not in first
    # Every row is JSON without NaN.
    json.dumps(rows, allow_nan=False)


def test_pair_likelihoods_are_recorded_by_answer(groups):
    groups[0].pair_likelihood = torch.tensor([[0.5, 0.25, math.nan, 0.1]] * 4)
    rows = completion_rows(groups, "rule")
    groups[0].pair_likelihood = None
    assert rows[0]["pair_likelihood"] == [0.5, 0.25, None, 0.1]
    assert "pair_likelihood" not in rows[4]


def test_tokens_are_recorded_with_a_tokenizer_only(groups, checkpoint):
    completion = groups[0].completions[0]
    completion.log_probs = torch.tensor([-math.inf, *[-0.5] * (completion.length - 1)])
    rows = completion_rows(
        groups, "rule", load_tokenizer(checkpoint, read_family(checkpoint).prompt)
    )
    for row, completion in zip(rows[:4], groups[0].completions, strict=True):
        assert len(row["token_texts"]) == len(row["log_probs"]) == completion.length
        assert "".join(row["token_texts"]).startswith(row["completion"])
    assert "".join(rows[0]["token_texts"]).endswith("<|im_end|>")
    assert rows[0]["log_probs"][:2] == [None, -0.5]


def test_rollout_record_log_probs_changes_no_number_of_a_run(checkpoint, world, ranks, tmp_path):
    metrics, rollouts = [], []
    for tokens in (False, True):
        recipe = small_recipe(checkpoint, world)
        recipe.trainer.max_steps = 1
        recipe.data.validation.annotations = None
        recipe.rollout.record_log_probs = tokens
        folder = tmp_path / str(tokens)
        small_trainer(recipe, ranks, folder, saves=False).fit()
        (record,) = map(json.loads, (folder / "metrics.jsonl").open())
        metrics.append(
            {k: v for k, v in record.items() if not k.startswith(("timing/", "memory/"))}
        )
        rollouts.append(
            [json.loads(line) for line in (folder / "rollouts/step_000001.jsonl").open()]
        )
    plain, with_tokens = rollouts
    assert metrics[0] == metrics[1]
    assert {key for row in with_tokens for key in row} - {key for row in plain for key in row} == {
        "token_texts",
        "log_probs",
    }
    for one, other in zip(plain, with_tokens, strict=True):
        assert one == {key: other[key] for key in one}
        assert len(other["log_probs"]) == one["tokens"]
