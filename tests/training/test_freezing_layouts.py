"""A step with frozen parts equals plain torch with `requires_grad_(False)`, in every layout.

The vision tower computes a prompt once per step if it is frozen, whether or not its mergers are.
"""

import copy

import pytest
import torch
from golden import golden_step, part_of
from layouts import LAYOUTS, gather_weights, held_by_leader, record_gradients, share_of
from made_groups import make_groups, make_prompts
from small_runs import one_step, small_recipe, small_trainer, updated
from test_layouts import assert_close
from tiny_qwen3_vl import write_tiny_qwen3

pytestmark = pytest.mark.numeric

# Parts, recomputation, and whether frames are dealt to tensor-parallel ranks.
EVERYWHERE = [
    (("vision",), "none", True),
    (("vision", "merger"), "full", True),
    (("merger",), "none", True),
    (("language",), "full", True),
]
TENSOR_PARALLEL = [
    (("vision",), "full", False),
    (("language",), "none", False),
]


def frozen_recipe(job: dict, parts, recompute="none", shard=True):
    recipe = small_recipe(job["checkpoint"], job["world"])
    recipe.model.freeze = list(parts)
    recipe.model.recompute_granularity = recompute
    recipe.model.vision.shard = shard
    return recipe


def patches_seen(trainer) -> list[int]:
    """Fill the returned list with the patches that this rank's towers get from now on."""
    seen: list[int] = []
    for model in (trainer.policy.model, trainer.reference.average.model):
        if model.pre_process:
            model.visual.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    return seen


def computed(ranks, job: dict) -> dict:
    """Steps on given completions by what is frozen, and the patches seen in a whole step."""
    result: dict = {}
    cases = EVERYWHERE + (TENSOR_PARALLEL if ranks.layout.tensor > 1 else [])
    for number, case in enumerate(cases):
        run = job["folder"] / f"{job['name']}_{number}"
        trainer = small_trainer(frozen_recipe(job, *case), ranks, run)
        model, average = trainer.policy.model, trainer.reference.average
        groups = held_by_leader(share_of(copy.deepcopy(job["groups"]), ranks), ranks)
        seen = patches_seen(trainer)
        trainer.reference.score_answers(groups)
        trainer.credit(groups)
        gradients = record_gradients(trainer.policy)
        metrics = updated(trainer.policy, groups)
        trainer.reference.track(model, 1)
        result[case] = {
            "patches": ranks.gather_in_replica(sum(seen)),
            "wanted": sum(int(g.prompt.is_vision.sum()) * 4 for g in groups),
            "advantage": ranks.gather_from_replicas([g.advantage.tolist() for g in groups]),
            "loss": metrics["train/loss"],
            "grad_norm": metrics["train/grad_norm"],
            "gradients": gradients,
            "weights": gather_weights(model),
            "average": gather_weights(average.model),
            "memory": ranks.gather_in_replica(memory(trainer)),
        }
        if case == EVERYWHERE[-1]:
            # A later stage then trains nothing at all.
            result[case]["resumed"] = ranks.gather_in_replica(resumes_as_saved(trainer, ranks, run))
        if number in (1, 2):
            seen.clear()
            step = one_step(trainer)
            result[case] |= {
                "step_patches": ranks.gather_in_replica(sum(seen)),
                "step_wanted": sum(int(g.prompt.is_vision.sum()) * 4 for g in step.groups),
            }
    return result


def resumes_as_saved(trainer, ranks, run) -> bool:
    """Whether a new trainer finds what this one has saved."""
    trainer.step = 1
    trainer.save()
    trainer.checkpoints.wait()
    resumed = small_trainer(trainer.recipe, ranks, run)
    resumed.resume()
    first, second = (
        [p.data for p in found.policy.model.parameters()]
        + list(found.reference.average.state.values())
        + [
            state[name]
            for part in found.policy.optimizer.chained_optimizers
            for state in part.optimizer.state.values()
            for name in ("step", "exp_avg", "exp_avg_sq")
        ]
        for found in (trainer, resumed)
    )
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def memory(trainer) -> dict:
    """What this rank holds for frozen parameters besides the parameters themselves."""
    model, average = trainer.policy.model, trainer.reference.average
    own = dict(model.named_parameters())
    frozen = {name for name in own if model.is_frozen(name)}
    trained = sum(p.numel() for name, p in own.items() if name not in frozen)
    with_gradients = sum(p.numel() for b in trainer.policy.wrapped.buffers for p in b.params)
    states = sum(
        state["exp_avg"].numel()
        for part in trainer.policy.optimizer.chained_optimizers
        for state in part.optimizer.state.values()
    )
    states = int(trainer.ranks.sum_over_data(torch.tensor(float(states))))
    return {
        "shared": all(
            p.data_ptr() == own[name].data_ptr()
            for name, p in average.model.named_parameters()
            if name in frozen
        ),
        "averages": sorted(average.state.keys() & frozen),
        "with_gradient": sorted(n for n in frozen if own[n].grad is not None),
        "numbers": (trained, with_gradients, states),
    }


FAMILIES = ("qwen2_5_vl", "qwen3_vl")
# Of the second family, the layout in which most differs: frames are dealt, sequences are cut.
LAYOUTS_OF_BOTH = ("tp2_sequence_parallel",)


@pytest.fixture(scope="module")
def job(request, checkpoint, world, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "qwen3_vl":
        checkpoint = write_tiny_qwen3(folder / "checkpoint")
    prompts = make_prompts(checkpoint, world, folder)
    groups = make_groups(prompts, checkpoint)
    return {"folder": folder, "checkpoint": checkpoint, "world": world, "groups": groups}


@pytest.fixture(scope="module")
def golden(job):
    """The golden steps by the frozen parts."""
    parts = {case[0] for case in EVERYWHERE}
    return {
        frozen: golden_step(job["checkpoint"], job["groups"], frozen_recipe(job, frozen))
        for frozen in parts
    }


@pytest.mark.parametrize(
    ("job", "name"),
    [
        pytest.param(
            *(family, name),
            # One process has nothing that a replica of two has not.
            marks=[pytest.mark.slow]
            * (name == "tp1" or (family != FAMILIES[0] and name not in LAYOUTS_OF_BOTH)),
        )
        for family in FAMILIES
        for name in ("tp1", "tp2_sequence_parallel", "pp2", "dp2")
    ],
    indirect=["job"],
    scope="module",
)
def test_a_step_with_frozen_parts_equals_plain_torch(on_ranks, job, golden, name):
    layout, replicas = LAYOUTS[name]
    result = on_ranks(layout, computed, job | {"name": name}, replicas=replicas)[0]
    assert all(result[EVERYWHERE[-1]]["resumed"])
    for case, ours in result.items():
        _assert_step(ours, golden[case[0]], case)
        _assert_memory(ours)
        _assert_tower_runs(ours, case, layout)


def _assert_step(ours, wanted, case) -> None:
    rows = [row for part in ours["advantage"] for row in part]
    assert rows == [pytest.approx(row, abs=1e-4) for row in wanted.advantage]
    assert ours["loss"] == pytest.approx(wanted.loss, abs=1e-5)
    assert ours["grad_norm"] == pytest.approx(wanted.grad_norm, rel=1e-4)
    assert wanted.gradients
    assert_close(ours["gradients"], wanted.gradients, absolute=1e-5, what=f"{case}: gradient")
    moved = set()
    for key, tensor in wanted.weights.items():
        if part_of(key) in case[0]:
            # Bit for bit what they were.
            assert torch.equal(ours["weights"][key], tensor), (case, key)
            assert torch.equal(ours["average"][key], tensor), (case, key)
            continue
        solid = wanted.gradients[key].abs() > 1e-6
        for kind, bound in (("weights", 2e-5), ("average", 2e-6)):
            difference = (ours[kind][key] - getattr(wanted, kind)[key]).abs()
            assert not solid.any() or difference[solid].max() <= bound, (case, key)
        moved.add(part_of(key))
    assert moved == {"vision", "merger", "language"} - set(case[0])


def _assert_memory(ours) -> None:
    for of_rank in ours["memory"]:
        assert of_rank["shared"]
        assert of_rank["averages"] == of_rank["with_gradient"] == []
        trained, with_gradients, states = of_rank["numbers"]
        assert trained == with_gradients == states


def _assert_tower_runs(ours, case, layout) -> None:
    """Once, however many passes need the features; a trained tower once for each of them."""
    parts, _, shard = case
    copies = 1 if shard else layout.tensor
    passes = 1 if "vision" in parts else 2
    assert sum(ours["patches"]) == copies * passes * ours["wanted"], case
    if "step_patches" in ours:
        passes = 1 if "vision" in parts else 3
        assert ours["step_wanted"] > 0
        assert sum(ours["step_patches"]) == copies * passes * ours["step_wanted"], case
