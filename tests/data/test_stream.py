"""The training stream: seeded epochs, and one that goes on where it stopped."""

import pytest

from nemo_care.data.annotations import Annotations
from nemo_care.data.mixing import TrainingData
from nemo_care.data.prompts import Prompt
from nemo_care.data.samples import Sample, Skipped
from nemo_care.data.stream import PromptStream
from nemo_care.errors import InputError

SAMPLES = [Sample(str(number), "?", "A") for number in range(10)]


class Loader:
    """Prompts without content; remembers what was announced and loaded."""

    def __init__(self, broken=()):
        self.broken = broken
        self.announced: list[int] = []
        self.loaded: list[int] = []

    def prefetch(self, samples):
        self.announced = [index for index, _ in samples]

    def load(self, samples):
        self.loaded += [index for index, _ in samples]
        return [
            Skipped(index, sample.sample_id, "broken.mp4: video not readable")
            if sample.sample_id in self.broken
            else Prompt(index, sample, None, None, None, (), None)
            for index, sample in samples
        ]


def make_stream(
    ranks, *, data=None, seed=1, shuffle=True, broken=(), fraction=0.5, prefetch_steps=1
) -> PromptStream:
    return PromptStream(
        data or TrainingData.of(SAMPLES),
        Loader(broken),
        ranks,
        prompts_per_step=4,
        seed=seed,
        shuffle=shuffle,
        max_skipped_fraction=fraction,
        prefetch_steps=prefetch_steps,
    )


def take(stream: PromptStream, steps: int) -> list[str]:
    return [p.sample.sample_id for _ in range(steps) for p in stream.next_step()[0]]


def test_order_depends_on_the_seed_alone(ranks):
    assert take(make_stream(ranks), 3) == take(make_stream(ranks), 3)
    assert take(make_stream(ranks), 3) != take(make_stream(ranks, seed=2), 3)
    assert take(make_stream(ranks, shuffle=False), 2) == list("01234567")


def test_broken_samples_give_way_to_the_next_ones(ranks):
    stream = make_stream(ranks, shuffle=False, broken={"1", "4", "5"})
    prompts, skipped = stream.next_step()
    assert [p.sample.sample_id for p in prompts] == ["0", "2", "3", "6"]
    assert [item.sample_id for item in skipped] == ["1", "4", "5"]
    assert [p.index for p in prompts] == [0, 2, 3, 6]
    assert take(stream, 1) == ["7", "8", "9", "0"]


def test_next_steps_are_announced_while_this_one_runs(ranks):
    stream = make_stream(ranks, broken={"3"}, prefetch_steps=2, fraction=1)
    for _ in range(4):
        announced = stream.loader.announced
        already = len(stream.loader.loaded)
        stream.next_step()
        # What a step takes was announced before, but for what takes the place of a broken sample.
        assert stream.loader.loaded[already:][: len(announced[:4])] == announced[:4]
        first = stream.position
        assert stream.loader.announced == list(range(first, first + 8))


class TwoReplicas:
    """The second of two replicas, of which the first has lost some of its samples."""

    data_size, data_rank, is_model_leader = 2, 1, True

    def __init__(self, failed_elsewhere):
        self.failed_elsewhere = iter(failed_elsewhere)

    def from_leader(self, make, **keywords):
        return make()

    def gather_from_replicas(self, failed):
        return [next(self.failed_elsewhere), failed]


def test_samples_are_dealt_to_the_replicas_that_lack_prompts(ranks):
    first_has_lost = [[Skipped(1, "1", "broken")], [], []]
    stream = make_stream(TwoReplicas(first_has_lost), shuffle=False, fraction=1)
    prompts, skipped = stream.next_step()
    # 0 and 1 were the first replica's, and so was 4 in place of 1.
    assert [prompt.index for prompt in prompts] == [2, 3]
    assert [item.index for item in skipped] == [1]
    assert stream.loader.announced == [7, 8]
    assert [prompt.index for prompt in stream.next_step()[0]] == [7, 8]


def test_samples_skipped_before_a_kill_count_after_it(ranks):
    stream = make_stream(ranks, broken={"3"}, fraction=0.1)
    stream.count([Skipped(0, stream.order.sample(0).sample_id, "cut off")])
    assert stream.order.sample(0).sample_id != "3"
    with pytest.raises(InputError, match="2 of 10"):
        take(stream, 3)


def with_bad_lines(count: int) -> Annotations:
    return Annotations(SAMPLES, [Skipped(None, f"a.jsonl:{n}", "torn") for n in range(count)])


def test_bad_lines_of_the_annotations_count_with_the_broken_samples(ranks):
    data = TrainingData((with_bad_lines(2),), (1.0,))
    # 3 of 12 are a quarter.
    make_stream(ranks, data=data, broken={"3"}, fraction=0.25).next_step()
    stream = make_stream(ranks, data=data, broken={"3", "4"}, fraction=0.25)
    with pytest.raises(InputError, match=r"4 of 12 training samples.*the first is [34]: broken"):
        take(stream, 3)


def test_sample_that_comes_again_counts_once_and_equal_names_count_apart(ranks):
    stream = make_stream(ranks, broken={"3"}, fraction=0.1)
    take(stream, 8)
    twins = [Sample("twin", "?", "A"), Sample("twin", "?", "B"), *SAMPLES[:8]]
    stream = make_stream(ranks, data=TrainingData.of(twins), broken={"twin"}, fraction=0.1)
    with pytest.raises(InputError, match="2 of 10"):
        take(stream, 3)


def test_each_source_of_a_mixture_is_held_to_the_fraction(ranks):
    small = Annotations([Sample("x", "?", "A"), Sample("y", "?", "A")], [])
    data = TrainingData((Annotations(SAMPLES, []), small), (5.0, 1.0))
    with pytest.raises(InputError, match="1 of 2 training samples"):
        take(make_stream(ranks, data=data, broken={"x"}, fraction=0.25), 6)


def test_position_is_all_that_a_resumed_mixture_needs(ranks):
    small = Annotations([Sample(name, "?", "A") for name in "xyz"], [])
    data = TrainingData((Annotations(SAMPLES, []), small), (1.0, 1.0))
    broken = {"y", "4"}
    whole = take(make_stream(ranks, data=data, broken=broken), 10)
    first = make_stream(ranks, data=data, broken=broken)
    take(first, 4)
    second = make_stream(ranks, data=data, broken=broken)
    second.position = first.position
    assert take(second, 6) == whole[16:]
