"""Mixtures of data sets: shares of an epoch, and an order that only the place decides."""

from collections import Counter

import numpy as np
import pytest

from nemo_care.data.annotations import Annotations
from nemo_care.data.mixing import SampleOrder, TrainingData, epoch_shares
from nemo_care.data.samples import Sample
from nemo_care.errors import InputError


def mixture(sizes, weights) -> TrainingData:
    return TrainingData(
        tuple(
            Annotations([Sample(f"{source}/{n}", "?", "A") for n in range(size)], [])
            for source, size in zip("abc", sizes, strict=False)
        ),
        tuple(map(float, weights)),
    )


def ids(order: SampleOrder, first: int, last: int) -> list[str]:
    return [order.sample(index).sample_id for index in range(first, last)]


@pytest.mark.parametrize(
    ("sizes", "weights", "expected"),
    [
        ([7], [3], [7]),
        ([30, 10], [1, 1], [20, 20]),
        ([30, 10], [0.75, 0.25], [30, 10]),
        ([5, 5], [2, 1], [7, 3]),
        ([3, 4, 4], [1, 1, 1], [4, 4, 3]),
    ],
)
def test_shares_follow_the_weights_and_fill_the_epoch(sizes, weights, expected):
    assert epoch_shares(sizes, weights) == expected


def test_source_that_would_get_no_prompt_is_refused():
    with pytest.raises(InputError, match=r"data\.train\.sources\[1\]\.weight=0\.001"):
        SampleOrder(mixture([5, 5], [1, 0.001]), seed=1, shuffle=True)


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_epoch_holds_each_sources_share(shuffle):
    order = SampleOrder(mixture([30, 10, 20], [1, 2, 1]), seed=1, shuffle=shuffle)
    for epoch in range(4):
        taken = ids(order, epoch * 60, epoch * 60 + 60)
        assert Counter(name[0] for name in taken) == {"a": 15, "b": 30, "c": 15}


@pytest.mark.parametrize("shuffle", [True, False])
def test_source_gives_all_of_its_samples_before_any_of_them_again(shuffle):
    order = SampleOrder(mixture([30, 10], [1, 1]), seed=1, shuffle=shuffle)
    taken = ids(order, 0, 120)
    for source, size in (("a", 30), ("b", 10)):
        own = [name for name in taken if name[0] == source]
        for start in range(0, len(own), size):
            assert len(set(own[start : start + size])) == size


def test_order_is_a_function_of_seed_and_place():
    data = mixture([30, 10], [1, 3])
    order = SampleOrder(data, seed=1, shuffle=True)
    whole = ids(order, 0, 100)
    assert ids(SampleOrder(data, seed=1, shuffle=True), 57, 100) == whole[57:]
    assert ids(order, 3, 9) == whole[3:9]
    assert ids(SampleOrder(data, seed=2, shuffle=True), 0, 100) != whole
    assert whole[:40] != whole[40:80]


def test_sources_are_spread_over_an_epoch():
    data = mixture([60, 20], [3, 1])
    plain = ids(SampleOrder(data, seed=1, shuffle=False), 0, 80)
    for start in range(0, 80, 4):
        assert Counter(name[0] for name in plain[start : start + 4]) == {"a": 3, "b": 1}
    shuffled = ids(SampleOrder(data, seed=1, shuffle=True), 0, 80)
    assert 3 <= sum(name[0] == "b" for name in shuffled[:40]) <= 17


def test_one_data_set_keeps_the_order_that_it_has_without_a_mixture():
    order = SampleOrder(mixture([10], [5]), seed=3, shuffle=True)
    for epoch in range(2):
        expected = np.random.default_rng([3, epoch]).permutation(10)
        places = [order.at(index) for index in range(epoch * 10, epoch * 10 + 10)]
        assert places == [(0, place) for place in expected]
