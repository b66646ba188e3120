"""Two engines of a Ray cluster that was started before the run."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from small_runs import one_step, small_trainer
from vllm_runs import texts, vllm_recipe

from nemo_care.errors import InputError, RunFailed
from nemo_care.ranks.process_groups import Layout
from nemo_care.rollouts.generator import Sampling

pytestmark = pytest.mark.vllm

GREEDY = Sampling(group_size=2, temperature=0.0, top_p=1.0, max_tokens=24, seed=(5,))
SAMPLED = Sampling(group_size=4, temperature=1.0, top_p=0.95, max_tokens=24, seed=(5,))


@pytest.fixture(scope="module")
def cluster():
    """The address of a cluster of one machine, whose calls need a token."""
    with socket.socket() as probe, pytest.MonkeyPatch.context() as patch:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", os.urandom(32).hex())
        # A socket's path is limited to some hundred characters.
        with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
            probe.close()
            ray = Path(sys.executable).parent / "ray"
            options = ["--num-cpus=2", "--include-dashboard=false", "--disable-usage-stats"]
            command = [str(ray), "start", "--head", f"--port={port}", f"--temp-dir={folder}"]
            log = Path(folder) / "start.log"
            with log.open("w") as output:
                started = subprocess.Popen(
                    [*command, *options, "--block"], stdout=output, stderr=output
                )
            deadline = time.monotonic() + 120
            while "Ray runtime started" not in log.read_text():
                assert time.monotonic() < deadline, log.read_text()
                assert started.poll() is None, log.read_text()
                time.sleep(0.2)
            yield f"127.0.0.1:{port}"
            processes = psutil.Process(started.pid).children(recursive=True)
            started.terminate()
            started.wait(60)
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()


@pytest.fixture
def make(checkpoint, world, ranks, tmp_path, cluster):
    made = []

    def make(**keys):
        recipe = vllm_recipe(checkpoint, world)
        recipe.rollout.vllm.placement = "separate"
        recipe.rollout.vllm.ray_address = cluster
        recipe.rollout.vllm.engines = 2
        for key, value in keys.items():
            setattr(recipe.rollout.vllm, key, value)
        made.append(small_trainer(recipe, ranks, tmp_path))
        return made[-1]

    yield make
    for trainer in made:
        trainer.generator.close()


def engine_processes():
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if "ray::EngineServer" in " ".join(process.cmdline()):
                found.append(process)
    return found


def test_two_engines_follow_three_steps_and_a_killed_one_comes_back(make, prompts):
    from nemo_care.rollouts.megatron import MegatronGenerator

    handler = signal.getsignal(signal.SIGTERM)
    trainer = make()
    assert signal.getsignal(signal.SIGTERM) is handler
    generator = trainer.generator
    megatron = MegatronGenerator(
        trainer.policy.model, generator.tokenizer, trainer.ranks, groups_per_batch=4
    )
    before = texts(generator.generate(prompts, GREEDY))
    assert before == texts(megatron.generate(prompts, GREEDY))
    for number in range(1, 4):
        metrics = one_step(trainer, number).metrics
        assert metrics["rollout/logprob_difference"] < 1e-4
        assert metrics["rollout/engine_restarts"] == 0
    after = texts(generator.generate(prompts, GREEDY))
    assert after == texts(megatron.generate(prompts, GREEDY))
    assert after != before

    ((_, engine), _) = generator.fleet.own
    with pytest.raises(RunFailed, match=r"^vLLM's engine 0: AttributeError: .*nothing_of_the_kind"):
        engine.ask("nothing_of_the_kind")
    assert engine.death is None

    undisturbed = texts(generator.generate(prompts, SAMPLED))
    first = engine_processes()
    assert len(first) == 2
    begun = generator.submit(prompts, SAMPLED)
    time.sleep(0.02)
    assert not all(part.answer.done() for part in begun.parts)
    family = first[0].children(recursive=True)
    first[0].send_signal(signal.SIGKILL)
    started = time.monotonic()
    assert texts(generator.collect(begun)) == undisturbed
    print(f"seconds until the completions were there: {time.monotonic() - started:.1f}")
    (death,) = generator.take_deaths()
    assert "has died: its process has ended" in death
    assert len(engine_processes()) == 2
    generator.close()
    _, alive = psutil.wait_procs([*first, *family], timeout=30)
    assert alive == []
    deadline = time.monotonic() + 30
    while engine_processes() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert engine_processes() == []


def shared(ranks, job):
    """Two replicas share an engine, which is killed: this rank's completions, and deaths."""
    checkpoint, world, out, address, token = job
    os.environ.update(token)
    recipe = vllm_recipe(checkpoint, world)
    recipe.rollout.vllm.placement = "separate"
    recipe.rollout.vllm.ray_address = address
    recipe.rollout.vllm.engines = 1
    recipe.trainer.devices = 2
    trainer = small_trainer(recipe, ranks, out / "run")
    generator = trainer.generator
    prompts, _ = trainer.prompts.next_step()
    undisturbed = texts(generator.generate(prompts, SAMPLED))
    ranks.barrier()
    begun = generator.submit(prompts, SAMPLED)
    if ranks.rank == 0:
        (process,) = engine_processes()
        process.kill()
    again = texts(generator.collect(begun))
    deaths = generator.take_deaths()
    ranks.barrier()
    generator.close()
    return again == undisturbed, len(deaths)


def test_two_replicas_find_one_engine_and_get_it_back(
    on_ranks, checkpoint, world, tmp_path, cluster
):
    token = {name: os.environ[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}
    job = (checkpoint, world, tmp_path, cluster, token)
    assert on_ranks(Layout(), shared, job, replicas=2) == [(True, 1), (True, 1)]


def test_an_address_without_a_cluster_is_named(make):
    with pytest.raises(InputError, match=r"ray_address=127\.0\.0\.1:1: there is no Ray cluster"):
        make(ray_address="127.0.0.1:1")
