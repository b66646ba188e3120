"""Packed groups equal separate sequences in every parallel layout: values and gradients.

Both are computed in the same ranks; packed groups with each way of recomputing activations. The
prompts are a video, two videos, a video with an image, and text; completions differ in length.
"""

import dataclasses

import pytest
import torch
import torch.distributed as dist
from layouts import (
    EXPERT_LAYOUTS,
    LAYOUTS,
    gather_gradients,
    gather_vocabulary,
    held_by_leader,
    reduce_whole_gradients,
)
from made_groups import make_groups, make_prompts
from small_runs import small_recipe
from tiny_qwen3_vl import EXPERTS, write_tiny_qwen3

from nemo_care.groups.batching import BatchLayout
from nemo_care.megatron.optimizer import wrap_data_parallel
from nemo_care.models.pipeline import forward_backward, forward_only
from nemo_care.objective.consistency import answer_likelihood
from nemo_care.ranks.process_groups import Ranks
from nemo_care.scoring.scorer import Scorer
from nemo_care.training.build import load_model

pytestmark = pytest.mark.numeric

# What tests of the first family cover for the others is slow.
CASES = [
    *(("qwen2_5_vl", name) for name in ("tp1", "tp2", "tp2_sequence_parallel", "pp2")),
    *(("qwen3_vl", name) for name in ("tp1", "tp2_sequence_parallel", "pp2")),
    *(("qwen3_vl_moe", name) for name in ("tp1", "tp2_ep2_sequence_parallel")),
    *(
        pytest.param(case, marks=pytest.mark.slow)
        for case in (("qwen3_vl", "tp2"), ("qwen3_vl_moe", "pp2"), ("qwen3_vl_moe", "ep2"))
    ),
]
RECOMPUTE = ["none", "selective", "full"]
VALUES = ["logits", "log_probs", "likelihood"]
# Log-probabilities and likelihoods are made of logits: the rounding errors of all three grow with
# the largest logit: about 24 here. One unit in the last place of that is 8e-8 of it.
RELATIVE_ERROR = 3e-6


def causal(batch):
    """The same packed sequence without its segments."""
    return dataclasses.replace(batch, rows=dataclasses.replace(batch.rows, packed=None))


def from_last_stage(value, ranks: Ranks):
    """The last pipeline stage's value, on every rank."""
    everyone = [None] * ranks.world_size
    dist.all_gather_object(everyone, value if ranks.is_last_stage else None)
    return next(value for value in everyone if value is not None)


def compute(wrapped, batches, ranks: Ranks) -> dict:
    """Values and gradients of one layout of the groups."""
    model = wrapped.module

    def values(hidden, batch):
        log_probs = batch.log_probs(model, hidden, batch.mask)
        logits = model.logits(hidden).transpose(0, 1).flatten(0, 1)[batch.places[batch.mask]]
        likelihood = answer_likelihood(log_probs, batch.answer_mask)
        return log_probs, likelihood, logits

    def loss(hidden, batch):
        log_probs = batch.log_probs(model, hidden, batch.mask)
        # Factors of both signs, another for every token.
        factors = torch.sin(torch.arange(log_probs.numel()).view_as(log_probs).float())
        return (log_probs * factors).sum(), None

    def inputs(batch):
        return batch.rows.inputs(model)

    passes = forward_only(model, batches, inputs, values)
    vocabulary = [gather_vocabulary(part, ranks) for part in _last_of(passes, len(batches))]
    wrapped.train()
    wrapped.zero_grad_buffer()
    forward_backward(wrapped, batches, inputs, loss)
    return {
        "log_probs": from_last_stage([part for part, _, _ in passes], ranks),
        "likelihood": from_last_stage([part for _, part, _ in passes], ranks),
        "logits": vocabulary,
        "gradients": gather_gradients(model),
    }


def _last_of(passes: list, count: int) -> list:
    return [logits for _, _, logits in passes] or [None] * count


def computed(ranks: Ranks, job: tuple) -> dict:
    """Logits that predict the completions, log-probabilities, answer likelihoods and gradients: of
    packed groups for each way of recomputation, of separate sequences, and of packed groups under a
    plain causal mask, the negative control."""
    checkpoint, world, groups = job
    groups = held_by_leader(groups, ranks)
    recipe = small_recipe(checkpoint, world)
    packed, separate = (
        # Two groups in a batch.
        BatchLayout.of(ranks.layout, 2, pad_id=0, shared_prompt=shared)
        for shared in (True, False)
    )
    results: dict = {}
    for recompute in RECOMPUTE:
        recipe.model.recompute_granularity = recompute
        wrapped = wrap_data_parallel(load_model(recipe, ranks))
        reduce_whole_gradients(wrapped.config)
        results[recompute] = compute(wrapped, packed.batches(groups), ranks)
        if recompute == "none":
            results["separate"] = compute(wrapped, separate.batches(groups), ranks)
    control = [causal(batch) for batch in packed.batches(groups)]
    results["control"] = compute(wrapped, control, ranks)
    results["pairs"] = Scorer(wrapped.module, ranks, packed).pair_likelihoods(groups)
    for group in groups:
        group.completions = [
            dataclasses.replace(completion, answer_span=None) for completion in group.completions
        ]
    scorer = Scorer(wrapped.module, ranks, packed)
    results["unanswered"] = scorer.answer_likelihoods(groups)
    return results


@pytest.fixture(scope="module")
def computed_by(on_ranks, checkpoint, world, tmp_path_factory):
    """What the tiny model of a family computes in a layout; each once."""
    jobs, found = {}, {}

    def made_job(family):
        folder = tmp_path_factory.mktemp(family)
        path = checkpoint
        if family != "qwen2_5_vl":
            experts = EXPERTS if family == "qwen3_vl_moe" else None
            path = write_tiny_qwen3(folder / "checkpoint", experts)
        groups = make_groups(make_prompts(path, world, folder), path)
        assert len({c.length for group in groups for c in group.completions}) > 2
        return path, world, groups

    def get(family, name):
        if family not in jobs:
            jobs[family] = made_job(family)
        if (family, name) not in found:
            layout, replicas = (LAYOUTS | EXPERT_LAYOUTS)[name]
            found[family, name] = on_ranks(layout, computed, jobs[family], replicas=replicas)[0]
        return found[family, name]

    return get


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request):
    return request.param


@pytest.fixture(scope="module")
def results(computed_by, case):
    return computed_by(*case)


@pytest.fixture(scope="module")
def base(computed_by, case):
    """Of one process: the others are compared with it."""
    return computed_by(case[0], "tp1")


def largest_difference(ours, wanted) -> float:
    if isinstance(ours, dict):
        assert set(ours) == set(wanted)
        ours, wanted = list(ours.values()), [wanted[name] for name in ours]
    assert [a.isnan().tolist() for a in ours] == [b.isnan().tolist() for b in wanted]
    return max((a - b).nan_to_num(0).abs().max().item() for a, b in zip(ours, wanted, strict=True))


def value_bound(results) -> float:
    """Largest difference that rounding explains."""
    return RELATIVE_ERROR * max(t.abs().max().item() for t in results["separate"]["logits"])


def largest_gradient(results) -> float:
    return max(tensor.abs().max().item() for tensor in results["separate"]["gradients"].values())


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_packed_groups_equal_separate_sequences(results, recompute):
    packed, separate = results[recompute], results["separate"]
    for what in VALUES:
        assert largest_difference(packed[what], separate[what]) <= value_bound(results), what
    difference = largest_difference(packed["gradients"], separate["gradients"])
    assert difference <= 1e-5 * largest_gradient(results)


def test_a_plain_causal_mask_gives_something_else(results):
    """The negative control: without its segments the packed sequence must fail every comparison."""
    control, separate = results["control"], results["separate"]
    for what in VALUES:
        # Likelihoods of a model that has learned nothing are small.
        size = min(1.0, max(t.nan_to_num(0).abs().max().item() for t in separate[what]))
        assert largest_difference(control[what], separate[what]) > 1e-2 * size, what
    difference = largest_difference(control["gradients"], separate["gradients"])
    assert difference > 1e-2 * largest_gradient(results)


def test_groups_without_any_answer_are_scored_too(results):
    assert all(bool(likelihood.isnan().all()) for likelihood in results["unanswered"])


def test_values_and_gradients_do_not_depend_on_the_layout(results, base):
    ours = results["full"]
    for what in VALUES:
        assert largest_difference(ours[what], base["none"][what]) <= value_bound(base)
    difference = largest_difference(ours["gradients"], base["separate"]["gradients"])
    assert difference <= 1e-5 * largest_gradient(base)
    assert largest_difference(results["pairs"], base["pairs"]) <= 1e-5
