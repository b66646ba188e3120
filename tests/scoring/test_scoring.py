"""The fused scoring pass: the same numbers as the simple way, and no work that is not needed."""

import dataclasses
import math

import pytest
import torch
from bad_numbers import broken
from made_groups import make_groups, make_prompts
from small_runs import small_recipe, small_trainer

from nemo_care.groups.batching import BatchLayout
from nemo_care.groups.group import Completion, Group
from nemo_care.objective.consistency import counterfactual_bonus
from nemo_care.scoring.scorer import Scorer
from nemo_care.training.finite import reference_is_finite

pytestmark = pytest.mark.numeric


@pytest.fixture(scope="module")
def trainer(checkpoint, world, ranks, tmp_path_factory):
    return small_trainer(small_recipe(checkpoint, world), ranks, tmp_path_factory.mktemp("run"))


@pytest.fixture
def groups(checkpoint, world, tmp_path):
    return make_groups(make_prompts(checkpoint, world, tmp_path), checkpoint)


def scorer(trainer, *, shared_prompt: bool) -> Scorer:
    layout = BatchLayout.of(trainer.ranks.layout, 3, pad_id=0, shared_prompt=shared_prompt)
    return Scorer(trainer.policy.model, trainer.ranks, layout)


def test_likelihoods_equal_those_of_separate_sequences(trainer, groups):
    ours = scorer(trainer, shared_prompt=True).answer_likelihoods(groups)
    wanted = scorer(trainer, shared_prompt=False).answer_likelihoods(groups)
    assert any(p.isnan().any() for p in ours)
    torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-5, equal_nan=True)


def test_vision_runs_once_per_group_and_the_output_layer_on_answers_only(
    trainer, groups, monkeypatch
):
    model = trainer.policy.model
    patches, rows = [], []
    tower, log_probs = model.visual.forward, model.token_log_probs
    monkeypatch.setattr(
        model.visual,
        "forward",
        lambda pixels, **more: patches.append(len(pixels)) or tower(pixels, **more),
    )
    monkeypatch.setattr(
        model,
        "token_log_probs",
        lambda hidden, places, ids: rows.append(len(ids)) or log_probs(hidden, places, ids),
    )
    scorer(trainer, shared_prompt=True).answer_likelihoods(groups)
    prompts = [group.prompt for group in groups]
    grids = [p.grid_thw for p in prompts if p.grid_thw is not None]
    assert sum(patches) == int(torch.cat(grids).prod(dim=1).sum())
    answers = [c.answer_span for group in groups for c in group.completions if c.answer_span]
    assert sum(rows) == sum(end - start for start, end in answers)
    assert sum(rows) < sum(c.length for group in groups for c in group.completions) / 10


def spliced(group: Group) -> list[tuple[int, int, Completion]]:
    """Every answer behind every reasoning as a completion of its own, with its pair."""
    made = []
    for i, giver in enumerate(group.completions):
        for j, reasoner in enumerate(group.completions):
            if giver.answer_span is None or reasoner.answer_span is None:
                continue
            answer = giver.token_ids[slice(*giver.answer_span)]
            begin = reasoner.answer_span[0]
            ids = torch.cat([reasoner.token_ids[:begin], answer])
            span = (begin, begin + len(answer))
            made.append((i, j, Completion(ids, torch.zeros(len(ids)), "", False, span)))
    return made


def with_long_answers(groups: list[Group]) -> list[Group]:
    """The same completions, their answers spans of one to four tokens."""
    for group in groups:
        for number, completion in enumerate(group.completions):
            if completion.answer_span is not None:
                start = completion.answer_span[0] - number
                group.completions[number] = dataclasses.replace(
                    completion, answer_span=(start, completion.answer_span[1])
                )
    return groups


@pytest.mark.parametrize("long_answers", [False, True])
def test_every_answer_behind_every_reasoning(trainer, groups, long_answers):
    groups = with_long_answers(groups) if long_answers else groups
    tables = scorer(trainer, shared_prompt=True).pair_likelihoods(groups)
    simple = scorer(trainer, shared_prompt=False)
    for group, table in zip(groups, tables, strict=True):
        pairs = spliced(group)
        (wanted,) = simple.answer_likelihoods([Group(group.prompt, [c for _, _, c in pairs])])
        expected = torch.full((group.size, group.size), math.nan)
        for (i, j, _), likelihood in zip(pairs, wanted, strict=True):
            expected[i, j] = likelihood
        torch.testing.assert_close(table, expected, atol=1e-5, rtol=1e-5, equal_nan=True)
        (own,) = scorer(trainer, shared_prompt=True).answer_likelihoods([group])
        torch.testing.assert_close(table.diagonal(), own, atol=1e-6, rtol=1e-5, equal_nan=True)
        # The reasoning matters: an answer is not as likely behind each of them.
        known = table[~table.isnan().all(dim=1)]
        assert (known.nan_to_num(0).amax(dim=1) - known.nan_to_num(2).amin(dim=1)).max() > 0.01


@pytest.mark.parametrize("kl_coefficient", [0.0, 0.04])
def test_counterfactual_bonus_comes_out_of_the_one_scoring_pass(
    checkpoint, world, ranks, tmp_path, groups, kl_coefficient
):
    made = []
    for kind in ("group", "counterfactual"):
        recipe = small_recipe(checkpoint, world)
        recipe.algorithm.kl_coefficient = kl_coefficient
        recipe.algorithm.consistency.kind = kind
        made.append(small_trainer(recipe, ranks, tmp_path / kind))
    trainer, counterfactual = made
    groups = with_long_answers(groups)
    trainer.reference.score_answers(groups)
    trainer.credit(groups)
    before = [(group.answer_likelihood, group.reference_log_probs) for group in groups]
    counterfactual.reference.score_answers(groups)
    counterfactual.credit(groups)
    tables = scorer(trainer, shared_prompt=True).pair_likelihoods(groups)
    for group, (likelihood, log_probs), table in zip(groups, before, tables, strict=True):
        expected = counterfactual_bonus(table[None])[0]
        assert expected.abs().max() > 0
        torch.testing.assert_close(group.consistency_bonus, expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(group.reward, group.base_reward + group.consistency_bonus)
        # The answers placed behind other reasonings change nothing for the others.
        torch.testing.assert_close(
            group.answer_likelihood, likelihood, atol=1e-5, rtol=1e-5, equal_nan=True
        )
        torch.testing.assert_close(
            group.reference_log_probs, log_probs, atol=1e-5, rtol=1e-5, equal_nan=True
        )


def test_groups_of_unequal_size_and_without_answers_share_a_batch(trainer, groups):
    del groups[0].completions[1:]
    del groups[2].completions[:1]
    groups[1].completions = [
        dataclasses.replace(completion, answer_span=None) for completion in groups[1].completions
    ]
    one_batch = [
        Scorer(
            trainer.policy.model,
            trainer.ranks,
            BatchLayout.of(trainer.ranks.layout, 4, pad_id=0, shared_prompt=shared),
        )
        for shared in (True, False)
    ]
    ours, wanted = (scorer.answer_likelihoods(groups) for scorer in one_batch)
    assert [len(p) for p in ours] == [1, 4, 3, 4]
    assert bool(ours[1].isnan().all())
    torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-5, equal_nan=True)
    for table, group, p in zip(one_batch[0].pair_likelihoods(groups), groups, ours, strict=True):
        assert table.shape == (group.size, group.size)
        torch.testing.assert_close(table.diagonal(), p, atol=1e-6, rtol=1e-5, equal_nan=True)


def test_a_scoring_pass_that_is_no_number_does_not_look_like_no_answer(trainer, groups):
    assert any(c.answer_span is None for group in groups for c in group.completions)
    trainer.reference.score_answers(groups)
    assert reference_is_finite(groups, all_tokens=False)
    with broken(trainer.reference.average.model):
        trainer.reference.score_answers(groups)
    assert not reference_is_finite(groups, all_tokens=False)


def test_reference_keeps_log_probs_of_answers_only_unless_a_kl_term_needs_all(
    checkpoint, world, ranks, tmp_path, groups
):
    for kl_coefficient in (0.0, 0.04):
        recipe = small_recipe(checkpoint, world)
        recipe.algorithm.kl_coefficient = kl_coefficient
        trainer = small_trainer(recipe, ranks, tmp_path / str(kl_coefficient))
        trainer.reference.score_answers(groups)
        for group in groups:
            for completion, scored in zip(
                group.completions, group.reference_log_probs, strict=True
            ):
                known = (~scored.isnan()).nonzero()[:, 0].tolist()
                answer = range(*completion.answer_span) if completion.answer_span else []
                assert known == list(range(completion.length) if kl_coefficient else answer)


def test_a_scoring_pass_that_disagrees_with_training_stops_the_first_step(
    checkpoint, world, ranks, tmp_path
):
    trainer = small_trainer(small_recipe(checkpoint, world), ranks, tmp_path)
    weight = trainer.reference.average.model.language_model.output_layer.weight
    weight.data += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    with pytest.raises(RuntimeError, match=r"algorithm.reference.max_logprob_difference"):
        trainer.fit()
