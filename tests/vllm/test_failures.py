"""An engine of this machine that is killed in the middle of a rollout."""

import os
import signal
import time

import psutil
import pytest
from made_groups import make_prompts
from small_runs import small_trainer
from tiny_qwen3_vl import write_tiny_qwen3
from vllm_runs import texts, vllm_recipe

from nemo_care.rollouts.generator import Sampling

pytestmark = pytest.mark.vllm

SAMPLING = Sampling(group_size=4, temperature=1.0, top_p=0.95, max_tokens=24, seed=(5,))


@pytest.fixture
def own_trainer(checkpoint, world, ranks, tmp_path):
    made = small_trainer(vllm_recipe(checkpoint, world), ranks, tmp_path)
    yield made
    made.generator.close()


def test_the_completions_of_a_killed_engine_equal_those_of_an_undisturbed_rollout(
    own_trainer, prompts
):
    generator = own_trainer.generator
    undisturbed = texts(generator.generate(prompts, SAMPLING))
    process = generator.fleet.own[0][1].actor.process.process
    family = psutil.Process(process.pid).children(recursive=True)
    begun = generator.submit(prompts, SAMPLING)
    time.sleep(0.02)
    assert not begun.parts[0].answer.done()
    os.kill(process.pid, signal.SIGKILL)
    started = time.monotonic()
    assert texts(generator.collect(begun)) == undisturbed
    print(f"seconds until the completions were there: {time.monotonic() - started:.1f}")
    (death,) = generator.take_deaths()
    assert "engine 0.0 has died: its process has ended" in death
    _, alive = psutil.wait_procs(family, timeout=30)
    assert [child.name() for child in alive if child.status() != "zombie"] == []


def test_an_engine_whose_worker_is_killed_is_replaced(world, ranks, tmp_path, monkeypatch):
    """Two tensor-parallel workers, each a process; the miniature's vision tower has one head."""
    checkpoint = write_tiny_qwen3(tmp_path / "tiny")
    prompts = make_prompts(checkpoint, world, tmp_path)
    # By itself vLLM wants a NUMA node for each.
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    recipe = vllm_recipe(checkpoint, world)
    recipe.rollout.vllm.placement = "separate"
    recipe.rollout.vllm.gpus = [1, 2]
    recipe.rollout.vllm.tensor_parallel_size = 2
    trainer = small_trainer(recipe, ranks, tmp_path / "run")
    try:
        generator = trainer.generator
        undisturbed = texts(generator.generate(prompts, SAMPLING))
        process = generator.fleet.own[0][1].actor.process.process
        family = psutil.Process(process.pid).children(recursive=True)
        workers = [child for child in family if "Worker" in " ".join(child.cmdline())]
        assert len(workers) == 2
        workers[1].kill()
        assert texts(generator.generate(prompts, SAMPLING)) == undisturbed
        (death,) = generator.take_deaths()
        assert "engine 0.0 has died" in death
        _, alive = psutil.wait_procs(family, timeout=30)
        assert [child.name() for child in alive if child.status() != "zombie"] == []
    finally:
        trainer.generator.close()
