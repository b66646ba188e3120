"""What ends an engine ends the run, with words and at once."""

import time

import psutil
import pytest
from small_runs import small_trainer
from vllm_runs import vllm_recipe

from nemo_care.errors import RunFailed
from nemo_care.rollouts.generator import Sampling

pytestmark = pytest.mark.vllm

SAMPLING = Sampling(group_size=4, temperature=1.0, top_p=0.95, max_tokens=24, seed=(5,))


@pytest.fixture
def own_trainer(checkpoint, world, ranks, tmp_path):
    made = small_trainer(vllm_recipe(checkpoint, world), ranks, tmp_path)
    yield made
    made.generator.close()


def test_a_killed_worker_ends_the_run_with_a_clear_error(own_trainer, prompts):
    generator = own_trainer.generator
    generator.generate(prompts, SAMPLING)
    host = generator.fleet.own[0][1].process.process
    family = psutil.Process(host.pid).children(recursive=True)
    workers = [child for child in family if "Worker" in child.name() + " ".join(child.cmdline())]
    assert workers
    workers[0].kill()
    started = time.monotonic()
    with pytest.raises(RunFailed, match=r"vLLM's engine 0\.0 has died: EngineDeadError.*log"):
        generator.generate(prompts, SAMPLING)
    assert time.monotonic() - started < 60
    host.wait(30)
    # Nobody of them stays, within moments of their host's end.
    _, alive = psutil.wait_procs(family, timeout=30)
    assert [child.name() for child in alive if child.status() != "zombie"] == []
