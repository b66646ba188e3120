"""The reference follows the policy although the steps are far below a bf16 ulp."""

import copy

import pytest
import torch

from nemo_care.models.ema import WeightAverage

# Which ranks count a parameter depends on their groups.
pytestmark = [pytest.mark.numeric, pytest.mark.usefixtures("ranks")]


def drift_after(updates: int, step: float, decay: float) -> tuple[float, float, float]:
    """Mean drift of the float32 average, of a bf16 lerp, and of a float64 average."""
    torch.manual_seed(0)
    policy = torch.nn.Linear(64, 64, bias=False)
    master = policy.weight.detach().double()
    policy = policy.bfloat16()
    policy.weight.data = master.bfloat16()
    average = WeightAverage(copy.deepcopy(policy), decay)
    lerped, exact = policy.weight.detach().clone(), policy.weight.detach().double()
    start = exact.clone()
    direction = torch.randn_like(master).sign()
    for _ in range(updates):
        master += step * direction
        policy.weight.data = master.bfloat16()
        average.update(policy)
        lerped.lerp_(policy.weight.detach(), 1 - decay)
        exact = decay * exact + (1 - decay) * policy.weight.detach().double()

    def drift(weight: torch.Tensor) -> float:
        return ((weight.double() - start) * direction).mean().item()

    return drift(average.state["weight"]), drift(lerped), drift(exact)


def test_average_of_bf16_weights_drifts_like_a_float64_average():
    ours, lerped, exact = drift_after(updates=1000, step=1e-6, decay=0.995)
    assert exact > 1e-4
    assert abs(ours - exact) < 0.01 * exact
    # The released code's update, on the same weights, loses much of the way.
    assert lerped < 0.7 * exact


def test_compute_copy_is_the_average_cast_to_its_type():
    policy = torch.nn.Linear(8, 8).bfloat16()
    average = WeightAverage(copy.deepcopy(policy), 0.5)
    with torch.no_grad():
        policy.weight.add_(1.0)
    average.update(policy)
    assert torch.equal(average.model.weight, average.state["weight"].bfloat16())
    assert not average.model.weight.requires_grad


def test_float32_parameters_are_their_own_state():
    model = torch.nn.Linear(8, 8)
    average = WeightAverage(copy.deepcopy(model), 0.9)
    with torch.no_grad():
        model.weight.fill_(1.0)
    before = average.model.weight.detach().clone()
    average.update(model)
    torch.testing.assert_close(average.model.weight.detach(), 0.9 * before + 0.1)


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_measures_the_distance_that_is_left(offload, dtype):
    policy = torch.nn.Linear(64, 64).to(dtype)
    average = WeightAverage(copy.deepcopy(policy), 0.9, offload=offload)
    with torch.no_grad():
        policy.weight.add_(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))
    squares = average.update(policy)
    assert torch.equal(squares, average.squared_distance(policy))
    moved = [
        p.detach().double() - average.state[name].double() for name, p in policy.named_parameters()
    ]
    wanted = sum(float(part.square().sum()) for part in moved)
    assert squares.sum(0)[0].item() == pytest.approx(wanted, rel=1e-5)
