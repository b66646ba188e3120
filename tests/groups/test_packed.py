"""How a group becomes one sequence."""

import pytest
import torch
from made_groups import make_groups, make_prompts

from nemo_care.data.prompts import Prompt
from nemo_care.data.samples import Sample
from nemo_care.groups.batching import BatchLayout
from nemo_care.groups.group import Completion, Group
from nemo_care.groups.packed import pack_group, packed_groups
from nemo_care.ranks.process_groups import Layout


@pytest.fixture(scope="module")
def groups(checkpoint, world, tmp_path_factory):
    prompts = make_prompts(checkpoint, world, tmp_path_factory.mktemp("images"))
    return make_groups(prompts, checkpoint)


def written_group(answers: list[list[int]]) -> Group:
    """A prompt of 5 tokens; completions [10, 11, answer, 12], and one without an answer."""
    prompt = Prompt(
        index=0,
        sample=Sample("x", "?", "A"),
        token_ids=torch.arange(1, 6),
        # The last token is at position 8 on every axis, as after a video.
        position_ids=(torch.arange(5) + 4).expand(3, -1),
        is_vision=torch.zeros(5, dtype=torch.bool),
        frames=(),
        grid_thw=None,
    )
    completions = [
        Completion(
            torch.tensor([10, 11, *answer, 12]), torch.zeros(3), "", True, (2, 2 + len(answer))
        )
        for answer in answers
    ]
    completions.append(Completion(torch.tensor([13]), torch.zeros(1), "", True, None))
    return Group(prompt, completions)


def test_positions_of_every_completion_go_on_from_the_prompt(groups):
    for group in groups:
        packed = pack_group(group)
        for segment, completion in zip(packed.segments[1:], group.completions, strict=True):
            own = slice(segment.start, segment.stop)
            assert torch.equal(packed.token_ids[own], completion.token_ids)
            assert torch.equal(
                packed.position_ids[:, own], group.prompt.continued_positions(completion.length)
            )
            assert segment.context == ((0, group.prompt.length),)
        assert torch.equal(packed.position_ids[:, : group.prompt.length], group.prompt.position_ids)
        assert packed.length == group.prompt.length + sum(c.length for c in group.completions)


def test_first_tokens_are_predicted_by_the_prompts_last(groups):
    packed = pack_group(groups[0])
    length = groups[0].prompt.length
    for places, segment in zip(packed.places, packed.segments[1:], strict=True):
        assert places[0] == length - 1
        assert places[1:].tolist() == list(range(segment.start, segment.stop - 1))


@pytest.mark.parametrize(
    ("parallel", "multiple"),
    [
        (Layout(), 16),
        (Layout(tensor=2), 16),
        (Layout(tensor=3, sequence_parallel=True), 48),
        (Layout(tensor=8, sequence_parallel=True), 16),
    ],
)
def test_length_is_a_multiple_of_what_must_divide_it(groups, parallel, multiple):
    layout = BatchLayout.of(parallel, 2, pad_id=0, shared_prompt=True)
    for batch in layout.batches(groups):
        used = sum(pack_group(group).length for group in batch.groups)
        length = batch.rows.token_ids.shape[1]
        assert length % multiple == 0
        assert used <= length < used + multiple
        assert batch.rows.packed.used == used


def test_vision_of_a_prompt_is_there_once_and_whole(groups):
    batch = packed_groups(groups, pad_id=0, multiple=16)
    prompts = [group.prompt for group in groups]
    assert batch.rows.prompts == prompts
    assert int(batch.rows.is_vision.sum()) == sum(int(p.is_vision.sum()) for p in prompts)


def test_one_token_answers_after_every_reasoning_add_nothing():
    group = written_group([[20], [21], [20]])
    plain, packed = pack_group(group), pack_group(group, answer_pairs=True)
    assert packed.length == plain.length
    pairs = packed.pairs
    # Every answer is predicted where the reasoning's own answer is; the fourth has no answer.
    assert sorted(pairs.pair.tolist()) == sorted(i * 4 + j for i in range(3) for j in range(3))
    for token, place, pair in zip(
        pairs.token_ids.tolist(), pairs.places.tolist(), pairs.pair.tolist(), strict=True
    ):
        i, j = divmod(pair, 4)
        assert token == [20, 21, 20][i]
        assert place == packed.places[j][2]


def test_longer_answers_add_their_tokens_but_the_last_once_per_other_reasoning():
    group = written_group([[20, 21, 22], [20, 21, 22], [30, 31]])
    plain, packed = pack_group(group), pack_group(group, answer_pairs=True)
    # After the first two reasonings [30], after the third [20, 21]: equal answers are shared.
    assert packed.length == plain.length + 1 + 1 + 2
    branches = packed.segments[len(plain.segments) :]
    assert [packed.token_ids[b.start : b.stop].tolist() for b in branches] == [[30], [30], [20, 21]]
    for branch, j in zip(branches, (0, 1, 2), strict=True):
        own = packed.segments[1 + j]
        assert branch.context == ((0, 5), (own.start, own.start + 2))
        # Two tokens of reasoning are between the prompt's last position, 8, and the answer.
        assert packed.position_ids[0, branch.start] == 8 + 1 + 2


def test_without_the_shared_prompt_every_completion_is_a_sequence(groups):
    layout = BatchLayout.of(Layout(), 2, pad_id=0, shared_prompt=False)
    for batch in layout.batches(groups):
        assert batch.rows.packed is None
        assert len(batch.rows.token_ids) == sum(group.size for group in batch.groups)


def test_pairs_need_the_shared_prompt(groups):
    layout = BatchLayout.of(Layout(), 1, pad_id=0, shared_prompt=False)
    with pytest.raises(ValueError, match="shared-prompt"):
        layout.batches(groups, answer_pairs=True)
