"""Measures of consistency against plain Hugging Face, loops, and questions shuffled by hand."""

import math
import statistics
from dataclasses import replace

import pytest
import torch
from golden import hf_model, log_probs
from made_groups import make_groups, make_prompts
from small_runs import small_recipe

from nemo_care.data.option_shuffle import with_shuffled_options
from nemo_care.data.prompts import PromptBuilder
from nemo_care.data.samples import Sample
from nemo_care.data.tokenizer import load_tokenizer
from nemo_care.evaluation.likelihood_judge import LikelihoodJudge
from nemo_care.evaluation.measures import OptionShuffle, PeerProbe
from nemo_care.groups.answer_span import answer_token_span
from nemo_care.groups.batching import BatchLayout
from nemo_care.groups.group import Completion, Group
from nemo_care.models.families import read_family
from nemo_care.objective.consistency import peer_dependence
from nemo_care.objective.statistics import bootstrap_interval
from nemo_care.objective.text import extract_answer
from nemo_care.scoring.scorer import Scorer
from nemo_care.training.build import load_model

pytestmark = pytest.mark.numeric

OPTIONS = {"A": "left", "B": "right", "C": "up", "D": "down"}


@pytest.mark.parametrize(
    "listing",
    [
        "A left B right C up D down",
        "A. left\nB. right\nC. up\nD. down",
        "(A) left, (B) right, (C) up, (D) down",
    ],
)
def test_shuffled_options_keep_their_letters_places_and_change_their_texts(listing):
    shifts = set()
    for number in range(12):
        sample = Sample(str(number), f"which way ? {listing} .", "B", options=OPTIONS)
        made = with_shuffled_options(sample)
        assert list(made.options) == list(OPTIONS)
        assert sorted(made.options.values()) == sorted(OPTIONS.values())
        assert all(made.options[letter] != text for letter, text in OPTIONS.items())
        assert made.options[made.solution] == "right"
        wanted = listing
        for letter, text in OPTIONS.items():
            wanted = wanted.replace(text, f"<{letter}>")
        for letter, text in made.options.items():
            wanted = wanted.replace(f"<{letter}>", text)
        assert made.question == f"which way ? {wanted} ."
        shifts.add(made.solution)
        assert with_shuffled_options(sample) == made
    assert shifts == {"A", "C", "D"}


def test_a_question_that_lists_no_options_stays_as_it_is():
    question = "Does a left turn or A right one come first?"
    options = {"A": "a left turn", "B": "a right turn"}
    made = with_shuffled_options(Sample("1", question, "A", options=options))
    assert made.question == question
    assert made.options == {"A": "a right turn", "B": "a left turn"}
    assert made.solution == "B"


@pytest.fixture(scope="module")
def model(checkpoint):
    return hf_model(checkpoint)


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return load_tokenizer(checkpoint, read_family(checkpoint).prompt)


@pytest.fixture(scope="module")
def scorer(checkpoint, world, ranks, tokenizer):
    layout = BatchLayout.of(ranks.layout, 2, tokenizer.pad_id, shared_prompt=True)
    return Scorer(load_model(small_recipe(checkpoint, world), ranks), ranks, layout)


@pytest.fixture(scope="module")
def groups(checkpoint, world, tmp_path_factory):
    """Four completions each of questions with options, about a video, two, and an image."""
    folder = tmp_path_factory.mktemp("measures")
    made = make_groups(make_prompts(checkpoint, world, folder), checkpoint)[:3]
    for group in made:
        listing = group.prompt.sample.question.partition("A ")[2].split()
        options = dict(zip("ABCD", listing[::2], strict=False))
        group.prompt.sample = replace(group.prompt.sample, options=options)
    return made


def spliced(tokenizer, text: str, letter: str) -> Completion:
    """The text up to its answer, with the letter as the answer."""
    ids = tokenizer.encode(f"{text.split('<answer>')[0]}<answer> {letter} </answer> <|im_end|>")
    span = answer_token_span(tokenizer.base, ids)
    return Completion(torch.tensor(ids), torch.zeros(len(ids)), "", True, span)


def answer_log_prob(model, prompt, completion: Completion) -> float:
    with torch.no_grad():
        return float(log_probs(model, prompt, completion)[slice(*completion.answer_span)].mean())


def test_option_shuffle_equals_hugging_face_on_a_prompt_that_was_built_anew(
    checkpoint, world, model, tokenizer, scorer, groups
):
    builder = PromptBuilder(
        small_recipe(checkpoint, world).data, read_family(checkpoint).prompt, tokenizer
    )
    measure = OptionShuffle(LikelihoodJudge(scorer.answer_likelihoods, tokenizer), builder)
    single = [Group(group.prompt, [c]) for group in groups for c in group.completions]
    rows = measure(single)
    seen = set()
    for group, row in zip(single, rows, strict=True):
        sample, text = group.prompt.sample, group.completions[0].text
        answer = extract_answer(text)
        if answer is None:
            assert row == {"shuffle_follows": None}
            continue
        prompt = builder.build(0, with_shuffled_options(sample))
        assert not torch.equal(prompt.token_ids, group.prompt.token_ids)
        likelihood = {
            letter: answer_log_prob(model, prompt, spliced(tokenizer, text, letter))
            for letter in prompt.sample.options
        }
        second = max(likelihood, key=likelihood.get)
        follows = prompt.sample.options[second] == sample.options[answer]
        assert row == {"shuffle_follows": follows}
        seen.add(follows)
    assert seen == {True, False}


def test_prompts_that_do_not_show_the_options_are_not_measured(
    checkpoint, world, model, tokenizer, scorer, groups
):
    builder = PromptBuilder(
        small_recipe(checkpoint, world).data, read_family(checkpoint).prompt, tokenizer
    )
    measure = OptionShuffle(LikelihoodJudge(scorer.answer_likelihoods, tokenizer), builder)
    sample = replace(groups[0].prompt.sample, question="which way does the disc move ?")
    hidden = builder.with_text_of(groups[0].prompt, sample)
    open_question = builder.with_text_of(groups[0].prompt, replace(sample, options={}))
    rows = measure([Group(p, groups[0].completions[:1]) for p in (hidden, open_question)])
    assert rows == [{"shuffle_follows": None}] * 2


class Given:
    """A generator of given completions."""

    def __init__(self, groups):
        self.groups = groups

    def generate(self, prompts, sampling):
        made = {id(group.prompt): group for group in self.groups}
        return [made[id(prompt)] for prompt in prompts]


def test_peer_probe_equals_hugging_face_over_pairs_with_different_answers(
    model, tokenizer, scorer, groups
):
    asked = [Group(group.prompt, group.completions[:1]) for group in groups]
    open_question = replace(groups[0].prompt, sample=replace(groups[0].prompt.sample, options={}))
    asked.append(Group(open_question, groups[0].completions[:1]))
    rows = PeerProbe(Given(groups), scorer, sampling=None)(asked)
    for group, row in zip(groups, rows, strict=False):
        gains = []
        for own in group.completions:
            for peer in group.completions:
                answer, other = extract_answer(own.text), extract_answer(peer.text)
                if answer is None or other is None or answer == other:
                    continue
                values = [
                    max(-5.0, answer_log_prob(model, group.prompt, spliced(tokenizer, t, answer)))
                    for t in (own.text, peer.text)
                ]
                gains.append(values[0] - values[1])
        assert gains
        assert row["peer_probe"] == pytest.approx(statistics.fmean(gains), abs=1e-4)
    assert rows[-1] == {"peer_probe": None}


def test_peer_dependence_is_zero_without_dependence_and_bounded_with_it():
    answers = ["A", "B", None, "A"]
    nothing = [math.nan] * 4
    alone = torch.tensor([[0.5] * 4, [0.25] * 4, nothing, [0.5] * 4])
    alone[:, 2] = math.nan
    assert peer_dependence(alone, answers) == 0
    follows = torch.eye(4)
    follows[2] = follows[:, 2] = math.nan
    assert peer_dependence(follows, answers) == 5
    assert peer_dependence(alone, ["A", "A", None, "A"]) is None
    assert peer_dependence(alone, [None] * 4) is None


def test_the_bootstrap_interval_is_that_of_a_mean():
    draw = torch.Generator().manual_seed(0)
    values = (torch.rand(400, generator=draw) < 0.3).double().tolist()
    mean = statistics.fmean(values)
    half = 1.96 * statistics.stdev(values) / math.sqrt(len(values))
    low, high = bootstrap_interval(values)
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.1 * half)
    assert bootstrap_interval(values) == (low, high)
    assert bootstrap_interval([1.0] * 5) == (1.0, 1.0)
    assert bootstrap_interval([]) is None
