"""Functions on forked ranks: what fails there fails the test, with the rank's own words."""

import time

import forked_ranks
import pytest

from nemo_care.ranks.process_groups import Layout


def numbered(ranks, job):
    return job, ranks.rank, ranks.data_rank, ranks.is_last_stage


def break_one(ranks, job):
    if ranks.rank == 1:
        raise ValueError("this rank is broken")
    ranks.barrier()


def hang(job):
    time.sleep(600)


def test_results_come_back_in_the_order_of_the_ranks(on_ranks):
    found = on_ranks(Layout(pipeline=2), numbered, "job", replicas=2)
    assert found == [
        ("job", 0, 0, False),
        ("job", 1, 1, False),
        ("job", 2, 0, True),
        ("job", 3, 1, True),
    ]


def test_a_rank_that_fails_ends_the_others_and_shows_its_traceback(on_ranks):
    began = time.monotonic()
    with pytest.raises(AssertionError, match=r"(?s)exit statuses.*ValueError: this rank is broken"):
        on_ranks(Layout(), break_one, replicas=2)
    assert time.monotonic() - began < 60


def test_a_rank_that_hangs_is_ended(on_ranks, monkeypatch):
    monkeypatch.setattr(forked_ranks, "PATIENCE", 0.5)
    with pytest.raises(AssertionError, match=r"exit statuses \(None: hangs\) \[None\]"):
        on_ranks(None, hang)
