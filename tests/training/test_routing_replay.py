"""Experts recorded while sampling are those of the update, in every layout.

The oracle is transformers with its routers replaced: recorded experts, weighted by its own logits.
"""

from dataclasses import dataclass, field

import pytest
import torch
from golden import hf_model, log_probs, parameters_on_disk
from layouts import (
    EXPERT_LAYOUTS,
    LAYOUTS,
    gather_gradients,
    held_by_leader,
    reduce_whole_gradients,
    share_of,
)
from made_groups import make_groups, make_prompts
from small_runs import one_step, small_recipe, small_trainer, updated
from tiny_qwen3_vl import DEEP_LEVELS, EXPERTS, write_tiny_qwen3

from nemo_care.data.tokenizer import load_tokenizer
from nemo_care.errors import InputError
from nemo_care.groups.batching import BatchLayout
from nemo_care.groups.files import StoredGroup, read_groups, restore_groups, write_groups
from nemo_care.models.architecture import UNRECORDED
from nemo_care.models.families import read_family
from nemo_care.ranks.process_groups import Ranks
from nemo_care.rollouts.build import check_rollouts, replays_routing
from nemo_care.rollouts.generator import Sampling
from nemo_care.rollouts.megatron import MegatronGenerator
from nemo_care.runs import metrics as m
from nemo_care.training.build import load_model
from nemo_care.training.policy import Policy

pytestmark = pytest.mark.numeric

LAYERS, COUNT, ACTIVE = 2 * DEEP_LEVELS, EXPERTS["num_experts"], EXPERTS["num_experts_per_tok"]
SAMPLING = Sampling(group_size=2, temperature=1.0, top_p=0.95, max_tokens=16, seed=(7,))
# Recomputation, and whether a group is packed.
WAYS = [("none", True), ("full", True), ("selective", False)]


def made_routing(tokens: int, seed: int) -> torch.Tensor:
    """Experts int16 [tokens, layers, top_k] without any sense; every seventh token has none."""
    scores = torch.rand(tokens, LAYERS, COUNT, generator=torch.Generator().manual_seed(seed))
    routing = scores.topk(ACTIVE, dim=-1).indices.to(torch.int16)
    routing[seed % 7 :: 7] = UNRECORDED
    return routing


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    # transformers can't continue a vision token, which this model does not sample.
    return write_tiny_qwen3(tmp_path_factory.mktemp("experts") / "checkpoint", EXPERTS, seed=2)


@pytest.fixture(scope="module")
def job(checkpoint, world, tmp_path_factory):
    # A video, and two of them.
    prompts = make_prompts(checkpoint, world, tmp_path_factory.mktemp("routing"))[:2]
    groups = make_groups(prompts, checkpoint)
    for number, group in enumerate(groups):
        group.advantage = torch.tensor([1.5, -0.5, 0.5, -1.0]).roll(number)
        group.prompt_routing = made_routing(group.prompt.length, number)
        for place, completion in enumerate(group.completions):
            completion.routing = made_routing(completion.length, 10 * number + place)
    return checkpoint, world, groups


def computed(ranks: Ranks, job: tuple) -> dict:
    """By recomputation and layout of the batches: log-probabilities, gradients and metrics of the
    update. Sampled in the same ranks: the tokens and their experts."""
    checkpoint, world, groups = job
    recipe = small_recipe(checkpoint, world)
    mine = held_by_leader(share_of(groups, ranks), ranks)
    results = {}
    for recompute, shared in WAYS if ranks.world_size == 1 else [("full", True)]:
        recipe.model.recompute_granularity = recompute
        # Two groups in a batch, or two batches for the stages of a pipeline.
        size = 2 if ranks.world_size == 1 else 1
        layout = BatchLayout.of(ranks.layout, size, pad_id=0, shared_prompt=shared)
        policy = Policy(load_model(recipe, ranks), recipe, ranks, layout)
        reduce_whole_gradients(policy.wrapped.config)
        batches = layout.batches(mine)
        passes = policy.forward_backward(batches, policy.loss_count(batches))
        vectors = [
            row
            for batch, result in zip(batches, passes, strict=False)
            for of_group in batch.unpadded(result.log_probs)
            for row in of_group
        ]
        results[recompute, shared] = {
            "log_probs": [
                row
                for part in ranks.gather_from_replicas(ranks.gather_in_replica(vectors)[-1])
                for row in part
            ],
            "gradients": gather_gradients(policy.model),
            "metrics": policy._expert_metrics(),
        }
    prompts = [group.prompt for group in mine]
    tokenizer = load_tokenizer(checkpoint, read_family(checkpoint).prompt)
    generator = MegatronGenerator(
        policy.model, tokenizer, ranks, groups_per_batch=2, records_routing=True
    )
    made = generator.generate(prompts, SAMPLING)
    results["sampled"] = [item for part in ranks.gather_from_replicas(made) for item in part]
    return results


@dataclass
class Oracle:
    """transformers with forced experts: what it computes, and what its routers chose."""

    log_probs: list[torch.Tensor] = field(default_factory=list)
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    loads: torch.Tensor = field(default_factory=lambda: torch.zeros(LAYERS, COUNT))
    different: int = 0
    recorded: int = 0


def gates(model):
    return [layer.mlp.gate for layer in model.model.language_model.layers]


def forced(gate, experts: torch.Tensor, chosen: list):
    """The forward function of a router with these experts [S, top_k]; notes its choice and them."""

    def forward(hidden):
        logits = hidden.reshape(-1, hidden.shape[-1]) @ gate.weight.t()
        own = logits.topk(ACTIVE, dim=-1).indices
        used = torch.where(experts[:, :1] == UNRECORDED, own, experts.long())
        chosen.append((own, used))
        return logits, torch.softmax(logits.gather(1, used), dim=-1), used

    return forward


def with_experts(model, prompt, completion, prompt_routing, routing):
    """Log-probabilities [C] with forced experts; the choices of all layers, (own, used)."""
    experts = torch.cat([prompt_routing, routing])
    chosen: list = []
    for layer, gate in enumerate(gates(model)):
        gate.forward = forced(gate, experts[:, layer], chosen)
    return log_probs(model, prompt, completion), chosen


def oracle(checkpoint, groups, perturb=lambda model: None) -> Oracle:
    """The loss's gradient for groups with recorded experts and advantages."""
    found, model = Oracle(), hf_model(checkpoint)
    perturb(model)
    total = sum(group.size for group in groups)
    for group in groups:
        for place, completion in enumerate(group.completions):
            values, chosen = with_experts(
                model, group.prompt, completion, group.prompt_routing, completion.routing
            )
            loss = -group.advantage[place] * torch.exp(values - values.detach()).mean() / total
            loss.backward()
            found.log_probs.append(values.detach())
            # A group's prompt is computed once.
            first = group.prompt.length if place else 0
            known = torch.cat([group.prompt_routing, completion.routing])[first:, 0, 0]
            known = known != UNRECORDED
            for layer, (own, used) in enumerate(chosen):
                found.loads[layer] += used[first:].flatten().bincount(minlength=COUNT)
                same = [set(a) == set(b) for a, b in zip(own.tolist(), used.tolist(), strict=True)]
                found.different += sum(not equal for equal in same[first:])
                found.recorded += int(known.sum())
    found.gradients = {n: p.grad for n, p in parameters_on_disk(model).items()}
    return found


@pytest.fixture(scope="module")
def wanted(job):
    checkpoint, _, groups = job
    return oracle(checkpoint, groups)


@pytest.fixture(scope="module")
def base(on_ranks, job):
    layout, _ = LAYOUTS["tp1"]
    return on_ranks(layout, computed, job)[0]


def assert_equal_to_forced(ours, wanted):
    torch.testing.assert_close(ours["log_probs"], wanted.log_probs, atol=1e-4, rtol=1e-5)
    largest = max(gradient.abs().max().item() for gradient in wanted.gradients.values())
    torch.testing.assert_close(ours["gradients"], wanted.gradients, atol=1e-5 * largest, rtol=0.0)


@pytest.mark.parametrize(("recompute", "shared"), WAYS)
def test_log_probs_and_gradients_are_those_of_the_recorded_experts(base, wanted, recompute, shared):
    assert_equal_to_forced(base[recompute, shared], wanted)


def test_the_recorded_experts_are_others_than_the_router_s(job, wanted):
    """Otherwise the comparisons would say nothing."""
    checkpoint, _, groups = job
    model, group = hf_model(checkpoint), groups[0]
    with torch.no_grad():
        own = log_probs(model, group.prompt, group.completions[0])
    assert (own - wanted.log_probs[0]).abs().max() > 0.1
    assert wanted.different > wanted.recorded / 2


@pytest.mark.parametrize("name", ["pp2", "ep2", "tp2_ep2_sequence_parallel"])
def test_every_layout_replays_and_records_the_same(on_ranks, job, base, wanted, name):
    layout, replicas = {**LAYOUTS, **EXPERT_LAYOUTS}[name]
    ours = on_ranks(layout, computed, job, replicas=replicas)[0]
    assert_equal_to_forced(ours["full", True], wanted)
    assert ours["full", True]["metrics"] == base["none", True]["metrics"]
    for group, other in zip(ours["sampled"], base["sampled"], strict=True):
        assert torch.equal(group.prompt_routing, other.prompt_routing)
        for completion, alike in zip(group.completions, other.completions, strict=True):
            assert torch.equal(completion.token_ids, alike.token_ids)
            assert torch.equal(completion.routing, alike.routing)


def test_metrics_are_counted_by_hand(base, wanted):
    ours = base["full", True]["metrics"]
    assert ours[m.ROUTING_DIFFERENCE] == pytest.approx(wanted.different / wanted.recorded)
    balance = [max(loads) / (sum(loads) / COUNT) for loads in wanted.loads.tolist()]
    assert ours[m.LOAD_BALANCE] == pytest.approx(sum(balance) / LAYERS)
    assert ours[m.LARGEST_LOAD] == pytest.approx(max(balance))
    of_layers = [ours[m.LOAD_OF_LAYER.of(str(layer))] for layer in range(LAYERS)]
    assert of_layers == pytest.approx(balance)
    assert 1 < min(balance) < max(balance)


def test_what_is_recorded_is_what_the_routers_of_transformers_choose(job, base):
    checkpoint, _, groups = job
    model = hf_model(checkpoint)
    for given, group in zip(groups, base["sampled"], strict=True):
        for completion in group.completions:
            nothing = torch.full((1, LAYERS, ACTIVE), UNRECORDED)
            with torch.no_grad():
                _, chosen = with_experts(
                    model,
                    given.prompt,
                    completion,
                    nothing.expand(given.prompt.length, -1, -1),
                    nothing.expand(completion.length, -1, -1),
                )
            used = torch.stack([used for _, used in chosen], dim=1).sort(dim=-1).values
            # The last token went through no layer.
            assert (completion.routing[-1] == UNRECORDED).all()
            recorded = torch.cat([group.prompt_routing, completion.routing[:-1]])
            assert recorded.dtype == torch.int16
            assert torch.equal(recorded.long().sort(dim=-1).values, used[:-1])


def shift(weight: torch.Tensor) -> None:
    """Change a router so that it chooses other experts for many tokens."""
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    weight.data += 0.1 * noise


def test_a_router_that_has_changed_since_sampling_does_not_change_the_experts(job, base, ranks):
    checkpoint, world, _ = job
    recipe, groups = small_recipe(checkpoint, world), base["sampled"]
    for group in groups:
        group.advantage = torch.tensor([1.0, -1.0])
    layout = BatchLayout.of(ranks.layout, 1, pad_id=0, shared_prompt=True)
    policy = Policy(load_model(recipe, ranks), recipe, ranks, layout)
    for layer in policy.model.language_model.decoder.layers:
        shift(layer.mlp.router.weight)
    metrics = updated(policy, groups)
    wanted = oracle(checkpoint, groups, lambda model: [shift(g.weight) for g in gates(model)])
    assert 0 < wanted.different < wanted.recorded
    share = wanted.different / wanted.recorded
    assert metrics[m.ROUTING_DIFFERENCE] == pytest.approx(share)
    sampled = [completion.log_probs for group in groups for completion in group.completions]
    difference = (torch.cat(sampled) - torch.cat(wanted.log_probs)).abs().mean()
    assert metrics[m.ROLLOUT_DIFFERENCE] == pytest.approx(float(difference), rel=1e-3)


def test_a_run_replays_unless_the_recipe_says_otherwise(job, ranks, tmp_path):
    checkpoint, world, _ = job
    recipe = small_recipe(checkpoint, world)
    step = one_step(small_trainer(recipe, ranks, tmp_path / "replayed"))
    assert step.groups[0].prompt_routing is not None
    assert step.metrics[m.ROUTING_DIFFERENCE] == 0
    assert step.metrics[m.ROLLOUT_DIFFERENCE] < 1e-5
    recipe.model.moe.routing_replay = False
    step = one_step(small_trainer(recipe, ranks, tmp_path / "free"))
    group = step.groups[0]
    assert group.prompt_routing is None
    assert group.completions[0].routing is None
    assert step.metrics[m.ROUTING_DIFFERENCE] is None
    assert step.metrics[m.LOAD_BALANCE] > 1


def test_stored_groups_keep_their_experts(job, tmp_path):
    _, _, groups = job
    group = groups[0]
    group.consistency_bonus, group.reward = torch.zeros(4), group.base_reward
    file = tmp_path / "step_000001.json"
    stored = StoredGroup.of(group, None)
    for record in stored.record["completions"]:
        record["not_finite"] = []
    write_groups(file, [stored], {"step": 1, "update": 0, "optimizer_steps": 0, "not_finite": []})
    _, read = read_groups(file)
    (restored,) = restore_groups(read, lambda index: group.prompt)
    assert torch.equal(restored.prompt_routing, group.prompt_routing)
    for completion, wanted in zip(restored.completions, group.completions, strict=True):
        assert torch.equal(completion.routing, wanted.routing)


def test_replay_is_refused_where_nothing_can_be_recorded(job, tmp_path):
    checkpoint, world, _ = job
    recipe = small_recipe(checkpoint, world)
    without = small_recipe(write_tiny_qwen3(tmp_path / "dense"), world)
    experts = read_family(checkpoint).architecture
    check_rollouts(without)
    assert replays_routing(recipe, experts)
    assert not replays_routing(without, read_family(without.model.hf_path).architecture)
    recipe.model.moe.routing_replay = without.model.moe.routing_replay = True
    check_rollouts(recipe)
    with pytest.raises(InputError, match="routing_replay=true: this model has no experts"):
        check_rollouts(without)
    recipe.rollout.backend = "vllm"
    assert replays_routing(recipe, experts)
    recipe.model.moe.routing_replay = None
    assert not replays_routing(recipe, experts)
