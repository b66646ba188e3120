"""Buffers of gradients are checked in pieces that CUDA's kernels can count, with no gap."""

from types import SimpleNamespace

import pytest
import torch

from nemo_care.megatron import gradient_watch
from nemo_care.megatron.gradient_watch import GradientWatch


@pytest.fixture
def pieces(monkeypatch):
    """The sizes of what is checked at a time, of at most three elements."""
    sizes, aminmax = [], torch.aminmax

    def noted(values):
        sizes.append(values.numel())
        return aminmax(values)

    monkeypatch.setattr(gradient_watch, "_PIECE", 3)
    monkeypatch.setattr(torch, "aminmax", noted)
    return sizes


def watch_of(gradient) -> GradientWatch:
    """The watch of a model whose one parameter has this gradient."""
    parameter = torch.nn.Parameter(torch.zeros_like(gradient))
    parameter.main_grad = gradient
    return GradientWatch(
        SimpleNamespace(
            config=SimpleNamespace(finalize_model_grads_func=None),
            buffers=[SimpleNamespace(grad_data=gradient.view(-1))],
            expert_parallel_buffers=[SimpleNamespace(grad_data=torch.zeros(0))],
            module=SimpleNamespace(named_parameters=lambda: [("weight", parameter)]),
        )
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", range(8))
def test_a_gradient_that_is_not_finite_is_found_wherever_it_is(pieces, place, value):
    gradient = torch.zeros(4, 2)
    gradient.view(-1)[place] = value
    watch = watch_of(gradient)
    watch.look()
    assert not watch.finite
    assert watch.parameters_not_finite() == ["weight"]
    assert pieces == [3, 3, 2] * 2


def test_finite_gradients_pass(pieces):
    watch = watch_of(torch.tensor([[3e38, -3e38], [0.0, 1.0]]))
    watch.look()
    assert watch.finite
    assert watch.parameters_not_finite() == []
