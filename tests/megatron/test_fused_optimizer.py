"""A fused AdamW in Megatron's optimizer: its state before a first step, in checkpoints and away.

What TransformerEngine's FusedAdam (2.4 to 2.18) does with its state is written out in torch: steps
are counted for a group of parameters, and loading makes new tensors beside the parameters.
"""

import math

import pytest
import torch
from bad_numbers import everything, unchanged
from megatron.core import optimizer as megatron_optimizer
from megatron.core.optimizer import distrib_optimizer
from small_runs import one_step, small_recipe, small_trainer

NAMES = ("exp_avg", "exp_avg_sq")


class FusedAdam(torch.optim.Optimizer):
    def __init__(self, params, lr, weight_decay, betas, eps, adam_w_mode):
        assert adam_w_mode
        super().__init__(
            params, {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps}
        )

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            (first, second), step = group["betas"], group["step"]
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


@pytest.fixture(params=[False, True], ids=["in_place", "offloaded"])
def recipe(checkpoint, world, monkeypatch, request):
    monkeypatch.setattr(megatron_optimizer, "USING_PYTORCH_OPTIMIZER", False)
    monkeypatch.setattr(megatron_optimizer, "Adam", FusedAdam)
    monkeypatch.setattr(distrib_optimizer, "Adam", FusedAdam)
    monkeypatch.setattr(distrib_optimizer, "HAVE_APEX_OR_TE", True)
    monkeypatch.setattr(distrib_optimizer, "USING_TE_OPTIMIZER", True)
    recipe = small_recipe(checkpoint, world)
    recipe.model.precision.dtype = "bf16"
    recipe.rollout.max_logprob_difference = 1.0
    recipe.optimizer.offload = request.param
    recipe.trainer.max_steps = 2
    return recipe


def steps(trainer) -> set[int | None]:
    return {group.get("step") for group in trainer.policy.optimizer.param_groups}


@pytest.mark.parametrize("step", [0, 1])
def test_a_checkpoint_holds_its_state(recipe, ranks, tmp_path, step):
    """Also where no step could be taken yet."""
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
