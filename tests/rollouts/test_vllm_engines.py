"""Engines that die, hang or refuse, in real processes: what the rollout and the run do then."""

import os
import signal
import sys
import threading
from dataclasses import replace

import pytest
from made_groups import make_prompts
from records import lines
from small_runs import small_recipe, small_trainer
from vllm_double import use_double

from nemo_care.errors import EnginesLost, InputError, RunFailed, RunStopped
from nemo_care.ranks.process_groups import Layout, Ranks
from nemo_care.rollouts.generator import Sampling
from nemo_care.rollouts.vllm import cluster, host
from nemo_care.rollouts.vllm.engine import Engine, EngineDied
from nemo_care.rollouts.vllm.local import HostProcess, LocalActor
from nemo_care.rollouts.vllm.messages import EngineSettings, SampleRequest

SAMPLING = Sampling(group_size=2, temperature=1.0, top_p=0.95, max_tokens=8, seed=(5,))
SETTINGS = EngineSettings("/m", "float32", 1, 100, {}, "disk", 0.9, None, True, False, "uni")
REQUEST = SampleRequest("one", [5, 3], [], [], 2, 1.0, 1.0, 8, 1, [2])
WAYS = {"fails": {"dies": True}, "is killed": {"is_killed": True}, "hangs": {"hangs": True}}


@pytest.fixture
def start(monkeypatch, tmp_path):
    """Starts engines in processes of their own, and ends them."""
    use_double(monkeypatch)
    made = []

    def start(settings=SETTINGS, **keywords):
        process = HostProcess(settings, tmp_path / "log", None)
        actor = LocalActor(process.address, process.key, process)
        options = {"timeout": 20.0, "max_restarts": 1} | keywords
        made.append(Engine("0.0", actor, settings, **options))
        made[-1].begin()
        return made[-1]

    yield start
    for engine in made:
        engine.close()


@pytest.fixture(scope="module")
def prompts(checkpoint, world, tmp_path_factory):
    return make_prompts(checkpoint, world, tmp_path_factory.mktemp("images"))


@pytest.fixture
def make_trainer(checkpoint, world, tmp_path, monkeypatch):
    """Makes trainers with a number of engines, and ends those."""
    use_double(monkeypatch)
    made = []

    def make(ranks, engines=1, timeout=20.0, **vllm):
        recipe = small_recipe(checkpoint, world)
        recipe.rollout.backend = "vllm"
        recipe.rollout.vllm.placement = "separate"
        recipe.rollout.vllm.gpus = list(range(1, engines + 1))
        recipe.rollout.vllm.timeout_seconds = timeout
        # The double's log-probabilities mean nothing.
        recipe.rollout.max_logprob_difference = 100.0
        for name, value in vllm.items():
            setattr(recipe.rollout.vllm, name, value)
        made.append(small_trainer(recipe, ranks, tmp_path / "run"))
        return made[-1]

    yield make
    for trainer in made:
        trainer.generator.close()


def engines_of(trainer):
    return [engine for _, engine in trainer.generator.fleet.own]


def texts(groups):
    return [[c.text for c in group.completions] for group in groups]


# ---------------------------------------------------------------------- one engine


def test_an_engine_serves_several_users_at_a_time(start):
    owner = start()
    owner.ready()
    user = Engine(
        "0.0", LocalActor(owner.actor.address, owner.actor.key, None), SETTINGS,
        timeout=20.0, max_restarts=1,
    )  # fmt: skip
    user.ready()
    answers = [one.call("generate", requests=[REQUEST] * 3) for one in (owner, user, owner)]
    assert [len(owner.wait(answer, "generation")) for answer in answers] == [3, 3, 3]
    user.close()
    assert owner.ask("seen")["pid"] == owner.actor.process.process.pid


def test_a_process_without_the_key_is_refused(start):
    engine = start()
    engine.ready()
    stranger = LocalActor(engine.actor.address, b"another", None)
    with pytest.raises(Exception, match="digest"):
        stranger.ready(5)
    assert len(engine.ask("generate", requests=[REQUEST])) == 1
    assert os.stat(os.path.dirname(engine.actor.address)).st_mode & 0o77 == 0


def test_an_engine_that_cannot_load_its_model_fails_with_the_end_of_its_log(start):
    engine = start(replace(SETTINGS, folder="/unreadable"))
    with pytest.raises(RunFailed, match=r"(?s)engine 0\.0 has not started.*no such model"):
        engine.ready()


def test_an_engine_that_takes_too_long_to_start_is_named(start, monkeypatch):
    monkeypatch.setattr(host, "serve", lambda *arguments: threading.Event().wait())
    engine = start(timeout=0.3)
    with pytest.raises(RunFailed, match=r"timeout_seconds=0\.3\): it was not ready within 0\.3 s"):
        engine.ready()


def test_a_call_that_is_refused_leaves_the_engine_alive(start):
    engine = start()
    engine.ready()
    with pytest.raises(RunFailed, match=r"engine 0\.0: AttributeError: .*nothing_of_the_kind"):
        engine.ask("nothing_of_the_kind")
    assert engine.death is None
    assert len(engine.ask("generate", requests=[REQUEST])) == 1


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_dead_engine_is_noticed_and_nothing_of_it_is_left(start, way):
    engine = start()
    engine.ready()
    pid = engine.ask("seen")["pid"]
    engine.ask("become", **way)
    engine.timeout = 1.0 if "hangs" in way else 20.0
    with pytest.raises(EngineDied, match=r"(?s)engine 0\.0 (has died|did not answer).*log"):
        engine.ask("generate", requests=[REQUEST])
    with pytest.raises(ProcessLookupError):
        os.killpg(pid, 0)
    # It stays dead, until it is started again.
    with pytest.raises(EngineDied):
        engine.ask("generate", requests=[REQUEST])
    engine.timeout = 20.0
    engine.restart()
    assert len(engine.ask("generate", requests=[REQUEST])) == 1
    engine.ask("become", dies=True)
    with pytest.raises(EngineDied):
        engine.ask("generate", requests=[REQUEST])
    with pytest.raises(EnginesLost, match=r"max_restarts=1 is used up"):
        engine.restart()


def test_an_engine_ends_with_its_owner_even_if_it_hangs(start, monkeypatch):
    monkeypatch.setattr(host, "_PATIENCE", 0.2)
    engine = start()
    engine.ready()
    engine.ask("become", hangs=True)
    engine.call("generate", requests=[REQUEST])
    process = engine.actor.process.process
    # As the owner's death would.
    process.stdin.close()
    process.wait(10)
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


# ---------------------------------------------------------------------- rollouts


def test_the_prompts_of_a_dead_engine_are_sampled_again(ranks, make_trainer, prompts):
    trainer = make_trainer(ranks, engines=2)
    undisturbed = texts(trainer.generator.generate(prompts, SAMPLING))
    trainer.policy.scheduler.step(1)
    trainer.policy.model.language_model.decoder.final_layernorm.weight.data.fill_(7)
    other, dying = engines_of(trainer)
    dying.ask("become", is_killed=True)
    assert texts(trainer.generator.generate(prompts, SAMPLING)) == undisturbed
    (death,) = trainer.generator.take_deaths()
    assert "engine 0.1" in death
    assert trainer.generator.take_deaths() == []
    # The current weights came first, and then the same requests with the same seeds.
    again = dying.ask("seen")
    assert again["calls"] == [
        "init",
        "start",
        *["update"] * again["calls"].count("update"),
        "finish",
    ]
    assert bool((again["weights"]["model.norm.weight"] == 7).all())
    samples = [(r.name, r.seed) for r in again["requests"]]
    requests = [trainer.generator.requests.build(prompt, SAMPLING) for prompt in prompts[1::2]]
    assert samples == [(r.name, r.seed) for r in requests]
    # The other engine sampled its prompts once per rollout.
    assert len(other.ask("seen")["requests"]) == 2 * len(prompts[::2])


def test_all_rounds_in_flight_are_sampled_again(ranks, make_trainer, prompts):
    trainer = make_trainer(ranks, engines=2)
    generator = trainer.generator
    undisturbed = texts(generator.generate(prompts, SAMPLING))
    engines_of(trainer)[0].ask("become", is_killed=True)
    rounds = [generator.submit(prompts, SAMPLING) for _ in range(2)]
    assert [texts(generator.collect(begun)) for begun in rounds] == [undisturbed] * 2
    assert len(generator.take_deaths()) == 1


def test_an_engine_that_dies_while_it_gets_weights_is_started_again(
    ranks, make_trainer, prompts, monkeypatch
):
    trainer = make_trainer(ranks)
    trainer.generator.generate(prompts, SAMPLING)
    (engine,) = engines_of(trainer)
    os.kill(engine.ask("seen")["pid"], signal.SIGKILL)
    trainer.policy.scheduler.step(1)
    assert len(trainer.generator.generate(prompts, SAMPLING)) == 4
    assert len(trainer.generator.take_deaths()) == 1
    assert engine.ask("seen")["calls"].count("finish") == 1


def test_a_restart_that_fails_counts_too(ranks, make_trainer, prompts, monkeypatch):
    trainer = make_trainer(ranks, max_restarts=3)
    trainer.generator.generate(prompts[:1], SAMPLING)
    (engine,) = engines_of(trainer)
    process = engine.actor.process
    start, settings = process.start, process.settings
    starts = []

    def fails_twice():
        starts.append(1)
        broken = len(starts) < 3
        process.settings = replace(settings, folder="/unreadable") if broken else settings
        start()

    monkeypatch.setattr(process, "start", fails_twice)
    engine.ask("become", is_killed=True)
    trainer.generator.generate(prompts[:1], SAMPLING)
    assert (len(starts), engine.restarts) == (3, 3)


def after_a_kill(ranks: Ranks, job: tuple) -> tuple:
    """Two replicas share an engine that is killed: this rank's completions, and deaths."""
    checkpoint, world, out = job
    with pytest.MonkeyPatch.context() as patch:
        use_double(patch)
        recipe = small_recipe(checkpoint, world)
        recipe.rollout.backend = "vllm"
        recipe.rollout.vllm.placement = "separate"
        recipe.rollout.vllm.gpus = [2]
        recipe.trainer.devices = 2
        trainer = small_trainer(recipe, ranks, out / "run")
        prompts, _ = trainer.prompts.next_step()
        first = texts(trainer.generator.generate(prompts, SAMPLING))
        (engine,) = engines_of(trainer)
        if trainer.generator.fleet.feeds:
            engine.ask("become", is_killed=True)
        ranks.barrier()
        second = texts(trainer.generator.generate(prompts, SAMPLING))
        deaths = trainer.generator.take_deaths()
        ranks.barrier()
        trainer.generator.close()
    return first == second, len(deaths)


def test_replicas_that_share_an_engine_get_it_back_together(on_ranks, checkpoint, world, tmp_path):
    job = (checkpoint, world, tmp_path)
    assert on_ranks(Layout(), after_a_kill, job, replicas=2) == [(True, 1), (True, 1)]


# ---------------------------------------------------------------------- the run


def test_a_run_goes_on_after_a_death_and_counts_it(ranks, make_trainer, tmp_path, capsys):
    trainer = make_trainer(ranks)
    trainer.recipe.trainer.max_steps = 3
    update = trainer.policy.update

    def killed(step, **keywords):
        if step.number == 1:
            (engine,) = engines_of(trainer)
            engine.ask("become", is_killed=True)
        update(step, **keywords)

    trainer.policy.update = killed
    trainer.fit()
    metrics = lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["rollout/engine_restarts"] for line in metrics] == [0, 1, 0]
    assert "started again, and its prompts are sampled again: vLLM's engine 0.0 has died" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize("asynchronous", [False, True], ids=["in turn", "ahead"])
def test_a_run_whose_engines_do_not_come_back_saves_and_can_be_resumed(
    ranks, make_trainer, tmp_path, asynchronous
):
    trainer = make_trainer(ranks, max_restarts=0)
    trainer.recipe.trainer.max_steps = 3
    trainer.recipe.checkpoint.save_interval = 100
    trainer.rollouts.asynchronous = asynchronous
    update = trainer.policy.update

    def killed(step, **keywords):
        if step.number == 1:
            (engine,) = engines_of(trainer)
            os.kill(engine.actor.process.process.pid, signal.SIGKILL)
        update(step, **keywords)

    trainer.policy.update = killed
    with pytest.raises(
        RunStopped, match=r"(?s)stopped after step 1 because an engine was lost"
    ) as stop:
        trainer.fit()
    assert stop.value.status == 75
    trainer.generator.close()
    resumed = make_trainer(ranks, max_restarts=0)
    resumed.recipe.trainer.max_steps = 3
    resumed.fit()
    assert [line["step"] for line in lines(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3]
    indices = [
        row["prompt_index"]
        for step in (1, 2, 3)
        for row in lines(tmp_path / "run" / "rollouts" / f"step_{step:06d}.jsonl")
    ]
    # No prompt was left out or taken twice.
    assert sorted({*indices}) == list(range(max(indices) + 1))


def test_a_machine_without_ray_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"rollout\.vllm\.ray_address needs the package ray"):
        cluster.connect("node17:6379", "a run")
