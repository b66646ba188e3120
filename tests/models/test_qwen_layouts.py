"""Packed groups, answer pairs and a whole run of a tiny model with Qwen's real vocabulary."""

import itertools
import json
import math

import pytest
import torch
from golden import hf_model, log_probs
from made_data import read_made
from qwen_checkpoint import COMPLETIONS, qwen_recipe, write_qwen_checkpoint
from small_runs import small_trainer

from nemo_care.data.prompts import PromptBuilder
from nemo_care.data.tokenizer import load_tokenizer
from nemo_care.groups.answer_span import find_answer_tokens
from nemo_care.groups.batching import BatchLayout
from nemo_care.groups.group import Completion, Group
from nemo_care.models.families import read_family
from nemo_care.objective.text import find_answer
from nemo_care.rollouts.completions import completion_of
from nemo_care.scoring.scorer import Scorer
from nemo_care.training.build import load_model

# Answers whose first token holds the end of the tag, and such whose does not; white space of
# several kinds; answers that share their first token; one merged with `</`; an empty one, none.
INNER = [
    "B",
    " C",
    "A",
    "7",
    "No",
    "\nAdd milk",
    "Add milk",
    "Add sugar.",
    "42",
    "你好",
    "🙂",
    "",
    None,
]
REASONING = ["", "<think>left</think>\n", "<think>it goes up.</think>", "<think>so</think> "]


@pytest.fixture(scope="module")
def untaught(tmp_path_factory, world):
    """A random model, whose completions say nothing."""
    folder = tmp_path_factory.mktemp("qwen")
    write_qwen_checkpoint(folder, world, steps=0)
    return folder


@pytest.fixture(scope="module")
def groups(untaught, world):
    """Two groups about videos with all of these answers."""
    prompt_format = read_family(untaught).prompt
    tokenizer = load_tokenizer(untaught, prompt_format)
    builder = PromptBuilder(qwen_recipe(untaught, world).data, prompt_format, tokenizer)
    made = []
    for index, sample in enumerate(read_made(world, "train.jsonl").samples[:2]):
        texts = [
            f"{reasoning}<answer>{inner}</answer><|im_end|>"
            if inner is not None
            else reasoning + "B"
            for inner, reasoning in zip(
                INNER, itertools.cycle(REASONING[index:] + REASONING[:index])
            )
        ]
        ids = [torch.tensor(tokenizer.encode(text)) for text in texts]
        completions = [completion_of(row, torch.zeros(len(row)), tokenizer) for row in ids]
        made.append(Group(builder.build(index, sample), completions))
    return made


def scorer(untaught, world, ranks, *, shared_prompt):
    layout = BatchLayout.of(ranks.layout, 2, pad_id=151643, shared_prompt=shared_prompt)
    return Scorer(load_model(qwen_recipe(untaught, world), ranks), ranks, layout)


def hugging_face(model, prompt, completion: Completion) -> float:
    """Likelihood of a completion's answer by teacher forcing."""
    if completion.answer_span is None:
        return math.nan
    with torch.no_grad():
        chosen = log_probs(model, prompt, completion)[slice(*completion.answer_span)]
    return math.exp(chosen.mean().item())


def placed(tokenizer, giver: Completion, reasoner: Completion) -> Completion | None:
    """The giver's answer after the reasoner's reasoning, by characters: cut where a token of both
    begins, as far back in the opening tag as need be."""

    def begins(completion):
        ids = completion.token_ids.tolist()
        lengths = [len(tokenizer.base.decode(ids[:n])) for n in range(len(ids))]
        tag = find_answer(completion.text)[0]
        return {length - tag: n for n, length in enumerate(lengths) if -8 <= length - tag <= 0}

    given, own = begins(giver), begins(reasoner)
    cut = max(given.keys() & own.keys())
    ids = torch.cat([reasoner.token_ids[: own[cut]], giver.token_ids[given[cut] :]])
    found = find_answer_tokens(tokenizer.base, ids)
    text = tokenizer.base.decode(ids)
    head = reasoner.text[: find_answer(reasoner.text)[0]]
    assert text == head + giver.text[find_answer(giver.text)[0] :] + "<|im_end|>"
    return Completion(ids, torch.zeros(len(ids)), text, True, found.span)


def test_likelihoods_equal_hugging_face_s_in_both_layouts(untaught, world, ranks, groups):
    model = hf_model(untaught)
    wanted = [
        torch.tensor([hugging_face(model, group.prompt, c) for c in group.completions])
        for group in groups
    ]
    assert [int(p.isnan().sum()) for p in wanted] == [2, 2]
    for shared_prompt in (True, False):
        ours = scorer(untaught, world, ranks, shared_prompt=shared_prompt).answer_likelihoods(
            groups
        )
        torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-4, equal_nan=True)


def test_every_answer_follows_every_reasoning_as_one_text(untaught, world, ranks, groups):
    model, tokenizer = hf_model(untaught), load_tokenizer(untaught, read_family(untaught).prompt)
    tables = scorer(untaught, world, ranks, shared_prompt=True).pair_likelihoods(groups)
    for group, table in zip(groups, tables, strict=True):
        answered = [i for i, c in enumerate(group.completions) if c.answer_span]
        assert len(answered) == len(INNER) - 2
        known = torch.zeros(group.size, group.size, dtype=torch.bool)
        known[[[i] for i in answered], answered] = True
        assert torch.equal(~table.isnan(), known)
        # Each answer after its own reasoning, and after each kind of reasoning.
        kinds = [range(start, start + len(REASONING)) for start in (0, len(REASONING))]
        for i in answered:
            for j in {i, *kinds[i % 2]}:
                pair = placed(tokenizer, group.completions[i], group.completions[j])
                wanted = hugging_face(model, group.prompt, pair)
                assert table[i, j].item() == pytest.approx(wanted, abs=1e-5, rel=1e-4), (i, j)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["group", "counterfactual"])
def test_a_run_with_the_real_vocabulary_gets_bonuses(kind, world, ranks, tmp_path):
    checkpoint = tmp_path / "qwen"
    write_qwen_checkpoint(checkpoint, world)
    recipe = qwen_recipe(checkpoint, world)
    recipe.algorithm.consistency.kind = kind
    recipe.trainer.max_steps = 3
    small_trainer(recipe, ranks, tmp_path / "run").fit()
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    rows = [
        json.loads(line)
        for step in (1, 2, 3)
        for line in (tmp_path / "run" / "rollouts" / f"step_{step:06d}.jsonl").open()
    ]
    assert len(metrics) == 3
    assert all(m["care/missing_answer_rate"] <= 0.2 for m in metrics)
    assert all(m["care/unscored_answer_rate"] == 0 for m in metrics)
    assert metrics[0]["care/bonus_rate"] > 0
    written = {text.removesuffix("<|im_end|>") for text in COMPLETIONS}
    assert sum(row["completion"] in written for row in rows) > len(rows) / 2
    for row in rows:
        assert (row["answer_likelihood"] is not None) == row["has_answer"]
        if kind == "group":
            assert (row["bonus"] > 0) <= (row["accuracy"] == 1)
    assert any(row["bonus"] > 0 for row in rows)
