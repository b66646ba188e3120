"""Tests that need a CUDA device: skipped with the reason where there is none.

NEMO_CARE_GPU_TESTS_ON_CPU=1 runs those that can run on a CPU: that checks the tests themselves, and
says nothing about GPUs.
"""

import os

import pytest
import torch
from gpu_passes import Job
from made_groups import make_groups, make_prompts


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available() or os.environ.get("NEMO_CARE_GPU_TESTS_ON_CPU") == "1":
        return
    skip = pytest.mark.skip(reason="torch finds no CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def on_gpu() -> None:
    """For tests that say nothing on a CPU, whatever the environment says."""
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")


@pytest.fixture(scope="session")
def job(ranks, checkpoint, world, tmp_path_factory) -> Job:
    """The tiny checkpoint with four prompts of every kind and groups of given completions."""
    folder = tmp_path_factory.mktemp("gpu")
    prompts = make_prompts(checkpoint, world, folder)
    return Job(checkpoint, world, prompts, make_groups(prompts, checkpoint), ranks)
