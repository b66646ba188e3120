"""Packed groups equal separate sequences in every parallel layout: values and gradients.

`packed_program.py` computes both in the same ranks, with each way of recomputing activations. The
prompts are a video, two videos, a video with an image, and text; completions differ in length.
"""

from pathlib import Path

import pytest
import torch
from layout_program import LAYOUTS
from made_groups import make_groups, make_prompts

pytestmark = pytest.mark.numeric

PROGRAM = Path(__file__).parents[1] / "helpers/packed_program.py"
NAMES = ["tp1", "tp2", "tp2_sequence_parallel", "pp2"]
RECOMPUTE = ["none", "selective", "full"]
VALUES = ["logits", "log_probs", "likelihood"]
# Log-probabilities and likelihoods are made of logits: the rounding errors of all three grow with
# the largest logit: about 24 here. One unit in the last place of that is 8e-8 of it.
RELATIVE_ERROR = 3e-6


@pytest.fixture(scope="module")
def folder(rank_server, checkpoint, world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    groups = make_groups(make_prompts(checkpoint, world, folder), checkpoint)
    assert len({c.length for group in groups for c in group.completions}) > 2
    torch.save({"checkpoint": checkpoint, "world": world, "groups": groups}, folder / "job.pt")
    # One process first: the others are compared with it.
    rank_server.run(1, [str(PROGRAM), str(folder), "tp1"])
    return folder


@pytest.fixture(scope="module", params=NAMES)
def results(rank_server, request, folder):
    size = LAYOUTS[request.param]
    if request.param != "tp1":
        count = size.tensor * size.pipeline
        rank_server.run(count, [str(PROGRAM), str(folder), request.param])
    return torch.load(folder / f"packed-{request.param}.pt", weights_only=False)


def largest_difference(ours, wanted) -> float:
    if isinstance(ours, dict):
        assert set(ours) == set(wanted)
        ours, wanted = list(ours.values()), [wanted[name] for name in ours]
    assert [a.isnan().tolist() for a in ours] == [b.isnan().tolist() for b in wanted]
    return max((a - b).nan_to_num(0).abs().max().item() for a, b in zip(ours, wanted, strict=True))


def value_bound(ways) -> float:
    """Largest difference that rounding explains."""
    return RELATIVE_ERROR * max(t.abs().max().item() for t in ways["separate"]["logits"])


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("what", VALUES)
def test_values_of_packed_groups_equal_those_of_separate_sequences(results, recompute, what):
    ways = results[recompute]
    difference = largest_difference(ways["packed"][what], ways["separate"][what])
    assert difference <= value_bound(ways)


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_gradients_of_packed_groups_equal_those_of_separate_sequences(results, recompute):
    ways = results[recompute]
    largest = max(tensor.abs().max().item() for tensor in ways["separate"]["gradients"].values())
    difference = largest_difference(ways["packed"]["gradients"], ways["separate"]["gradients"])
    assert difference <= 1e-5 * largest


def test_a_plain_causal_mask_gives_something_else(results):
    """The negative control: without its segments the packed sequence must fail every comparison."""
    separate = results["none"]["separate"]
    for what in VALUES:
        # Likelihoods of a model that has learned nothing are small.
        size = min(1.0, max(t.nan_to_num(0).abs().max().item() for t in separate[what]))
        assert largest_difference(results["control"][what], separate[what]) > 1e-2 * size, what
    largest = max(tensor.abs().max().item() for tensor in separate["gradients"].values())
    difference = largest_difference(results["control"]["gradients"], separate["gradients"])
    assert difference > 1e-2 * largest


def test_groups_without_any_answer_are_scored_too(results):
    assert all(bool(likelihood.isnan().all()) for likelihood in results["unanswered"])


def test_values_and_gradients_do_not_depend_on_the_layout(results, folder):
    base = torch.load(folder / "packed-tp1.pt", weights_only=False)
    for what in VALUES:
        ours, wanted = results["full"]["packed"][what], base["none"]["packed"][what]
        assert largest_difference(ours, wanted) <= value_bound(base["none"])
    wanted = base["none"]["separate"]["gradients"]
    largest = max(tensor.abs().max().item() for tensor in wanted.values())
    assert largest_difference(results["full"]["packed"]["gradients"], wanted) <= 1e-5 * largest
    assert largest_difference(results["pairs"], base["pairs"]) <= 1e-5
