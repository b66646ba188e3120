"""A fused AdamW in Megatron's optimizer: its state before a first step, in checkpoints and away.

What TransformerEngine's FusedAdam (2.4 to 2.20) does with its state is written out in torch: steps
are counted for a group of parameters, in an integer, and loading makes new tensors beside the
parameters. `tests/te` runs the real one, with its kernel written in torch.
"""

import math

import pytest
import torch
from bad_numbers import everything, unchanged
from made_optimizer import optimizer_of_megatron, resumed, uninterrupted
from small_runs import one_step, small_recipe, small_trainer

NAMES = ("exp_avg", "exp_avg_sq")


class FusedAdam(torch.optim.Optimizer):
    def __init__(self, params, lr, weight_decay, betas, eps, adam_w_mode):
        assert adam_w_mode
        settings = {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps}
        super().__init__(params, settings | {"bias_correction": True})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            (first, second), step = group["betas"], group["step"]
            # The kernel takes an integer.
            assert isinstance(step, int)
            assert group["bias_correction"]
            for parameter in group["params"]:
                state = self.state[parameter]
                for name in NAMES if not state else ():
                    state[name] = torch.zeros_like(parameter)
                mean, square = (state[name] for name in NAMES)
                mean.lerp_(parameter.grad, 1 - first)
                square.lerp_(parameter.grad.square(), 1 - second)
                root = square.sqrt() / math.sqrt(1 - second**step) + group["eps"]
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.addcdiv_(mean, root, value=-group["lr"] / (1 - first**step))

    def state_dict(self):
        found = super().state_dict()
        assert all(set(state) <= set(NAMES) for state in found["state"].values())
        return found

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for parameter, number in zip(group["params"], saved["params"], strict=True):
                state = state_dict["state"].get(number, {})
                self.state[parameter] = {
                    name: torch.empty_like(parameter).copy_(value) for name, value in state.items()
                }


@pytest.fixture
def recipe(checkpoint, world):
    recipe = small_recipe(checkpoint, world)
    recipe.model.precision.dtype = "bf16"
    recipe.rollout.max_logprob_difference = 1.0
    recipe.trainer.max_steps = 2
    with optimizer_of_megatron(FusedAdam):
        yield recipe


def steps(trainer) -> set[int]:
    return {group.get("step", 0) for group in trainer.policy.optimizer.param_groups}


@pytest.mark.parametrize(("step", "offload"), [(0, False), (1, False), (1, True)])
def test_a_checkpoint_holds_its_state(recipe, ranks, tmp_path, step, offload):
    """Also where no step could be taken yet."""
    recipe.optimizer.offload = offload
    trainer = small_trainer(recipe, ranks, tmp_path)
    if step:
        one_step(trainer, step)
        assert steps(trainer) == {1}
    trainer.save()
    trainer.checkpoints.wait()
    resumed = small_trainer(recipe, ranks, tmp_path)
    resumed.resume()
    assert steps(resumed) == steps(trainer)
    assert unchanged(everything(trainer), everything(resumed))
    for either in (trainer, resumed):
        one_step(either, step + 1)
    assert steps(resumed) == {step + 1}
    assert unchanged(everything(trainer), everything(resumed))


def test_a_resumed_run_has_the_recipes_settings_and_the_checkpoints_steps(recipe, ranks, tmp_path):
    small_trainer(recipe, ranks, tmp_path).fit()
    recipe.optimizer.lr, recipe.optimizer.eps, recipe.optimizer.beta2 = 7e-3, 1e-5, 0.5
    resumed = small_trainer(recipe, ranks, tmp_path)
    resumed.resume()
    groups = resumed.policy.optimizer.param_groups
    assert steps(resumed) == {2}
    assert {(group["lr"], group["eps"], group["betas"]) for group in groups} == {
        (7e-3, 1e-5, (recipe.optimizer.beta1, 0.5))
    }


@pytest.mark.parametrize("trained", [0, 2])
@pytest.mark.parametrize(
    ("first", "then"),
    [(None, None), (None, FusedAdam), (FusedAdam, None), (FusedAdam, FusedAdam)],
    ids=["torch to torch", "torch to fused", "fused to torch", "fused to fused"],
)
def test_a_run_goes_on_with_either_kind_of_adamw(ranks, tmp_path, first, then, trained):
    """From a checkpoint before the first step, and from one after two."""
    wanted = uninterrupted(None, trained + 2)
    found = resumed(tmp_path / "checkpoint", first, then, trained)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)
