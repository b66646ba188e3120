"""What ranks tell each other."""

import threading

import pytest
import torch

from nemo_care.ranks.process_groups import Layout, Ranks


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


def dealt(ranks: Ranks, job: None) -> tuple:
    """What the leader of a replica gives its other ranks."""
    tensors = [torch.arange(n, dtype=torch.uint8).view(1, n) for n in (3, 5, 7, 2)]
    if not ranks.is_model_leader:
        tensors = [tensor.to("meta") for tensor in tensors]
    a, b, c, d = tensors
    parts = ranks.dealt_by_leader([(0, [a]), (1, [b, c]), (1, []), (0, []), (1, [d])])
    received = ranks.from_leader(lambda: "everything", for_others=lambda text: text[:5])
    return [[tensor.clone() for tensor in part] for part in parts], received


def test_a_leader_deals_tensors_and_tells_others_less(on_ranks):
    (leader, received), (other, received_other) = on_ranks(Layout(tensor=2), dealt, None)
    assert (received, received_other) == ("everything", "every")
    assert [[t.tolist() for t in part] for part in leader] == [[[[0, 1, 2]]], []]
    assert [[t.shape for t in part] for part in other] == [[(1, 5), (1, 7)], [], [(1, 2)]]
    assert all(t.tolist() == [list(range(t.numel()))] for part in other for t in part)
