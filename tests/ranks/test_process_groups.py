"""What ranks tell each other."""

import threading

import pytest


class OfAUser(Exception):
    """Holds what can't be pickled."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.lock = threading.Lock()


def test_an_exception_that_can_not_be_sent_is_told_by_its_text(ranks):
    def fail():
        raise OfAUser("no such reward")

    with pytest.raises(RuntimeError, match="OfAUser: no such reward") as raised:
        ranks.from_rank_zero(fail)
    assert isinstance(raised.value.__cause__, OfAUser)


def test_a_rank_that_is_alone_gets_what_was_made_and_no_copy(ranks):
    made = object()
    assert ranks.from_rank_zero(lambda: made) is made
    assert ranks.from_leader(lambda: made) is made
    assert ranks.on_leaders(made) is made
