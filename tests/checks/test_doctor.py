"""`nemo-care doctor`: what is there, what is broken, and whether a recipe can run here."""

import json
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from made_commands import world_overrides
from made_machine import made_machine, made_plan
from packaging.requirements import Requirement

from nemo_care.checks import fit, local, machine
from nemo_care.checks.fit import checkpoints_at_a_time, fit_of
from nemo_care.checks.machine import BROKEN, GIB, MISSING, GpuState
from nemo_care.cli import main
from nemo_care.commands import doctor as command
from nemo_care.megatron.te_import import why_unusable
from nemo_care.recipe.compose import compose_recipe

H100 = GpuState(0, "NVIDIA H100 80GB HBM3", 80 * GIB, 79 * GIB, (9, 0))

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Makes packages that are found before those installed, and forgets them."""
    folder = tmp_path / "packages"
    before = set(sys.modules)

    def make(files: dict[str, str]) -> None:
        for name, content in files.items():
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content)
        monkeypatch.syspath_prepend(folder)
        why_unusable.cache_clear()

    yield make
    why_unusable.cache_clear()
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("transformer_engine", "apex", "amp_C", "wandb"):
            del sys.modules[name]


@pytest.fixture
def recipe_of(world, tmp_path):
    def make(*overrides: str):
        folder = f"exp_manager.explicit_log_dir={tmp_path / 'run'}"
        given = ["--config-name", "tiny_cpu", folder, *world_overrides(world), *overrides]
        return compose_recipe(given)

    return make


@pytest.mark.parametrize("error", ["OSError('libcudnn.so.9: not found')", "RuntimeError('x')"])
def test_a_broken_package_is_named_with_its_error(packages, error):
    packages(
        {"transformer_engine/__init__.py": "", "transformer_engine/pytorch.py": f"raise {error}"}
    )
    engine = machine._transformer_engine()
    assert engine.state == BROKEN
    assert error.partition("(")[0] in engine.detail
    assert "model.backend=transformer_engine" in engine.remedy


def test_pypi_s_apex_is_recognised(packages):
    packages({"apex/__init__.py": ""})
    finding = machine._apex()
    assert finding.state == BROKEN
    assert "not NVIDIA's" in finding.detail
    assert "pip uninstall apex" in finding.remedy


def test_apex_without_its_kernels_is_not_enough(packages):
    packages({"apex/__init__.py": "", "apex/optimizers/__init__.py": "", "amp_C.py": ""})
    finding = machine._apex()
    assert finding.state == BROKEN
    assert "fused_weight_gradient_mlp_cuda: not built" in finding.detail


def test_gpus_are_listed_with_memory_and_capability(monkeypatch):
    monkeypatch.setattr(machine, "visible_gpus", lambda torch: [H100])
    monkeypatch.setattr(machine, "output_of", lambda given: "580.1, H100")
    gpus, findings = machine._gpus(pytest)  # any module: nothing of torch is asked but NCCL
    assert gpus == [H100]
    by_name = {finding.name: finding for finding in findings}
    assert by_name["driver"].detail == "580.1"
    assert "79.0 of 80.0 GiB free, compute capability 9.0" in by_name["GPU 0"].detail
    assert by_name["NCCL"].state == MISSING


def test_a_cpu_build_of_torch_beside_a_driver_is_reported(monkeypatch):
    monkeypatch.setattr(machine, "visible_gpus", lambda torch: [])
    monkeypatch.setattr(machine, "output_of", lambda given: "580.1, H100\n580.1, H100")
    _, findings = machine._gpus(pytest)
    assert findings[-1].state == BROKEN
    assert "the driver has 2" in findings[-1].detail


def test_a_gpu_that_does_not_answer_is_a_finding(monkeypatch):
    def fails(torch):
        raise RuntimeError("CUDA error: unknown error\nmore")

    monkeypatch.setattr(machine, "visible_gpus", fails)
    gpus, findings = machine._gpus(pytest)
    assert gpus == []
    assert findings[-1].state == BROKEN
    assert findings[-1].detail.endswith("CUDA error: unknown error")


def test_every_mandatory_package_is_looked_for():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    wanted = {Requirement(line).name for line in project["dependencies"]}
    own = {"torch", "megatron-core", "transformers", "nemo_toolkit", "decord"}
    assert wanted == own | set(machine.OTHERS)


def test_without_a_mandatory_package_the_status_is_2(monkeypatch, capsys):
    there = machine.is_there
    monkeypatch.setattr(machine, "is_there", lambda module: module != "decord" and there(module))
    assert main(["doctor"]) == 2
    shown = capsys.readouterr().out
    assert "no recipe can run here:" in shown
    assert "decord is missing" in shown.splitlines()[-1]
    assert "pip install" in shown.splitlines()[-1]


def test_the_command_runs_where_torch_is_missing():
    program = """
import sys
class Without:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] == 'torch':
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Without())
from nemo_care.cli import main
sys.exit(main(['doctor', '--json', '--config-name', 'tiny_cpu']))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    record = json.loads(done.stdout)
    assert any(problem.startswith("torch is missing") for problem in record["problems"])


def test_a_recipe_that_can_run_here(world, tmp_path, capsys):
    """With the real plan, in the process that it needs."""
    folder = tmp_path / "run"
    given = ["--config-name", "tiny_cpu", f"exp_manager.explicit_log_dir={folder}"]
    assert main(["doctor", "--json", *given, *world_overrides(world)]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["can_run"] is True
    assert record["problems"] == []
    assert record["recipe"]["plan"]["peak"] > record["recipe"]["plan"]["allowance"]
    assert not folder.exists()
    names = {finding["name"] for finding in record["findings"]}
    assert {"Python", "torch", "apex", "sinfo", "free /dev/shm"} <= names


def test_a_recipe_that_can_t_run_ends_with_status_2_and_all_reasons(
    monkeypatch, capsys, world, tmp_path
):
    monkeypatch.setattr(command, "examine", lambda: made_machine(wandb=MISSING))
    status = main(
        [
            *("doctor", "--no-plan", "--config-name", "tiny_cpu", *world_overrides(world)),
            f"model.hf_path={tmp_path}",
            f"data.validation.root={tmp_path}",
            "exp_manager.create_wandb_logger=true",
        ]
    )
    assert status == 2
    shown = capsys.readouterr().out.partition("this recipe can't run here:")[2]
    reasons = shown.strip().splitlines()
    assert len(reasons) == len(set(reasons)) == 3
    for part in ("create_wandb_logger=true needs", "config.json", "validation_L"):
        assert sum(part in reason for reason in reasons) == 1, part


def test_an_unknown_key_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(command, "examine", made_machine)
    assert main(["doctor", "--config-name", "tiny_cpu", "algorithm.group_sise=4"]) == 2
    assert "algorithm.group_size" in capsys.readouterr().out.splitlines()[-1]


def test_more_devices_than_gpus_are_refused(recipe_of):
    recipe = recipe_of("trainer.devices=2")
    found = fit_of(recipe, made_machine(gpus=(H100,)), [], None)
    (problem,) = found.problems
    assert "trainer.devices=2" in problem
    assert "set trainer.devices=1" in problem
    # Without GPUs ranks are processes.
    assert fit_of(recipe, made_machine(), [], None).problems == []


def fp8_recipe(recipe_of, name: str = "tensorwise"):
    recipe = recipe_of("model.backend=transformer_engine", "model.precision.dtype=bf16")
    recipe.model.precision.fp8.enabled = True
    recipe.model.precision.fp8.recipe = name
    return recipe


@pytest.mark.parametrize(
    ("name", "gpu", "cuda", "part"),
    [
        ("mxfp8", H100, "13.0", "needs a B200"),
        ("blockwise", H100, "12.4", "needs CUDA 12.9"),
        ("tensorwise", replace(H100, capability=(8, 0)), "13.0", "needs an L40S"),
    ],
)
def test_8_bits_that_the_gpu_has_not_are_refused(recipe_of, name, gpu, cuda, part):
    there = replace(made_machine(gpus=(gpu,)), cuda=cuda)
    problems = list(local.kernels(fp8_recipe(recipe_of, name), there))
    assert len(problems) == 1
    assert part in problems[0]


def test_8_bits_that_the_gpu_has_are_not_refused(recipe_of):
    there = made_machine(gpus=(H100,))
    assert list(local.kernels(fp8_recipe(recipe_of, "blockwise"), there)) == []


def test_kernels_for_gpus_are_refused_without_one_or_when_broken(recipe_of):
    problems = list(local.kernels(fp8_recipe(recipe_of), made_machine(transformer_engine=BROKEN)))
    assert len(problems) == 2
    assert "can't be imported (a detail)" in problems[0]
    assert "torch finds none here" in problems[1]


@pytest.mark.parametrize(
    ("gpu", "part"),
    [
        (replace(H100, total=39 * GIB, free=38 * GIB), "set a key"),
        (replace(H100, free=38 * GIB), "end other processes on the GPU"),
    ],
)
def test_memory_that_the_plan_does_not_find_is_a_reason(recipe_of, gpu, part):
    there = made_machine(gpus=(gpu,))
    found = fit_of(recipe_of(), there, [], made_plan(remedies=["a key"]))
    (problem,) = found.problems
    assert "update needs 40.0 GiB per GPU" in problem
    assert "38.0 GiB are free" in problem
    assert part in problem


def test_ranks_without_gpus_share_the_memory_and_need_none_of_cuda_s(recipe_of):
    recipe, plan = recipe_of("trainer.devices=2"), made_plan(peak=33 * GIB)
    assert fit_of(recipe, made_machine(memory=64 * GIB), [], plan).problems == []
    (problem,) = fit_of(recipe, made_machine(memory=63 * GIB), [], plan).problems
    assert "32.0 GiB per rank on the CPU" in problem


def test_disk_and_cpu_memory_are_warnings(recipe_of, monkeypatch):
    monkeypatch.setattr(fit, "free_disk", lambda folder: 2 * GIB)
    there = made_machine(gpus=(H100,), memory=GIB)
    monkeypatch.setattr("nemo_care.checks.hardware.gpu_error_problems", lambda: [])
    found = fit_of(recipe_of("checkpoint.save_interval=1"), there, [], made_plan())
    assert found.problems == []
    host, disk = found.warnings
    assert "about 10 GiB of CPU memory" in host
    assert "3 checkpoints of 1.0 GiB do not fit into the 2.0 GiB" in disk


def test_a_plan_that_fails_is_reported_and_decides_nothing(recipe_of):
    found = fit_of(recipe_of(), made_machine(), [], made_plan(error="no such shape"))
    assert found.problems == []
    assert found.warnings == ["memory was not planned: no such shape"]


def test_files_of_the_miniature_are_left_to_the_run(tmp_path):
    recipe = compose_recipe(
        [
            "--config-name",
            "tiny_cpu",
            *(f"data.{p}.root={tmp_path / 'w'}" for p in ("train", "validation")),
        ],
    )
    assert fit_of(recipe, made_machine(), [], None).problems == []
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("steps", "interval", "last", "every", "count"),
    [(100, 10, 2, 0, 3), (100, 10, 0, 0, 11), (100, 10, 2, 50, 5), (4, 50, 2, 0, 2)],
)
def test_checkpoints_on_the_disk_are_counted(recipe_of, steps, interval, last, every, count):
    recipe = recipe_of()
    recipe.trainer.max_steps, recipe.checkpoint.save_interval = steps, interval
    recipe.checkpoint.keep_last, recipe.checkpoint.keep_every = last, every
    assert checkpoints_at_a_time(recipe) == count


def test_free_disk_of_a_folder_that_is_not_there_yet_is_that_of_its_place():
    assert machine.free_disk(Path("/no/such/folder")) == machine.free_disk(Path("/"))
