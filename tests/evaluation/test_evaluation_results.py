"""Results of a level are a pure function of its rows; rows wait for slow judges, in order."""

from concurrent.futures import Future

import pytest
from made_data import read_made
from small_runs import small_recipe

from nemo_care.data.decoding import DecodingWorkers
from nemo_care.data.loader import PromptLoader
from nemo_care.data.prompts import PromptBuilder
from nemo_care.data.tokenizer import load_tokenizer
from nemo_care.evaluation.build import build_evaluator
from nemo_care.evaluation.evaluator import _PENDING
from nemo_care.evaluation.judges import Verdict
from nemo_care.evaluation.results import level_results
from nemo_care.groups.batching import BatchLayout
from nemo_care.scoring.scorer import Scorer
from nemo_care.training.build import load_model


def row(accuracy, well_formed, consistent, *, task_type="", words=4, tokens=10, **more):
    return {
        "accuracy": accuracy,
        "format": well_formed,
        "consistent": consistent,
        "task_type": task_type,
        "reasoning_words": words,
        "tokens": tokens,
        **more,
    }


def test_results_of_a_level():
    rows = [
        row(1.0, 1, True, words=6, tokens=20),
        row(1.0, 1, False, words=2, tokens=10),
        row(0.5, 1, True),
        row(0.0, 1, None),
        row(1.0, 0, True, words=0, tokens=60),
    ]
    results = level_results(rows, skipped=3, judged=True)
    intervals = results.pop("intervals")
    assert {name: part["count"] for name, part in intervals.items()} == {
        "accuracy": 5,
        "consistency_rate": 3,
    }
    assert results == {
        "accuracy": 0.7,
        # Of the well-formed ones with a verdict, and of those that are right too.
        "consistency_rate": pytest.approx(2 / 3),
        "consistency_among_correct": 0.5,
        "format_rate": 0.8,
        "count": 5,
        "reasoning_words": 4.0,
        "completion_tokens": 22.0,
        "skipped": 3,
        "unjudged": 1,
    }


def test_results_by_task_type_leave_samples_without_one_out():
    rows = [
        row(1.0, 1, True, task_type="counting"),
        row(0.0, 1, False, task_type="counting"),
        row(1.0, 0, None, task_type="action"),
        row(0.0, 1, True),
    ]
    results = level_results(rows, skipped=0, judged=True)
    assert results["count"] == 4
    assert results["by_task_type"] == {
        "action": {"accuracy": 1.0, "consistency_rate": None, "format_rate": 0.0, "count": 1},
        "counting": {"accuracy": 0.5, "consistency_rate": 0.5, "format_rate": 1.0, "count": 2},
    }


def test_without_a_judge_nothing_is_unjudged_and_without_rows_nothing_has_a_value():
    results = level_results([row(1.0, 1, None)], skipped=0, judged=False)
    assert results["unjudged"] is None
    assert results["consistency_rate"] is None
    empty = level_results([], skipped=2, judged=True)
    assert (empty["count"], empty["accuracy"], empty["unjudged"]) == (0, None, 0)


def test_probe_values_are_means_over_the_samples_that_have_one():
    rows = [
        row(1.0, 1, None, probe_implied=0.25, probe_true=0.5),
        row(1.0, 1, None, probe_implied=None, probe_true=None),
        row(1.0, 1, None, probe_implied=0.75, probe_true=0.0),
    ]
    results = level_results(rows, skipped=0, judged=False)
    assert (results["probe_implied"], results["probe_true"]) == (0.5, 0.25)


def test_measures_come_with_their_count_interval_and_agreement_with_the_judge():
    def measured(answer, implied, consistent, follows, peer):
        text = f"<think> it moves </think> <answer> {answer} </answer>"
        columns = {"implied_answer": implied, "shuffle_follows": follows, "peer_probe": peer}
        return row(1.0, 1, consistent, completion=text, consistent_rule=None, **columns)

    rows = [
        measured("A", "A", True, True, 2.0),
        measured("A", "B", True, False, None),
        measured("B", None, False, None, 1.0),
        measured("C", "C", None, True, 0.0),
        # Not well-formed: in no agreement, but a prompt like any other.
        row(0.0, 0, True, implied_answer=None, shuffle_follows=True, peer_probe=5.0),
        # Asked, without an answer that could be read.
        row(1.0, 1, True, shuffle_follows=True),
    ]
    results = level_results(rows, skipped=0, judged=True)
    intervals = results["intervals"]
    assert results["implied_rate"] == 0.5
    assert results["shuffle_rate"] == 0.75
    assert results["peer_probe"] == 2.0
    assert results["consistency_rate_rule"] is None
    assert "probe_implied" not in results
    assert "consistency_rate_likelihood" not in intervals
    implied, shuffle = intervals["implied_rate"], intervals["shuffle_rate"]
    assert (implied["count"], implied["agreement"]) == (4, pytest.approx(2 / 3))
    assert (shuffle["count"], shuffle["agreement"]) == (4, pytest.approx(2 / 3))
    assert intervals["peer_probe"]["count"] == 4
    assert 0 <= intervals["peer_probe"]["low"] < 2 < intervals["peer_probe"]["high"] <= 5
    rule = {"count": 0, "low": None, "high": None, "agreement": None}
    assert intervals["consistency_rate_rule"] == rule


class LateVerdict(Future):
    """Is not there until somebody waits for it."""

    def __init__(self, judge, verdict):
        super().__init__()
        self.judge, self.verdict = judge, verdict

    def done(self):
        return False

    def result(self, timeout=None):
        self.judge.outstanding -= 1
        return self.verdict


class SlowJudge:
    """Stands in for the language model, with verdicts that are always late."""

    def __init__(self, config, cache):
        self.config, self.cache, self.closed = config, cache, False
        self.asked, self.outstanding, self.most_outstanding = [], 0, 0
        SlowJudge.made = self

    def submit(self, sample, completion) -> Future:
        self.asked.append(sample.sample_id)
        self.outstanding += 1
        self.most_outstanding = max(self.most_outstanding, self.outstanding)
        number = len(self.asked)
        reply = {"judge_reply": f"{number}: {completion}"}
        return LateVerdict(self, Verdict(number % 3 != 0, reply))

    def close(self):
        self.closed = True


@pytest.fixture
def llm_judge(monkeypatch):
    """A language model that needs no endpoint."""
    monkeypatch.setattr("nemo_care.evaluation.leader_judge.LLMJudge", SlowJudge)


def test_rows_come_in_order_while_a_slow_judge_lags_behind(
    checkpoint, world, ranks, tmp_path, llm_judge
):
    recipe = small_recipe(checkpoint, world)
    recipe.evaluation.judge, recipe.evaluation.samples_per_batch = "llm", 2
    model = load_model(recipe, ranks)
    tokenizer = load_tokenizer(checkpoint, model.family.prompt)
    layout = BatchLayout.of(ranks.layout, 1, tokenizer.pad_id, shared_prompt=True)
    workers = DecodingWorkers.of(recipe.data, leads=True)
    evaluator = build_evaluator(
        recipe,
        ranks,
        Scorer(model, ranks, layout),
        PromptLoader(PromptBuilder(recipe.data, model.family.prompt, tokenizer), workers),
        likelihoods=None,
        folder=tmp_path,
    )
    samples = read_made(world, "train.jsonl").samples[:20]
    rows = [row for batch in evaluator.run(samples, done={0, 1, 5}) for row in batch.rows]
    evaluator.close()

    indices = [2, 3, 4, *range(6, 20)]
    assert [row["index"] for row in rows] == indices
    judge = SlowJudge.made
    assert judge.asked == [samples[index].sample_id for index in indices]
    for number, judged in enumerate(rows, start=1):
        assert judged["consistent"] is (number % 3 != 0)
        assert judged["judge_reply"] == f"{number}: {judged['completion']}"
    assert judge.most_outstanding == 2 * (_PENDING + 1)
    assert judge.cache == tmp_path / "llm_judge.sqlite"
    assert judge.closed
