"""What makes a machine unfit for a run is found and named."""

import os

import pytest
import torch
from small_runs import small_recipe

from nemo_care.checks import hardware
from nemo_care.checks.hardware import gpu_errors
from nemo_care.checks.node import main, problems_of


@pytest.fixture
def recipe(checkpoint, world):
    return small_recipe(checkpoint, world)


def test_without_gpus_a_machine_is_fit_only_for_those_who_say_so(recipe, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("NEMO_CARE_CPU", raising=False)
    recipe.trainer.devices = 8
    (problem,) = problems_of(recipe)
    assert problem.startswith("0 usable GPUs, but trainer.devices=8")
    monkeypatch.setenv("NEMO_CARE_CPU", "1")
    assert problems_of(recipe) == []
    assert "the GPUs are not checked" in capsys.readouterr().out


def test_checkpoint_and_data_that_can_not_be_read_here_are_named(recipe, monkeypatch, tmp_path):
    monkeypatch.setenv("NEMO_CARE_CPU", "1")
    recipe.model.hf_path = str(tmp_path / "no_model")
    recipe.data.train.root = str(tmp_path / "no_data")
    problems = problems_of(recipe)
    assert [problem.split(":")[0] for problem in problems] == [
        f"model.hf_path={tmp_path}/no_model",
        f"data root {tmp_path}/no_data can't be read",
    ]


def test_a_decoder_that_does_not_load_is_named(recipe, monkeypatch):
    monkeypatch.setenv("NEMO_CARE_CPU", "1")
    monkeypatch.setitem(__import__("sys").modules, "decord", None)
    (problem,) = problems_of(recipe)
    assert problem.startswith("videos can't be decoded: ")


def test_what_nvidia_smi_counts_is_reported_by_gpu():
    healthy = "0, 0, No, No, [N/A]\n1, 0, No, No, [N/A]\n"
    assert gpu_errors(healthy) == []
    assert gpu_errors("0, 0, No, No, No\n5, 3, Yes, No, [N/A]\n") == [
        "GPU 5: uncorrected ECC errors since the last reset: 3",
        "GPU 5: failed memory row remappings: Yes",
    ]


def test_memory_that_another_process_holds_is_reported(monkeypatch):
    free = {0: 79, 1: 60}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda place: (free[place] * 2**30, 80 * 2**30))
    (problem,) = hardware.gpu_memory_problems(2)
    assert problem == "GPU 1: 20.0 of 80.0 GiB are in use by another process"


def test_an_all_reduce_runs_and_a_rank_that_dies_in_it_is_reported(monkeypatch):
    assert hardware.all_reduce_problems(2, "gloo") == []
    (problem,) = hardware.all_reduce_problems(1, "no_such_backend")
    assert problem.startswith("an all-reduce among 1 ranks fails (no_such_backend): ")


def test_the_verdict_is_left_beside_the_batch_job_s_file(monkeypatch, tmp_path):
    monkeypatch.setenv("NEMO_CARE_CPU", "1")
    monkeypatch.setenv("SLURMD_NODENAME", "node7")
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    arguments = ["--verdict", str(tmp_path), "--config-name", "tiny_cpu"]
    assert main(arguments) == 1
    assert "not shared with this machine" in (tmp_path / "node7").read_text()
    (tmp_path / "canary").write_text("11.0\n")
    assert main(arguments) == 1
    assert "stale here: 11.0 instead of 12.0" in (tmp_path / "node7").read_text()
    (tmp_path / "canary").write_text("12.0\n")
    assert main(arguments) == 0
    assert (tmp_path / "node7").read_text() == "ok\n"
    assert main([*arguments, "trainer.devicez=2"]) == 2
    assert "recipe: unknown recipe key trainer.devicez" in (tmp_path / "node7").read_text()
    assert sorted(os.listdir(tmp_path)) == ["canary", "node7"]
