"""The training stream: seeded epochs, and one that goes on where it stopped."""

from nemo_care.data.prompts import Prompt
from nemo_care.data.samples import Sample
from nemo_care.data.stream import PromptStream
from nemo_care.data.video import UnreadableMedia


def make_stream(ranks, *, seed=1, shuffle=True, broken=(), fraction=0.5) -> PromptStream:
    def build(index: int, sample: Sample) -> Prompt:
        if sample.sample_id in broken:
            raise UnreadableMedia("broken.mp4: video not readable")
        return Prompt(index, sample, *[None] * 5)

    samples = [Sample(str(number), "?", "A") for number in range(10)]
    return PromptStream(
        samples,
        build,
        ranks,
        prompts_per_step=4,
        seed=seed,
        shuffle=shuffle,
        max_skipped_fraction=fraction,
    )


def take(stream: PromptStream, steps: int) -> list[str]:
    return [p.sample.sample_id for _ in range(steps) for p in stream.next_step()[0]]


def test_every_epoch_takes_each_sample_once_in_an_order_of_its_own(ranks):
    ids = take(make_stream(ranks), 5)
    assert sorted(ids[:10]) == sorted(ids[10:]) == sorted(map(str, range(10)))
    assert ids[:10] != ids[10:]


def test_order_depends_on_the_seed_alone(ranks):
    assert take(make_stream(ranks), 3) == take(make_stream(ranks), 3)
    assert take(make_stream(ranks), 3) != take(make_stream(ranks, seed=2), 3)
    assert take(make_stream(ranks, shuffle=False), 2) == list("01234567")


def test_position_is_all_that_a_resumed_run_needs(ranks):
    whole = take(make_stream(ranks), 4)
    first = make_stream(ranks)
    take(first, 2)
    second = make_stream(ranks)
    second.position = first.position
    assert take(second, 2) == whole[8:]


def test_broken_samples_give_way_to_the_next_ones(ranks):
    stream = make_stream(ranks, shuffle=False, broken={"1", "4", "5"})
    prompts, skipped = stream.next_step()
    assert [p.sample.sample_id for p in prompts] == ["0", "2", "3", "6"]
    assert [item.sample_id for item in skipped] == ["1", "4", "5"]
    assert [p.index for p in prompts] == [0, 2, 3, 6]
    assert take(stream, 1) == ["7", "8", "9", "0"]
