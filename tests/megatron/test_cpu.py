"""Requests for CUDA go to the CPU on a machine without it."""

import pytest
import torch

from nemo_care.megatron.cpu import enable_cpu_megatron

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is present")

CUDA = torch.device("cuda", 0)
ONES = torch.ones(2, 3)
REQUESTS = {
    "empty": lambda device: torch.empty(2, device=device),
    "tensor": lambda device: torch.tensor([1, 2], device=device),
    "arange": lambda device: torch.arange(3, device=device),
    "randperm": lambda device: torch.randperm(3, device=device),
    "zeros_like": lambda device: torch.zeros_like(ONES, device=device),
    "full_like": lambda device: torch.full_like(ONES, 2, device=device),
    "new_empty": lambda device: ONES.new_empty(2, device=device),
    "new_tensor": lambda device: ONES.new_tensor([1, 2], device=device),
    "to": lambda device: ONES.to(device),
    "to with a type": lambda device: ONES.to(device, torch.bfloat16),
    "to by name": lambda device: ONES.to(device=device, non_blocking=True),
    "module": lambda device: torch.nn.Linear(2, 2, device=device).weight,
    "moved module": lambda device: torch.nn.Linear(2, 2).to(device).weight,
}


@pytest.mark.parametrize("device", ["cuda", "cuda:0", CUDA, "current"])
@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
def test_requests_for_cuda_go_to_the_cpu(request_, device):
    enable_cpu_megatron()
    device = torch.cuda.current_device() if device == "current" else device
    assert request_(device).device.type == "cpu"


@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
def test_other_devices_are_what_they_were(request_):
    enable_cpu_megatron()
    assert request_("meta").device.type == "meta"


def test_a_default_device_still_counts():
    enable_cpu_megatron()
    with torch.device("meta"):
        assert torch.empty(2).is_meta
        assert torch.tensor([1]).is_meta
        assert torch.nn.Linear(2, 2).weight.is_meta


def test_tensors_have_the_type_names_that_the_distributed_optimizer_accepts():
    enable_cpu_megatron()
    assert ONES.type() == "torch.cuda.FloatTensor"
    assert ONES.bfloat16().type() == "torch.cuda.BFloat16Tensor"
    assert ONES.type(torch.int32).dtype == torch.int32
    assert ONES.cuda() is ONES
