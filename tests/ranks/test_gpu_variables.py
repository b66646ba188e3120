"""The variables and settings that a rank computes with, however it was started."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nemo_care.ranks import process_groups
from nemo_care.ranks.distributed import TIMEOUT
from nemo_care.ranks.gpu_variables import (
    ALLOCATOR,
    DEFAULTS,
    FIXED,
    SOCKETS,
    set_gpu_variables,
)
from nemo_care.ranks.process_groups import Layout, RankEnvironment, Ranks
from nemo_care.recipe.schema import RANGES
from nemo_care.recipe.vllm import VLLMConfig

SCRIPT = Path(__file__).parents[2] / "slurm" / "environment.sh"
NAMES = (*DEFAULTS, *FIXED, *ALLOCATOR, *SOCKETS)


def test_what_the_user_has_set_stays_but_for_tf32(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:64")
    # As NVIDIA's containers set it.
    monkeypatch.setenv("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "1")
    set_gpu_variables()
    assert os.environ["NCCL_DEBUG"] == "INFO"
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    assert os.environ["TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"] == "0"
    assert "PYTORCH_CUDA_ALLOC_CONF" not in os.environ


@pytest.mark.parametrize("interface", [{}, {"NEMO_CARE_INTERFACE": "ib0"}])
def test_a_batch_job_and_the_command_set_the_same(monkeypatch, interface):
    plain = {"PATH": os.environ["PATH"], "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"} | interface
    shown = subprocess.run(
        ["bash", "-c", f"set -eu; . {SCRIPT}; env"],
        env=plain, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    by_script = dict(line.split("=", 1) for line in shown.splitlines() if "=" in line)
    monkeypatch.setattr(os, "environ", plain)
    set_gpu_variables()
    for name in NAMES:
        assert by_script.get(name) == os.environ.get(name), name


def test_commands_set_them_before_torch_is_imported():
    """torch's allocator reads them when it is loaded."""
    program = "import sys, nemo_care.commands.train; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == ["False"], done.stderr


def test_a_rank_starts_with_whole_float32_products_and_bounded_attention_kernels(
    ranks, monkeypatch
):
    monkeypatch.setattr(
        process_groups.parallel_state, "initialize_model_parallel", lambda **groups: None
    )
    monkeypatch.setattr(process_groups, "initialize_rng_tracker", lambda **settings: None)
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.enable_cudnn_sdp(True)
    Ranks._start(SimpleNamespace(layout=Layout()), RankEnvironment(0, 1, 0), 1)
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_an_engine_that_is_late_is_reported_before_a_collective_that_waits_for_it():
    _, longest = RANGES["rollout.vllm.timeout_seconds"]
    assert VLLMConfig().timeout_seconds <= longest < TIMEOUT.total_seconds()
