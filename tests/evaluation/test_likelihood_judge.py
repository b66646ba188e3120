"""The likelihood judge: exact splicing, the reference's own numbers, and verdicts by them."""

import math

import pytest
import torch
from golden import hf_model, log_probs
from made_groups import make_groups, make_prompts
from made_tokenizers import TOKENIZERS
from made_verdicts import SimplePrompt, completion_of, verdicts_of
from small_runs import small_recipe

from nemo_care.data.samples import Sample
from nemo_care.data.tokenizer import ChatTokenizer, load_tokenizer
from nemo_care.evaluation.likelihood_judge import LikelihoodJudge
from nemo_care.groups.batching import BatchLayout
from nemo_care.groups.group import Group
from nemo_care.models.families import read_family
from nemo_care.scoring.scorer import Scorer
from nemo_care.training.build import load_model

pytestmark = pytest.mark.numeric

OPTIONS = {"A": "left", "B": "right", "C": "up", "D": "down"}


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return load_tokenizer(checkpoint, read_family(checkpoint).prompt)


@pytest.fixture(scope="module")
def judge(checkpoint, world, ranks, tokenizer):
    layout = BatchLayout.of(ranks.layout, 2, tokenizer.pad_id, shared_prompt=True)
    scorer = Scorer(load_model(small_recipe(checkpoint, world), ranks), ranks, layout)
    return LikelihoodJudge(scorer.answer_likelihoods, tokenizer)


@pytest.fixture
def groups(checkpoint, world, tmp_path):
    """Groups of one completion each, about videos and images, with the options of the first."""
    made = make_groups(make_prompts(checkpoint, world, tmp_path), checkpoint)
    options = made[0].prompt.sample.options
    for group in made:
        object.__setattr__(group.prompt.sample, "options", options)
    return [Group(group.prompt, [completion]) for group in made for completion in group.completions]


def test_likelihoods_equal_hugging_face_teacher_forcing_of_whole_completions(
    judge, groups, checkpoint, tokenizer
):
    model, scored = hf_model(checkpoint), 0
    for group, verdict in zip(groups, verdicts_of(judge, groups), strict=True):
        text = group.completions[0].text
        if "option_likelihoods" not in verdict.details:
            assert "<answer>" not in text
            continue
        wanted = {}
        reasoning, given = text.split("<answer>")[0], text.split("<answer>")[1].split()[0]
        for letter in group.prompt.sample.options:
            ids = tokenizer.encode(f"{reasoning}<answer> {letter} </answer> <|im_end|>")
            made = completion_of(tokenizer, ids)
            with torch.no_grad():
                answer = log_probs(model, group.prompt, made)[slice(*made.answer_span)]
            wanted[letter] = math.exp(answer.mean())
        assert verdict.details["option_likelihoods"] == pytest.approx(wanted, abs=1e-5)
        assert verdict.consistent is (max(wanted, key=wanted.get) == given)
        scored += 1
    assert scored == 12


def test_another_answer_behind_the_same_reasoning_turns_the_verdict(judge, groups, tokenizer):
    group = next(group for group in groups if group.completions[0].answer_span)
    (first,) = verdicts_of(judge, [group])
    likelihoods = first.details["option_likelihoods"]
    likeliest = max(likelihoods, key=likelihoods.get)
    for letter, spliced in judge.with_options(group).items():
        closed = [*spliced.token_ids.tolist(), *tokenizer.encode("</answer> <|im_end|>")]
        (verdict,) = verdicts_of(judge, [Group(group.prompt, [completion_of(tokenizer, closed)])])
        assert verdict.consistent is (letter == likeliest)
        assert verdict.details["option_likelihoods"] == pytest.approx(likelihoods, abs=1e-6)


# Qwen's tokenizer is one of bytes; one that puts a blank before every text can't be spliced.
@pytest.mark.parametrize("name", sorted(set(TOKENIZERS) - {"metaspace"}))
def test_the_letter_alone_is_replaced_in_the_sampled_tokens(name):
    base = TOKENIZERS[name]
    tokenizer = ChatTokenizer(base, frozenset([base.eos_token_id]), base.eos_token_id)
    judge = LikelihoodJudge(lambda groups: [], tokenizer)
    text = "<think>d op</think>\n<answer> B</answer>"
    # Not as the tokenizer would cut it: sampled tokens need not be.
    ids = [*tokenizer.encode(text[:8]), *tokenizer.encode(text[8:])]
    given = completion_of(tokenizer, ids)
    group = Group(SimplePrompt(Sample("1", "?", "A", options=OPTIONS)), [given])
    start, end = given.answer_span
    made_of = judge.with_options(group)
    assert list(made_of) == list(OPTIONS)
    assert made_of["B"].token_ids.tolist() == ids[:end]
    assert made_of["B"].answer_span == given.answer_span
    for letter in "AC":
        made = made_of[letter]
        assert made.token_ids[:start].tolist() == ids[:start]
        assert made.answer_span == (start, len(made.token_ids))
        wanted = base.decode(ids[:end]).removesuffix("B") + letter
        assert base.decode(made.token_ids.tolist()) == wanted


@pytest.mark.parametrize(
    ("answer", "options", "consistent", "note"),
    [
        ("<answer> E </answer>", OPTIONS, False, "none of the options"),
        ("<answer> it moves up </answer>", OPTIONS, False, "none of the options"),
        ("", OPTIONS, False, "no answer"),
        ("<answer> B </answer>", {}, None, "no options"),
    ],
)
def test_without_options_to_compare_nothing_is_scored(tokenizer, answer, options, consistent, note):
    def unexpected(groups):
        assert not groups
        return []

    sample = Sample("1", "?", "B", options=options)
    ids = tokenizer.encode(f"<think> it moves right </think> {answer} <|im_end|>")
    group = Group(SimplePrompt(sample), [completion_of(tokenizer, ids)])
    (verdict,) = verdicts_of(LikelihoodJudge(unexpected, tokenizer), [group])
    assert verdict.consistent is consistent
    assert note in verdict.details["judge_note"]


def test_likelihoods_that_are_no_numbers_stop_the_judge(groups, tokenizer):
    broken = LikelihoodJudge(lambda groups: [torch.full((4,), math.nan)] * len(groups), tokenizer)
    with pytest.raises(RuntimeError, match="not numbers"):
        broken.judge(groups)
