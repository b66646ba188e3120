"""What ranks tell each other."""

import threading
from pathlib import Path

import pytest
import torch

DEALT = Path(__file__).parents[1] / "helpers/dealt_program.py"


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


def test_a_leader_deals_tensors_and_tells_others_less(rank_server, tmp_path):
    rank_server.run(2, [str(DEALT), str(tmp_path)])
    leader, other = (torch.load(tmp_path / f"rank_{rank}.pt") for rank in range(2))
    assert (leader["told"], other["told"]) == ("everything", "every")
    assert [[t.tolist() for t in part] for part in leader["dealt"]] == [[[[0, 1, 2]]], []]
    assert [[t.shape for t in part] for part in other["dealt"]] == [[(1, 5), (1, 7)], [], [(1, 2)]]
    assert all(t.tolist() == [list(range(t.numel()))] for part in other["dealt"] for t in part)
